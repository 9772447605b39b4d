"""Prune one logical matrix by a variant's own score, pattern, group and damping; with OBS compensation if asked to."""

import torch

from pipeline_lib.pruning.patterns import select, select_n_of_m
from pipeline_lib.pruning.scores import saliency
from pipeline_lib.pruning.settings import SelectionParams
from pipeline_lib.reconstruction.obs import Factorisation, sweep


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
    pattern = selection.shape
    if compensate:
        return sweep(
            weight,
            factorisation,
            kept=kept,
            score=selection.score,
            pattern=pattern,
            group=selection.group,
            block=selection.block,
            importance=importance,
        )
    scores = saliency(selection.score, weight, factorisation.whole())
    scores = scores if importance is None else scores * importance.square()
    if pattern.m:
        mask = select_n_of_m(scores, kept * pattern.m // weight.numel(), pattern.m)
    else:
        mask = select(scores, kept, selection.group, selection.block)
    return weight.masked_fill(~mask, 0), mask
