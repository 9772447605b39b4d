"""From scores to masks: which weights stay, exactly as many as asked, ties broken by position. Masks are bool, True = kept."""

import re
from dataclasses import dataclass
from typing import Literal

import torch

from pipeline_lib.allocation.budget import shares
from pipeline_lib.errors import SparselineError

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


def _best(scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """In each row of scores [g, c], keep the ``kept[g]`` largest."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order))
    return rank < kept.to(scores.device)[:, None]


def select_n_of_m(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Keep the n best of every m consecutive columns of scores [R, C]."""
    groups = scores.reshape(-1, m)
    return _best(groups, torch.full((len(groups),), n)).reshape(scores.shape)


def select(scores: torch.Tensor, kept: int, group: Group, block: int) -> torch.Tensor:
    """A mask with exactly ``kept`` True, compared within rows, the whole matrix, or column blocks of width ``block``.

    Every row (column block) gets its proportional share; among rows, the spare ones go where the next-best score is largest.
    """
    rows = len(scores)
    if group == "matrix":
        return _best(scores.reshape(1, -1), torch.tensor([kept])).reshape(scores.shape)
    if group == "block":
        parts = scores.split(block, dim=1)
        quotas = shares(kept, [part.numel() for part in parts])
        return torch.cat([select(part, quota, "matrix", block) for part, quota in zip(parts, quotas, strict=True)], dim=1)
    base, spare = divmod(kept, rows)
    quota = torch.full((rows,), base)
    if spare:
        marginal = scores.sort(dim=1, descending=True, stable=True).values[:, base]
        quota[marginal.argsort(descending=True, stable=True)[:spare].cpu()] += 1
    return _best(scores, quota)
