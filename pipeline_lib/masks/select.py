"""From scores to masks: which weights stay, exactly as many as asked, ties broken by position. Masks are bool, True = kept."""

import numpy as np
import torch

from pipeline_lib.core.counts import shares
from pipeline_lib.masks.settings import Group


def _thresholds(scores: torch.Tensor, ranks: list[int]) -> list[torch.Tensor]:
    """For each rank k ≥ 1, every row's k-th largest score [g]. A partition finds them without sorting."""
    columns = scores.shape[1]
    if scores.device.type == "cpu":
        places = [columns - rank for rank in ranks]
        parted = np.partition(scores.detach().numpy(), places, axis=1)
        return [torch.from_numpy(parted[:, place].copy()) for place in places]
    return [scores.kthvalue(columns - rank + 1, dim=1).values for rank in ranks]


def _best(scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """In each row of scores [g, c], keep the ``kept`` [g] (or [1], for all) largest; among equal ones the first."""
    kept = kept.to(scores.device)
    ranks = sorted({rank for rank in kept.tolist() if rank > 0})
    threshold = torch.full((len(scores),), float("inf"), device=scores.device)
    for rank, values in zip(ranks, _thresholds(scores, ranks) if ranks else [], strict=True):
        threshold = torch.where(kept == rank, values, threshold)
    mask = scores >= threshold[:, None]
    crowded = (mask.count_nonzero(1) > kept).nonzero().flatten()  # ties at the threshold: the first ones stay
    if len(crowded):
        part, limit = scores[crowded], threshold[crowded, None]
        above, level = part > limit, part == limit
        mask[crowded] = above | (level & (level.cumsum(1) <= (kept.expand(len(scores))[crowded] - above.sum(1))[:, None]))
    return mask


def bounds(scores: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``_best`` with the same count 0 < kept < c in every row of scores [g, c]; and midway between kept and pruned [g, 1], all from one partition."""
    low, high = _thresholds(scores, [kept, kept + 1])
    tied = bool((low == high).any())
    mask = _best(scores, torch.tensor([kept])) if tied else scores >= low[:, None]
    return mask, ((low + high) / 2)[:, None]


def select_n_of_m(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Keep the n best of every m consecutive columns of scores [R, C]."""
    groups = scores.reshape(-1, m)
    return _best(groups, torch.tensor([n])).reshape(scores.shape)


def select(scores: torch.Tensor, kept: int, group: Group, block: int) -> torch.Tensor:
    """A mask with exactly ``kept`` True, compared within rows, the whole matrix, or column blocks of width ``block``.

    Every row (column block) gets its proportional share; the spare ones go to the first rows, since comparing scores across rows would
    make the mask depend on how each output happens to be scaled.
    """
    if group == "matrix":
        return _best(scores.reshape(1, -1), torch.tensor([kept])).reshape(scores.shape)
    if group == "block":
        parts = scores.split(block, dim=1)
        quotas = shares(kept, [part.numel() for part in parts])
        return torch.cat([select(part, quota, "matrix", block) for part, quota in zip(parts, quotas, strict=True)], dim=1)
    share, spare = divmod(kept, len(scores))
    return _best(scores, share + (torch.arange(len(scores)) < spare).long())
