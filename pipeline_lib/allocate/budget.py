"""Budgets: the number of weights that each matrix keeps, by Algorithm 1 of 2310.09499, under an exact
overall budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline_lib.core.counts import target
from pipeline_lib.core.errors import SparselineError


@dataclass(frozen=True)
class Unit:
    """One logical matrix, as seen by the budget."""

    name: str
    block: int
    size: int  # weights
    quantum: int  # smallest step of the kept count: 1, or size/M for N:M


def ranks(values: Sequence[float]) -> np.ndarray:
    """Positions in increasing order, spread over [−1, 1]; ties keep their order."""
    order = np.argsort(np.asarray(values, dtype=float), kind="stable")
    t = np.empty(len(values))
    t[order] = np.linspace(-1, 1, len(values)) if len(values) > 1 else 0.0
    return t


@dataclass(frozen=True)
class Limits:
    """Limits of every allocation. An array has an entry per matrix; the bounds of its kept count are
    multiples of its quantum.
    """

    sizes: np.ndarray
    quanta: np.ndarray
    low: np.ndarray  # minimal kept counts
    high: np.ndarray  # maximal kept counts
    budget: int  # weights that all matrices keep together


def limits_of(units: Sequence[Unit], sparsity: float, bounds: tuple[float, float]) -> Limits:
    """Density bounds as kept counts, rounded inwards to whole quanta.

    Raises:
        SparselineError: no densities within the bounds meet the budget.
    """
    sizes = np.array([unit.size for unit in units], dtype=np.int64)
    quanta = np.array([unit.quantum for unit in units], dtype=np.int64)
    low = np.ceil(np.round(bounds[0] * sizes / quanta, 9)).astype(np.int64) * quanta
    high = np.floor(np.round(bounds[1] * sizes / quanta, 9)).astype(np.int64) * quanta
    budget = target(sparsity, int(sizes.sum()))
    slack = quanta.max() / 2 if quanta.max() > 1 else 0
    if (low > high).any() or not low.sum() - slack <= budget <= high.sum() + slack:
        raise SparselineError(
            f"No allocation with densities between {bounds[0]:g} and {bounds[1]:g} meets sparsity"
            f" {sparsity:g}; widen allocation.density_bounds, or raise alpha if the method is `predicted`."
        )
    return Limits(sizes, quanta, low, high, budget)


def allocate(
    units: Sequence[Unit], sparsity: float, t: np.ndarray, alpha: float, bounds: tuple[float, float]
) -> list[int]:
    """Weights kept per matrix: density_i = clip(c + α·t_i, bounds), with c such that the overall
    sparsity is met.

    Args:
        t: each matrix's rank in [−1, 1] (by sensitivity in Algorithm 1; zeros for a uniform
            allocation).
        alpha: half-width of the density interval (Algorithm 1).
        bounds: minimal and maximal density of a matrix.

    Returns:
        Kept counts, multiples of each matrix's quantum. With quantum 1 they sum to ``target``
            exactly; otherwise within half of the largest quantum. Rounding is by largest remainder;
            the earlier matrix wins ties.

    Raises:
        SparselineError: no densities within the bounds meet the budget.
    """
    limits = limits_of(units, sparsity, bounds)
    sizes, quanta = limits.sizes.astype(float), limits.quanta
    low, high = limits.low / sizes, limits.high / sizes

    def densities(c: float) -> np.ndarray:
        return np.clip(c + alpha * t, low, high)

    below, above = -1.0 - alpha, 2.0 + alpha
    for _ in range(200):
        middle = (below + above) / 2
        if (densities(middle) * sizes).sum() < limits.budget:
            below = middle
        else:
            above = middle
    steps = densities(above) * sizes / quanta
    whole = np.floor(np.round(steps, 6)).astype(np.int64)
    kept = whole * quanta
    missing = limits.budget - int(kept.sum())
    for i in sorted(range(len(units)), key=lambda i: (whole[i] - steps[i], i)):
        if 2 * missing < quanta[i] or missing <= 0:
            continue
        if kept[i] + quanta[i] <= limits.high[i]:
            kept[i] += quanta[i]
            missing -= int(quanta[i])
    return [int(k) for k in kept]
