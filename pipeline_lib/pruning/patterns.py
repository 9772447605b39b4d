"""From scores to masks: which weights stay, exactly as many as asked, ties broken by position. Masks are bool, True = kept."""

import re
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from pipeline_lib.allocation.budget import shares
from pipeline_lib.core.errors import SparselineError

Group = Literal["row", "matrix", "block"]


@dataclass(frozen=True)
class Pattern:
    """``unstructured``, or N:M: N kept of every M consecutive inputs of an output. ``m`` is 0 for unstructured."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Raises ValueError for anything but ``unstructured`` and ``N:M`` with 0 < N < M."""
        if text == "unstructured":
            return cls(0, 0)
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None or not 0 < int(match[1]) < int(match[2]):
            raise ValueError(f'a pattern is unstructured or "N:M" (N kept of M, quoted) with 0 < N < M, not {text!r}')
        return cls(int(match[1]), int(match[2]))

    def quantum(self, name: str, shape: tuple[int, int]) -> int:
        """The smallest step of a matrix's kept count.

        Raises:
            SparselineError: M does not divide the matrix's inputs.
        """
        if self.m == 0:
            return 1
        if shape[1] % self.m:
            raise SparselineError(
                f"Pattern {self.n}:{self.m} does not divide the {shape[1]} inputs of {name}; choose another M, or exclude it (model.exclude)."
            )
        return shape[0] * shape[1] // self.m


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


def pack(mask: torch.Tensor) -> torch.Tensor:
    """A bool mask as bits, row-major, first entry in the highest bit; 1 = kept."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


class BitMasks(MutableMapping[str, torch.Tensor]):
    """Masks by name, an eighth of their size in memory: what is looked up is a copy, to be put back where it has changed."""

    def __init__(self) -> None:
        self.bits: dict[str, tuple[torch.Tensor, torch.Size]] = {}  # packed, and shape

    def __getitem__(self, name: str) -> torch.Tensor:
        bits, shape = self.bits[name]
        return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel()).view(bool)).reshape(shape)

    def __setitem__(self, name: str, mask: torch.Tensor) -> None:
        self.bits[name] = pack(mask), mask.shape

    def __delitem__(self, name: str) -> None:
        del self.bits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.bits)

    def __len__(self) -> int:
        return len(self.bits)
