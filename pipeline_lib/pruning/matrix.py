"""Prune one logical matrix by a variant's own score, pattern, group and damping; with OBS compensation if asked to."""

import torch

from pipeline_lib.pruning.scores import saliency
from pipeline_lib.pruning.settings import SelectionParams
from pipeline_lib.reconstruction.obs import Factorisation, choose, sweep


def prune_matrix(
    weight: torch.Tensor,
    factorisation: Factorisation,
    kept: int,
    selection: SelectionParams,
    compensate: bool,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pruned weight [R, C], zero outside the mask, and the mask [R, C].

    Args:
        weight: [R, C] float32.
        factorisation: of the second moment of its inputs.
        kept: how many weights stay.
        importance: selection weights u > 0 [C]; scores are multiplied by u².
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
        )
    scores = saliency(selection.score, weight, factorisation.whole())
    mask = chosen(scores if importance is None else scores * importance.square(), kept, selection)
    return weight.masked_fill(~mask, 0), mask


def chosen(scores: torch.Tensor, kept: int, selection: SelectionParams) -> torch.Tensor:
    """The mask [R, C] of the best scores [R, C] by the variant's pattern and comparison group."""
    return choose(scores, kept=kept, pattern=selection.shape, group=selection.group, block=selection.block)
