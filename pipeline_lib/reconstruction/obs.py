"""The OBS column sweep of SparseGPT (2301.00774), with any score of 2310.09499 choosing the mask on the way.

What stays can be quantised on the way (GPTQ, 2210.17323), so that one compensation mends both errors (2301.00774, Section 3.5).

Two things around it: ``aim`` moves what the sweep starts from to where the dense stream's outputs are best met, and
``column_losses`` with ``rose_order`` let it take the columns in the order of ROSE (2603.05878).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch

from pipeline_lib.allocation.budget import shares
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.pruning.patterns import Group, Pattern, select, select_n_of_m
from pipeline_lib.pruning.scores import Curvature, Score, saliency
from pipeline_lib.quantization.grid import Grid

DampingOf = Literal["mean", "diagonal"]
LARGEST_DAMPING = 1.0


@dataclass(frozen=True)
class Factorisation:
    """H = G + damping of a site, factorised once for all matrices that share it.

    ``upper`` is U [C, C], upper triangular with H⁻¹ = Uᵀ U: U_mm² is [H⁻¹]_mm of the trailing submatrix from m on. With an
    ``order`` that is so for H's rows and columns in that order; all other fields are in the order of the matrix's own columns.
    """

    second_moment: torch.Tensor  # G_mm [C]
    diagonal: torch.Tensor  # H_mm [C]
    inverse_diagonal: torch.Tensor  # [H⁻¹]_mm [C]
    upper: torch.Tensor
    dead: torch.Tensor  # [C] inputs that were always zero
    damping: float  # the one that was needed
    order: torch.Tensor | None = None  # [C] the columns as the sweep takes them; None: from left to right

    def whole(self) -> Curvature:
        """For scores of the whole matrix at once: columns in their own order."""
        return Curvature(self.second_moment, self.diagonal, self.inverse_diagonal)

    def trailing(self) -> Curvature:
        """For scores inside the sweep: columns as it takes them."""
        inverse_diagonal = self.upper.diagonal().square()
        if self.order is None:
            return Curvature(self.second_moment, self.diagonal, inverse_diagonal)
        return Curvature(self.second_moment[self.order], self.diagonal[self.order], inverse_diagonal)

    def hessian(self, gram: torch.Tensor) -> torch.Tensor:
        """H [C, C] from the G that was factorised, columns in their own order."""
        hessian = gram.clone()
        hessian.diagonal().copy_(self.diagonal)
        return hessian


def factorise(
    gram: torch.Tensor,
    damping: float,
    damping_of: DampingOf,
    where: str,
    factor: torch.Tensor | None = None,
    ordering: Callable[[Curvature], torch.Tensor | None] | None = None,
) -> Factorisation:
    """Damp and factorise a second moment G [C, C].

    ``mean`` adds ``damping`` times the mean diagonal (SparseGPT), taken in the original coordinates where G is of folded inputs
    X' = D X, so that factors change no score; ``diagonal`` adds it times each own diagonal, invariant by itself. Inputs that are always
    zero take no part in the mean and are damped by it either way, so that the scale of the activations changes no mask (SparseGPT's code
    gives them a diagonal of 1). Where the Cholesky factorisation fails, the damping is raised tenfold, up to 1.

    Args:
        factor: D's diagonal [C], if G is of folded inputs.
        ordering: from the whole matrix's curvature to the order [C] of the sweep, or None for left to right.

    Raises:
        SparselineError: G holds NaN or infinity, or cannot be factorised even so.
    """
    if not torch.isfinite(gram.diagonal()).all():  # of a second moment no entry is larger than the largest on the diagonal
        raise SparselineError(f"The second moment of {where} holds NaN or infinity; check the model, or compute in float32.")
    second_moment = gram.diagonal().clamp_min(0)  # of shifted inputs it can be negative by rounding
    dead = second_moment == 0
    unit = torch.ones_like(second_moment) if factor is None else factor.square()
    mean = unit if dead.all() else (second_moment / unit)[~dead].mean() * unit
    amount = mean if damping_of == "mean" else torch.where(dead, mean, second_moment)
    while damping <= LARGEST_DAMPING:
        work = gram.clone().mT  # H, its Cholesky factor, H⁻¹ and U in turn: symmetric, and in LAPACK's order
        diagonal = work.diagonal().copy_(second_moment + damping * amount).clone()
        if cholesky_in_place(work):
            torch.cholesky_inverse(work, out=work)
            inverse_diagonal = work.diagonal().clone()
            order = None if ordering is None else ordering(Curvature(second_moment, diagonal, inverse_diagonal))
            if order is not None:
                work = work[order][:, order].mT
            if cholesky_in_place(work, upper=True) and torch.isfinite(work.diagonal()).all():
                return Factorisation(second_moment, diagonal, inverse_diagonal, work, dead, damping, order)
        damping = max(10 * damping, 1e-4)
    raise SparselineError(f"The second moment of {where} cannot be factorised even with damping 1; give more calibration rows.")


def cholesky_in_place(matrix: torch.Tensor, upper: bool = False) -> bool:
    """Put the factor of a positive definite matrix [C, C] into its place; False where there is none. Column by column in memory, nothing is copied."""
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, upper=upper, out=(matrix, info))
    return int(info) == 0


def aim(weight: torch.Tensor, away: torch.Tensor, factorisation: Factorisation, share: float) -> torch.Tensor:
    """What to prune instead of W so that Ŵ X comes near the outputs of the dense stream: W₀ = W + share·W (C − G) H⁻¹.

    With X the inputs the pruned layer will get, X_d those of the dense stream, C = E[X_d Xᵀ], G = E[X Xᵀ] and H = G + Λ, completing the square
    gives E‖Ŵ X − W (X + share·(X_d − X))‖² + ‖(Ŵ − W) Λ^½‖² = tr((Ŵ − W₀) H (Ŵ − W₀)ᵀ) + const for every Ŵ. So whatever minimises the error
    of W₀ (``sweep``, ``lsq.solve``; measured by ``layer_error`` with W₀ as the original) minimises that of the outputs, and damping
    draws to W. Share 0 is SparseGPT's own target W X, and 1 the dense stream's W X_d.

    Args:
        weight: W [R, C].
        away: C − G = E[(X_d − X) Xᵀ] [C, C], G being the one that was factorised.
        share: 0 … 1.

    Returns:
        W₀ [R, C]; W itself, to the last bit, if both streams are the same or ``share`` is 0.
    """
    order, upper = factorisation.order, factorisation.upper
    shift = weight @ away
    shift = shift @ upper.T @ upper if order is None else _restored(shift[:, order] @ upper.T @ upper, order)
    return shift.mul_(share).add_(weight)


def choose(scores: torch.Tensor, *, kept: int, pattern: Pattern, group: Group, block: int) -> torch.Tensor:
    """The mask [R, C] of the ``kept`` best scores [R, C], compared as the pattern or, if it is unstructured, the group says."""
    if pattern.m:
        return select_n_of_m(scores, kept * pattern.m // scores.numel(), pattern.m)
    return select(scores, kept, group, block)


def column_losses(
    weight: torch.Tensor,
    curvature: Curvature,
    *,
    kept: int,
    score: Score,
    pattern: Pattern,
    group: Group,
    block: int,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """What each column [C] will probably cost: w²/[H⁻¹]_mm, summed over the weights that would go if the mask were chosen now.

    ROSE (2603.05878) chooses and adds up |w|·‖X_m‖ in every column block; here the variant's own score chooses within its own group, and
    the sum is of what OBS says removing a weight costs. Always-zero inputs cost nothing.

    Args:
        weight: [R, C].
        curvature: of the whole matrix.
        kept: how many weights stay.
        importance: selection weights u > 0 [C]; scores are multiplied by u².
    """
    weight = weight.masked_fill(curvature.second_moment == 0, 0)
    scores = saliency(score, weight, curvature)
    scores = scores if importance is None else scores * importance.square()
    mask = choose(scores, kept=kept, pattern=pattern, group=group, block=block)
    return saliency("obs", weight, curvature).masked_fill_(mask, 0).sum(0)


def rose_order(column_loss: torch.Tensor, block: int, m: int, least_range: float) -> torch.Tensor | None:
    """ROSE's order of a site's columns [C]: those that will cost most first, while many columns are left to make up for them.

    Two levels (2603.05878): column blocks by descending loss, and in each of them its columns by descending loss; ties from left to right.
    For N:M it is the groups of M that are ordered in each block, and each moves as one. None, for left to right, where the site is not
    columnar: the relative range (max − min)/max of the block losses is below ``least_range`` (0.5 in the authors' code; 0 always orders).
    A block's loss is its mean over columns, which ranks as the paper's sum and lets a short last block be compared.

    Args:
        column_loss: [C], of one matrix or summed over those that share the site.
        block: width of the column blocks; rounded up to whole groups of M.
        m: M of the pattern, 0 for unstructured.
    """
    unit = m or 1
    block = -(-block // unit) * unit
    columns = torch.arange(len(column_loss), device=column_loss.device)
    blocks = column_loss.split(block)
    losses = torch.stack([part.mean() for part in blocks])
    if losses.max() - losses.min() < least_range * losses.max():
        return None
    inside = [
        part.view(-1, unit)[loss.view(-1, unit).sum(1).argsort(descending=True, stable=True)].flatten()
        for part, loss in zip(columns.split(block), blocks, strict=True)
    ]
    return torch.cat([inside[i] for i in losses.argsort(descending=True, stable=True).tolist()])


def sweep(
    weight: torch.Tensor,
    factorisation: Factorisation,
    *,
    kept: int,
    score: Score,
    pattern: Pattern,
    group: Group,
    block: int,
    importance: torch.Tensor | None = None,
    grid: Grid | None = None,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Prune columns in order and let the columns still to come make up for each error (2310.09499, Eq. 3).

    With group ``block`` (and for N:M) the mask of each column block (group of M) is chosen from the weights as compensated so
    far and from U_mm²; with ``row`` and ``matrix`` it is chosen beforehand from the whole matrix. Blocks and groups are those of the
    matrix's own columns, whatever the factorisation's order.

    Args:
        weight: [R, C]: W in any dtype, or what ``aim`` makes of it.
        kept: how many weights stay.
        importance: selection weights u > 0 [C]; scores are multiplied by u².
        grid: filled on the way: what stays of a column is rounded to it, and the columns still to come make up for that, too.

    Returns:
        The compensated weight [R, C], exactly zero outside the mask; the mask [R, C]; and its error tr((W − Ŵ) H (W − Ŵ)ᵀ), which is what
        the single steps add up to (W without its columns of always-zero inputs).

    Raises:
        ValueError: the order does not keep the column blocks together.
    """
    order = factorisation.order
    weight = weight.to(factorisation.upper.dtype, copy=True)
    weight[:, factorisation.dead] = 0
    curvature = factorisation.trailing()
    emphasis = torch.ones_like(curvature.diagonal) if importance is None else importance.square()
    mask = torch.ones_like(weight, dtype=torch.bool)  # what is not chosen yet counts as kept
    kept_of_m = kept * pattern.m // weight.numel() if pattern.m else 0
    if pattern.m:
        block = -(-block // pattern.m) * pattern.m  # groups of M lie within one column block
    elif group != "block":
        mask = select(saliency(score, weight, factorisation.whole()) * emphasis, kept, group, block)
    if order is not None:
        weight, mask, emphasis = weight[:, order], mask[:, order], emphasis[order]
        _runs(order, pattern.m or 1)

    def reach(column: int) -> None:
        """Choose the mask of the group of M that starts here."""
        if pattern.m and column % pattern.m == 0:
            ahead = slice(column, column + pattern.m)
            scores = saliency(score, weight[:, ahead], curvature.columns(column, column + pattern.m)) * emphasis[ahead]
            mask[:, ahead] = select_n_of_m(scores, kept_of_m, pattern.m)

    rounding, lost = None if grid is None else _Rounding(grid, order), 0.0
    for start, stop, quota in _blocks(kept, weight.shape, block, order):
        if not pattern.m and group == "block":
            scores = saliency(score, weight[:, start:stop], curvature.columns(start, stop)) * emphasis[start:stop]
            mask[:, start:stop] = select(scores, quota, "matrix", block)
        lost += _eliminate(weight, mask, factorisation, start, stop, reach, rounding)
    return (weight, mask, lost) if order is None else (_restored(weight, order), _restored(mask, order), lost)


def quantise(weight: torch.Tensor, mask: torch.Tensor, factorisation: Factorisation, grid: Grid, block: int) -> torch.Tensor:
    """Put weights on a grid column by column on a mask that is given, and let the columns still to come make up for each error (2210.17323, Eqs. 2–3).

    What a column to come gets though it is pruned is passed on when it is reached.

    Args:
        weight: [R, C] float32; what it holds off the mask is pruned on the way.
        mask: [R, C] bool, True = kept.
        grid: filled on the way.
        block: columns that are updated at once; changes nothing but rounding.

    Returns:
        The quantised weight [R, C], exactly zero outside the mask.
    """
    order, weight, columns = factorisation.order, weight.masked_fill(factorisation.dead, 0), weight.shape[1]
    if order is not None:
        weight, mask = weight[:, order], mask[:, order]
    rounding = _Rounding(grid, order)
    for start in range(0, columns, block):
        _eliminate(weight, mask, factorisation, start, min(start + block, columns), lambda _: None, rounding)
    return weight if order is None else _restored(weight, order)


def _eliminate(
    weight: torch.Tensor,
    mask: torch.Tensor,
    factorisation: Factorisation,
    start: int,
    stop: int,
    reach: Callable[[int], None],
    rounding: "_Rounding | None",
) -> float:
    """Columns ``start`` … ``stop`` of weight and mask [R, C], both in the sweep's order, in place; all columns to the right are updated.

    Returns what that costs: Σ (w − ŵ)²/U_mm².

    Args:
        reach: called before each column.
    """
    part, chosen, upper = weight[:, start:stop], mask[:, start:stop], factorisation.upper[start:stop, start:stop]
    errors = torch.zeros_like(part)
    for j in range(stop - start):
        reach(start + j)
        error = part[:, j].masked_fill(chosen[:, j], 0)
        if rounding is not None:
            grid, group = rounding.grid, rounding.groups[start + j]
            if (ahead := rounding.starts.get(start + j)) is not None:
                current = _as_compensated(weight, factorisation.upper, errors[:, :j], start, stop, ahead)
                grid.fit(group, current.masked_fill_(~mask[:, ahead], 0))
            rounded = grid.round(part[:, j : j + 1].masked_fill(~chosen[:, j : j + 1], 0), group)[:, 0]
            error = part[:, j] - rounded
            part[:, j] = rounded
        error = error / upper[j, j]
        part[:, j + 1 :].addr_(error, upper[j, j + 1 :], alpha=-1)
        errors[:, j] = error
    part.masked_fill_(~chosen, 0)
    if stop < weight.shape[1]:
        weight[:, stop:].addmm_(errors, factorisation.upper[start:stop, stop:], alpha=-1)
    return float(errors.square().sum(dtype=torch.float64))


class _Rounding:
    """A grid as the sweep meets it: the group of every column, and where a group starts, all of its columns."""

    def __init__(self, grid: Grid, order: torch.Tensor | None) -> None:
        columns = torch.arange(grid.shape[1]) if order is None else order.cpu()
        self.grid = grid
        self.groups: list[int] = (columns // grid.width).tolist()
        members: dict[int, list[int]] = {}
        for column, group in enumerate(self.groups):
            members.setdefault(group, []).append(column)
        self.starts = {found[0]: torch.tensor(found, device=grid.scale.device) for found in members.values()}


def _as_compensated(
    weight: torch.Tensor, upper: torch.Tensor, errors: torch.Tensor, start: int, stop: int, columns: torch.Tensor
) -> torch.Tensor:
    """Columns [R, n] still to come with all compensation so far: those from ``stop`` on have not got that of ``errors`` [R, j], from ``start`` on."""
    found = weight[:, columns]
    late = columns >= stop
    if late.any():
        found[:, late] -= errors @ upper[start : start + errors.shape[1], columns[late]]
    return found


def _blocks(kept: int, shape: torch.Size, block: int, order: torch.Tensor | None) -> list[tuple[int, int, int]]:
    """The column blocks as the sweep meets them: where each starts and stops, and how many weights it keeps, in proportion to its size."""
    rows, columns = shape
    widths = [min(block, columns - start) for start in range(0, columns, block)]
    quotas = shares(kept, [rows * width for width in widths])
    met = range(len(widths)) if order is None else _runs(order, block)
    stops = accumulate(widths[i] for i in met)
    return [(stop - widths[i], stop, quotas[i]) for i, stop in zip(met, stops, strict=True)]


def _runs(order: torch.Tensor, width: int) -> list[int]:
    """Which ``width`` consecutive columns come one after the other in an order that keeps them together."""
    runs: list[int] = (order // width).unique_consecutive().tolist()
    if len(runs) != -(-len(order) // width):
        raise ValueError(f"the order of the columns tears apart {width} that belong together")
    return runs


def _restored(permuted: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Columns in ``order``, back in their own."""
    restored = torch.empty_like(permuted)
    restored[:, order] = permuted
    return restored


def squared_error(original: torch.Tensor, pruned: torch.Tensor | None, moment: torch.Tensor) -> float:
    """tr((W − Ŵ) G (W − Ŵ)ᵀ) from the second moment G [C, C], or any other; without Ŵ of W itself. A few rows at a time bound the memory."""
    total = 0.0
    for first in range(0, len(original), 256):
        difference = original[first : first + 256]
        if pruned is not None:
            difference = difference - pruned[first : first + 256]
        difference = difference.to(moment.dtype)
        total += float(torch.linalg.vecdot(difference @ moment, difference).sum(dtype=torch.float64))
    return total


def layer_error(original: torch.Tensor, pruned: torch.Tensor, gram: torch.Tensor) -> float:
    """E‖(W − Ŵ) X‖² / E‖W X‖² from the second moment G [C, C]; W is ``original``, or the target W₀ of ``aim``."""
    return squared_error(original, pruned, gram) / max(squared_error(original, None, gram), 1e-30)
