"""The OBS column sweep of SparseGPT (2301.00774), with any score of 2310.09499 choosing the mask on the way."""

from dataclasses import dataclass
from typing import Literal

import torch

from pipeline_lib.allocation.budget import shares
from pipeline_lib.errors import SparselineError
from pipeline_lib.pruning.patterns import Group, Pattern, select, select_n_of_m
from pipeline_lib.pruning.scores import Curvature, Score, saliency

DampingOf = Literal["mean", "diagonal"]
LARGEST_DAMPING = 1.0


@dataclass(frozen=True)
class Factorisation:
    """H = G + damping of a site, factorised once for all matrices that share it.

    ``upper`` is U [C, C], upper triangular with H⁻¹ = Uᵀ U: U_mm² is [H⁻¹]_mm of the trailing submatrix from m on.
    """

    second_moment: torch.Tensor  # G_mm [C]
    diagonal: torch.Tensor  # H_mm [C]
    inverse_diagonal: torch.Tensor  # [H⁻¹]_mm [C]
    upper: torch.Tensor
    dead: torch.Tensor  # [C] inputs that were always zero
    damping: float  # the one that was needed

    def whole(self) -> Curvature:
        """For scores of the whole matrix at once."""
        return Curvature(self.second_moment, self.diagonal, self.inverse_diagonal)

    def trailing(self) -> Curvature:
        """For scores inside the sweep."""
        return Curvature(self.second_moment, self.diagonal, self.upper.diagonal().square())


def factorise(gram: torch.Tensor, damping: float, damping_of: DampingOf, where: str, factor: torch.Tensor | None = None) -> Factorisation:
    """Damp and factorise a second moment G [C, C].

    ``mean`` adds ``damping`` times the mean diagonal (SparseGPT), taken in the original coordinates where G is of folded inputs
    X' = D X, so that factors change no score; ``diagonal`` adds it times each own diagonal, invariant by itself. Where the Cholesky factorisation fails, the damping is raised tenfold, up to 1.

    Args:
        factor: D's diagonal [C], if G is of folded inputs.

    Raises:
        SparselineError: G holds NaN or infinity, or cannot be factorised even so.
    """
    if not torch.isfinite(gram).all():
        raise SparselineError(f"The second moment of {where} holds NaN or infinity; check the model, or compute in float32.")
    second_moment = gram.diagonal().clone()
    dead = second_moment == 0
    unit = torch.ones_like(second_moment) if factor is None else factor.square()
    base = torch.where(dead, unit, second_moment)
    amount = (base / unit).mean() * unit if damping_of == "mean" else base
    while damping <= LARGEST_DAMPING:
        hessian = gram.clone()
        hessian.diagonal().copy_(base + damping * amount)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if failed == 0:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if failed == 0 and torch.isfinite(upper).all():
                return Factorisation(second_moment, hessian.diagonal().clone(), inverse.diagonal().clone(), upper, dead, damping)
        damping = max(10 * damping, 1e-4)
    raise SparselineError(f"The second moment of {where} cannot be factorised even with damping 1; give more calibration rows.")


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune columns in order and let the columns to their right make up for each error (2310.09499, Eq. 3).

    With group ``block`` (and for N:M) the mask of each column block (group of M) is chosen from the weights as compensated so
    far and from U_mm²; with ``row`` and ``matrix`` it is chosen beforehand from the whole matrix.

    Args:
        weight: [R, C] float32.
        kept: how many weights stay.
        importance: selection weights u > 0 [C]; scores are multiplied by u².

    Returns:
        The compensated weight [R, C], exactly zero outside the mask, and the mask [R, C].
    """
    weight = weight.clone()
    weight[:, factorisation.dead] = 0
    columns = weight.shape[1]
    curvature = factorisation.trailing()
    emphasis = torch.ones_like(curvature.diagonal) if importance is None else importance.square()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    kept_of_m = kept * pattern.m // weight.numel() if pattern.m else 0
    if pattern.m:
        block = -(-block // pattern.m) * pattern.m  # groups of M lie within one column block
    elif group != "block":
        mask = select(saliency(score, weight, factorisation.whole()) * emphasis, kept, group, block)
    starts = range(0, columns, block)
    quotas = _quotas(kept, weight.shape, block)
    for start, quota in zip(starts, quotas, strict=True):
        stop = min(start + block, columns)
        part, chosen = weight[:, start:stop], mask[:, start:stop]
        upper = factorisation.upper[start:stop, start:stop]
        local = curvature.columns(start, stop)
        if not pattern.m and group == "block":
            chosen.copy_(select(saliency(score, part, local) * emphasis[start:stop], quota, "matrix", block))
        errors = torch.zeros_like(part)
        for j in range(stop - start):
            if pattern.m and j % pattern.m == 0:
                ahead = slice(j, j + pattern.m)
                scores = saliency(score, part[:, ahead], local.columns(j, j + pattern.m)) * emphasis[start + j : start + j + pattern.m]
                chosen[:, ahead] = select_n_of_m(scores, kept_of_m, pattern.m)
            error = part[:, j].masked_fill(chosen[:, j], 0) / upper[j, j]
            part[:, j + 1 :].addr_(error, upper[j, j + 1 :], alpha=-1)
            errors[:, j] = error
        part.masked_fill_(~chosen, 0)
        if stop < columns:
            weight[:, stop:].addmm_(errors, factorisation.upper[start:stop, stop:], alpha=-1)
    return weight, mask


def _quotas(kept: int, shape: torch.Size, block: int) -> list[int]:
    return shares(kept, [shape[0] * min(block, shape[1] - start) for start in range(0, shape[1], block)])


def layer_error(original: torch.Tensor, pruned: torch.Tensor, gram: torch.Tensor) -> float:
    """E‖(W − Ŵ) X‖² / E‖W X‖² from the second moment G [C, C]."""
    difference = (original - pruned).float()
    own = original.float()
    return float(((difference @ gram) * difference).sum() / ((own @ gram) * own).sum().clamp_min(1e-30))
