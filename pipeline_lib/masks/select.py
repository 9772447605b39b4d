"""Turn scores into masks with an exact number of kept weights; positions break ties. Masks are
bool, True = kept.

NaN is never kept, so a mask of scores with NaN has too few True.
"""

from typing import Any

import numpy as np
import torch

from pipeline_lib.core.counts import shares
from pipeline_lib.masks.settings import Group

SAMPLED = 4096  # for more values, a sample speeds up the search for the value at a place
FEW = 8  # in groups of at most so many scores, comparing every pair is faster than a partition


def _thresholds(scores: torch.Tensor, ranks: list[int]) -> list[torch.Tensor]:
    """For each rank k ≥ 1, every row's k-th largest score [g]. A partition finds them without sorting."""
    columns = scores.shape[1]
    if scores.device.type == "cpu":
        places = [columns - rank for rank in ranks]
        if len(scores) == len(places) == 1 and columns > SAMPLED:
            return [torch.from_numpy(_smallest(scores[0].detach().numpy(), places[0]))]
        parted = np.partition(scores.detach().numpy(), places, axis=1)
        return [torch.from_numpy(parted[:, place].copy()) for place in places]
    return [scores.kthvalue(columns - rank + 1, dim=1).values for rank in ranks]


def _smallest(values: np.ndarray, place: int) -> np.ndarray:
    """The value [1] at this place of the sorted values [n]. A sample shows two values between which
    it most probably lies, so that only the values between them are partitioned.
    """
    sample = np.sort(values[:: SAMPLED // 256])
    middle, margin = place * len(sample) // len(values), 2 * int(len(sample) ** 0.5)
    low, high = sample[max(middle - margin, 0)], sample[min(middle + margin, len(sample) - 1)]
    near = values[(values >= low) & (values <= high)]
    rank = place - np.count_nonzero(values < low)
    if not 0 <= rank < len(near):  # also where the sample holds NaN
        return np.partition(values, place)[place : place + 1].copy()
    return np.partition(near, rank)[rank : rank + 1].copy()


def _above(scores: torch.Tensor, threshold: torch.Tensor, kept: int) -> torch.Tensor:
    """The mask of the ``kept`` scores of each row of [g, c] at or above its threshold [g, 1]. Of
    scores at the threshold, the first ones are kept.
    """
    if scores.device.type == "cpu":
        mask = scores >= threshold
        crowded = np.flatnonzero(np.count_nonzero(mask.numpy(), axis=1) > kept)
        if len(crowded):
            mask[crowded] = _first(scores[crowded], threshold[crowded], kept)
        return mask
    # asking a GPU whether there are ties takes longer than breaking them
    return _first(scores, threshold, kept)


def _first(scores: torch.Tensor, threshold: torch.Tensor, kept: int) -> torch.Tensor:
    above, level = scores > threshold, scores == threshold
    return above | (level & (level.cumsum(1, dtype=torch.int32) <= kept - above.sum(1, keepdim=True)))


def _best(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """In each row of scores [g, c], keep the ``kept`` largest; among equal ones the first."""
    if not kept:
        return torch.zeros_like(scores, dtype=torch.bool)
    (threshold,) = _thresholds(scores, [kept])
    return _above(scores, threshold[:, None], kept)


def bounds(scores: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``_best`` for 0 < kept < c in every row of scores [g, c], and the midpoints between kept and
    pruned scores [g, 1], both from one partition.
    """
    low, high = _thresholds(scores, [kept, kept + 1])
    return _above(scores, low[:, None], kept), ((low + high) / 2)[:, None]


def n_best(scores: torch.Tensor, n: int) -> torch.Tensor:
    """The mask of the n best of M scores along the first axis [M, g]; among equal ones the first."""
    return _best_of_few(scores, n) if len(scores) <= FEW else _best(scores.T, n).T


def _best_of_few(scores: torch.Tensor, n: int) -> torch.Tensor:
    """``n_best`` without sorting: every pair is compared."""
    few, library = _fast(scores)
    # how many scores rank before each
    better = library.zeros(few.shape, dtype=library.int8, device=few.device)
    for i in range(len(few) - 1):
        ahead = few[i] >= few[i + 1 :]
        better[i + 1 :] += ahead
        better[i] += len(ahead) - ahead.sum(0, dtype=library.int8)
    return torch.as_tensor((better < n) & (few == few))


def _fast(tensor: torch.Tensor) -> tuple[Any, Any]:
    """On a CPU, numpy's view of the tensor and numpy, whose calls cost a third of torch's.
    Otherwise the tensor itself and torch. Both libraries follow one standard.
    """
    return (tensor.detach().numpy(), np) if tensor.device.type == "cpu" else (tensor, torch)


def select_n_of_m(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Keep the n best of every m consecutive columns of scores [R, C]."""
    return n_best(scores.reshape(-1, m).T.contiguous(), n).T.reshape(scores.shape)


def select(scores: torch.Tensor, kept: int, group: Group, block: int) -> torch.Tensor:
    """A mask with exactly ``kept`` True, compared within rows, the whole matrix, or column blocks of
    width ``block``.

    Every row (column block) gets its proportional share. The first rows get the remainder: if
    scores were compared across rows, the mask would depend on the scale of each output.
    """
    if group == "matrix":
        return _best(scores.reshape(1, -1), kept).reshape(scores.shape)
    if group == "block":
        parts = scores.split(block, dim=1)
        quotas = shares(kept, [part.numel() for part in parts])
        return torch.cat(
            [select(part, quota, "matrix", block) for part, quota in zip(parts, quotas, strict=True)], dim=1
        )
    share, spare = divmod(kept, len(scores))
    return torch.cat(
        [
            _best(part, count)
            for part, count in ((scores[:spare], share + 1), (scores[spare:], share))
            if len(part)
        ]
    )
