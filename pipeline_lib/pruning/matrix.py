"""Prune one logical matrix by a variant's own score, pattern, group and damping; with OBS compensation and on a grid if asked to."""

import torch

from pipeline_lib.pruning.scores import saliency
from pipeline_lib.pruning.settings import SelectionParams
from pipeline_lib.quantization.grid import Grid
from pipeline_lib.reconstruction.obs import Factorisation, choose, quantise, sweep


def prune_matrix(
    weight: torch.Tensor,
    factorisation: Factorisation,
    kept: int,
    selection: SelectionParams,
    compensate: bool,
    importance: torch.Tensor | None = None,
    grid: Grid | None = None,
) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    """The pruned weight [R, C] in float32, zero outside the mask; the mask [R, C]; and what ``sweep`` tells of its error, if it swept.

    Args:
        weight: [R, C].
        factorisation: of the second moment of its inputs.
        kept: how many weights stay.
        importance: selection weights u > 0 [C]; scores are multiplied by u².
        grid: filled with what is left, in the same sweep or, without compensation, by rounding to nearest.
    """
    if compensate:
        return sweep(
            weight,
            factorisation,
            kept=kept,
            score=selection.score,
            pattern=selection.shape,
            group=selection.group,
            block=selection.block,
            importance=importance,
            grid=grid,
        )
    weight = weight.to(factorisation.upper.dtype)
    scores = saliency(selection.score, weight, factorisation.whole())
    mask = chosen(scores if importance is None else scores * importance.square(), kept, selection)
    left = weight.masked_fill(~mask, 0)
    return (left if grid is None else grid.nearest(left)), mask, None


def quantise_matrix(
    weight: torch.Tensor, mask: torch.Tensor, factorisation: Factorisation, grid: Grid, block: int, compensate: bool
) -> torch.Tensor:
    """The weight [R, C] on the grid, zero outside the mask [R, C]; with OBS compensation or by rounding to nearest."""
    if compensate:
        return quantise(weight, mask, factorisation, grid, block)
    return grid.nearest(weight.masked_fill(~mask, 0))


def chosen(scores: torch.Tensor, kept: int, selection: SelectionParams) -> torch.Tensor:
    """The mask [R, C] of the best scores [R, C] by the variant's pattern and comparison group."""
    return choose(scores, kept=kept, pattern=selection.shape, group=selection.group, block=selection.block)
