"""Kept counts with the minimal predicted loss under the budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipeline_lib.allocate.budget import Unit, limits_of

KNOTS = 256  # evenly spread counts at which a curve is evaluated; its hull is straight between them


@dataclass(frozen=True)
class Curve:
    """One matrix's predicted increase of the loss over its density, measured at increasing densities
    from 0 to 1, to the power ``temper``.

    Negative values, which are rounding errors, count as 0.
    """

    density: np.ndarray
    loss: np.ndarray
    temper: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", np.maximum(self.loss, 0.0))

    def at(self, density: np.ndarray) -> np.ndarray:
        """The loss at some densities. It is interpolated linearly in the logarithm between two
        measured points, because errors span orders of magnitude.

        Beyond the last point it falls to 0 at density 1, with the cube of the pruned share. (If
        weights are dense around zero, the smallest share s lies below a threshold ∝ s, and its
        squares sum to ∝ s³.)
        """
        i = np.clip(np.searchsorted(self.density, density, side="right") - 1, 0, len(self.density) - 2)
        before, after = self.loss[i], self.loss[i + 1]
        share = (density - self.density[i]) / (self.density[i + 1] - self.density[i])
        positive = (before > 0) & (after > 0)
        logs = [np.log(np.where(positive, end, 1.0)) for end in (before, after)]
        return (
            np.where(positive, np.exp((1 - share) * logs[0] + share * logs[1]), before * (1 - share) ** 3)
            ** self.temper
        )


def hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Indices of the lower convex hull of points with increasing x (Andrew's monotone chain)."""
    kept: list[int] = []
    for k in range(len(x)):
        while len(kept) > 1:
            i, j = kept[-2:]
            if (y[j] - y[i]) * (x[k] - x[i]) < (y[k] - y[i]) * (x[j] - x[i]):
                break
            kept.pop()
        kept.append(k)
    return kept


def minimise(
    units: Sequence[Unit], sparsity: float, curves: Sequence[Curve], bounds: tuple[float, float]
) -> list[int]:
    """Weights kept per matrix with the minimal sum of predicted losses: steepest descent per weight,
    along each curve's lower convex hull.

    Exact for the hulls f_i. The search starts at the lower bounds. It takes the hulls' segments,
    over all matrices, by increasing slope (loss per weight, the most negative first) until the
    budget is spent, the last one in part. Slopes increase within a matrix, so its segments come in
    order. Let λ be the slope of the last segment. Every weight taken lowers the loss at a slope ≤
    λ, and every other weight would do so at ≥ λ. So each k_i minimises f_i(k) − λk within its
    bounds. For any other k' with the same sum, Σ f_i(k'_i) ≥ Σ f_i(k_i) + λ·Σ (k'_i − k_i) = Σ
    f_i(k_i). With equal quanta the same holds for whole quanta, because segments break at them;
    unequal ones are rounded as in ``allocate``.

    Returns:
        Kept counts as in ``allocate``; equal slopes are taken in turns.

    Raises:
        SparselineError: no densities within the bounds meet the budget.
    """
    limits = limits_of(units, sparsity, bounds)
    # slope, place in a straight part, matrix, quanta: equal matrices advance together
    segments: list[tuple[float, int, int, int]] = []
    for i, curve in enumerate(curves):
        quanta = int((limits.high[i] - limits.low[i]) // limits.quanta[i])
        steps = np.unique(np.linspace(0, quanta, min(quanta, KNOTS) + 1).round().astype(np.int64))
        kept = limits.low[i] + steps * limits.quanta[i]
        loss = curve.at(kept / limits.sizes[i])
        corners = hull(kept.astype(float), loss)
        for a, b in pairwise(corners):
            slope = float((loss[b] - loss[a]) / (kept[b] - kept[a]))
            segments += [(slope, k - a, i, int(steps[k + 1] - steps[k])) for k in range(a, b)]
    counts = limits.low.copy()
    missing = limits.budget - int(counts.sum())
    for *_, i, quanta in sorted(segments):
        quantum = int(limits.quanta[i])
        # rounded to the nearest; a quantum of one weight gives exactly as many as are missing
        taken = min(quanta, (2 * missing + quantum) // (2 * quantum))
        if taken > 0:
            counts[i] += taken * quantum
            missing -= taken * quantum
    return [int(count) for count in counts]
