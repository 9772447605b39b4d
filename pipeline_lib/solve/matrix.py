"""Prune one logical matrix by its rule, optionally with OBS compensation and on a grid."""

import torch

from pipeline_lib.masks.rule import Rule
from pipeline_lib.solve.factor import Factorisation
from pipeline_lib.solve.grid import Grid
from pipeline_lib.solve.sweep import quantise, sweep


def prune_matrix(
    weight: torch.Tensor,
    factorisation: Factorisation,
    kept: int,
    rule: Rule,
    compensate: bool,
    grid: Grid | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The pruned weight [R, C] in float32, zero outside the mask; the mask [R, C]; and the error that
    ``sweep`` returns, or None without compensation.

    Args:
        weight: [R, C].
        factorisation: factorised second moment of the matrix's inputs.
        kept: number of kept weights.
        grid: grid for the kept weights, filled in the same sweep or, without compensation, by rounding
            to nearest.
    """
    if compensate:
        return sweep(weight, factorisation, kept, rule, grid)
    weight = weight.to(factorisation.upper.dtype)
    mask = rule.mask(rule.scores(weight, factorisation.whole()), kept)
    left = weight.masked_fill(~mask, 0)
    return (left if grid is None else grid.nearest(left)), mask, None


def quantise_matrix(
    weight: torch.Tensor,
    mask: torch.Tensor,
    factorisation: Factorisation,
    grid: Grid,
    block: int,
    compensate: bool,
) -> torch.Tensor:
    """The weight [R, C] on the grid, zero outside the mask [R, C]. It is quantised with OBS
    compensation, or else by rounding to nearest.
    """
    if compensate:
        return quantise(weight, mask, factorisation, grid, block)
    return grid.nearest(weight.masked_fill(~mask, 0))
