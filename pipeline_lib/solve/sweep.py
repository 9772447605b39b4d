"""The OBS column sweep of SparseGPT (2301.00774). Any score can choose the mask during the sweep, as
in 2310.09499.

Kept weights can be quantised in the same sweep (GPTQ, 2210.17323), so that one compensation corrects
both errors (2301.00774, Section 3.5). ``target_weight`` replaces the weights from which the sweep
starts by a target that accounts for the dense model's activations.
"""

from itertools import accumulate

import torch

from pipeline_lib.core.counts import shares
from pipeline_lib.masks.rule import Rule
from pipeline_lib.masks.select import select
from pipeline_lib.solve.eliminate import Columns, Groups, Rounding
from pipeline_lib.solve.factor import Factorisation
from pipeline_lib.solve.grid import Grid
from pipeline_lib.solve.order import restored, runs


def target_weight(
    weight: torch.Tensor, difference: torch.Tensor, factorisation: Factorisation, share: float
) -> torch.Tensor:
    """The target W₀ = W + share·W (C − G) H⁻¹, which replaces W so that Ŵ X approximates the dense
    model's outputs.

    Let X be the inputs of the pruned layer, X_d those in the dense model, C = E[X_d Xᵀ], G = E[X
    Xᵀ] and H = G + Λ. Completing the square gives E‖Ŵ X − W (X + share·(X_d − X))‖² + ‖(Ŵ − W)
    Λ^½‖² = tr((Ŵ − W₀) H (Ŵ − W₀)ᵀ) + const for every Ŵ. So minimising the error of W₀ (``sweep``,
    ``lsq.solve``; measured by ``layer_error`` with W₀ as the original) minimises the error of the
    outputs, and damping pulls towards W. Share 0 gives SparseGPT's own target W X, and share 1 the
    dense model's W X_d.

    Args:
        weight: W [R, C].
        difference: C − G = E[(X_d − X) Xᵀ], shape [C, C], with G as in ``factorisation``.
        share: 0 … 1.

    Returns:
        W₀ [R, C]; W itself, to the last bit, if both activations are equal or ``share`` is 0.
    """
    order, upper = factorisation.order, factorisation.upper
    shift = weight @ difference
    shift = shift @ upper.T @ upper if order is None else restored(shift[:, order] @ upper.T @ upper, order)
    return shift.mul_(share).add_(weight)


def sweep(
    weight: torch.Tensor,
    factorisation: Factorisation,
    kept: int,
    rule: Rule,
    grid: Grid | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prune columns in order, and let later columns compensate for each error (2310.09499, Eq. 3).

    With group ``block`` (and for N:M) the mask of each column block (group of M) is chosen from the
    weights as compensated so far and from U_mm². With ``row`` and ``matrix`` it is chosen
    beforehand from the whole matrix. Blocks and groups are those of the matrix's own columns,
    regardless of the factorisation's order.

    Args:
        weight: [R, C]: W in any dtype, or the target of ``target_weight``.
        kept: number of kept weights.
        grid: filled during the sweep. The kept weights of a column are rounded to it, and later
            columns compensate for this, too.

    Returns:
        The compensated weight [R, C], exactly zero outside the mask; the mask [R, C]; and the weight's
            error tr((W − Ŵ) H (W − Ŵ)ᵀ) [] float64. The error is the sum of the errors of single
            steps, for W without its columns of always-zero inputs. It is NaN if a score is NaN.

    Raises:
        ValueError: the order does not keep the column blocks together.
    """
    order = factorisation.order
    weight = weight.to(factorisation.upper.dtype, copy=True).masked_fill_(factorisation.dead, 0)
    curvature = factorisation.trailing()
    mask = torch.ones_like(weight, dtype=torch.bool)  # weights count as kept until chosen
    m, block, groups = rule.pattern.m, rule.block, None
    if not m and rule.group != "block":
        mask = rule.mask(rule.scores(weight, factorisation.whole()), kept)
    if order is not None:
        weight, mask, rule = weight[:, order], mask[:, order], rule.at(order)
        runs(order, m or 1)
    if m:
        block = -(-block // m) * m  # groups of M lie within one column block
        factor = rule.scores(weight.new_ones(1, weight.shape[1]), curvature)[0]  # a score is w² times this
        groups = Groups(kept * m // weight.numel(), m, factor)
    columns = Columns(
        weight, mask, factorisation.upper, groups, None if grid is None else Rounding(grid, order)
    )
    for start, stop, quota in _blocks(kept, weight.shape, block, order):
        place = slice(start, stop)

        def choose(part: torch.Tensor, place: slice = place, quota: int = quota) -> torch.Tensor:
            """The mask of columns [R, B] as compensated so far."""
            return select(
                rule.at(place).scores(part, curvature.columns(place.start, place.stop)),
                quota,
                "matrix",
                block,
            )

        columns.eliminate(start, stop, choose if not m and rule.group == "block" else None)
    if order is not None:
        weight, mask = restored(weight, order), restored(mask, order)
    return weight, mask, columns.lost


def quantise(
    weight: torch.Tensor, mask: torch.Tensor, factorisation: Factorisation, grid: Grid, block: int
) -> torch.Tensor:
    """Quantise weights column by column on a given mask, and let later columns compensate for each
    error (2210.17323, Eqs. 2–3).

    Compensation that reaches a pruned position is passed on when the sweep reaches its column.

    Args:
        weight: [R, C] float32; values outside the mask are pruned during the sweep.
        mask: [R, C] bool, True = kept.
        grid: filled during the sweep.
        block: columns that are updated at once; changes only rounding.

    Returns:
        The quantised weight [R, C], exactly zero outside the mask.
    """
    order, weight, columns = factorisation.order, weight.masked_fill(factorisation.dead, 0), weight.shape[1]
    if order is not None:
        weight, mask = weight[:, order], mask[:, order]
    swept = Columns(weight, mask, factorisation.upper, rounding=Rounding(grid, order))
    for start in range(0, columns, block):
        swept.eliminate(start, min(start + block, columns))
    return weight if order is None else restored(weight, order)


def _blocks(
    kept: int, shape: torch.Size, block: int, order: torch.Tensor | None
) -> list[tuple[int, int, int]]:
    """Start, stop and number of kept weights of each column block, in the order of the sweep. The
    numbers are proportional to the sizes of the blocks.
    """
    rows, columns = shape
    widths = [min(block, columns - start) for start in range(0, columns, block)]
    quotas = shares(kept, [rows * width for width in widths])
    met = range(len(widths)) if order is None else runs(order, block)
    stops = accumulate(widths[i] for i in met)
    return [(stop - widths[i], stop, quotas[i]) for i, stop in zip(met, stops, strict=True)]
