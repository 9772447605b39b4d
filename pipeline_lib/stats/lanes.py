"""Lanes: the order of sums over calibration samples, which depends on the samples alone.

Samples are divided into four lanes by their numbers. A sum runs sample by sample within a lane, and
then over the lanes in order. Neither the batches nor the worker that adds up a lane change a bit. A
batch has samples of one lane only, because another batch may round differently. If several
processes run the stage (``core/ranks.py``), each has whole lanes.
"""

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch

from pipeline_lib.core import ranks

LANES = 4
T = TypeVar("T")


@dataclass(frozen=True)
class Dealt:
    """Samples in batches, lane by lane."""

    sizes: list[int]  # rows of each batch
    lanes: list[list[int]]  # for each lane, its batches' numbers
    leading: list[list[int]]  # of these, the batches of the first samples, without ``more``

    @property
    def own(self) -> list[int]:
        """The numbers of the batches that this process has."""
        return [number for lane in own_lanes() for number in self.lanes[lane]]


class Sums(dict[str, T]):
    """Named sums, to which terms are added one by one."""

    def __iadd__(self, other: "Sums[T]") -> "Sums[T]":
        for name in self:
            mine: Any = self[name]
            mine += other.pop(name)
            self[name] = mine
        return self


def own_lanes() -> range:
    """The lanes of this process: consecutive ones."""
    return ranks.part(LANES)


def share(tokens: int) -> int:
    """Number of the tokens that this process has, approximately."""
    return -(-tokens * len(own_lanes()) // LANES)


def parts(rows: int) -> list[slice]:
    """The samples of each lane: consecutive ones, a quarter each, rounded. With fewer samples than
    lanes, some lanes are empty.
    """
    borders = [-(-rows * lane // LANES) for lane in range(LANES + 1)]
    return [slice(first, last) for first, last in pairwise(borders)]


def deal(rows: int, batch_rows: int, first: int = 0, more: int = 0) -> Dealt:
    """Samples in batches of ``batch_rows``, or the rest of a lane; numbers count from ``first``.

    Args:
        more: further samples, a multiple of four, each lane's after its own (``together``). They have
            batches of their own.
    """
    sizes: list[int] = []
    lanes, leading = [], []
    for part, further in zip(parts(rows), parts(more), strict=True):
        own, others = (
            [min(batch_rows, one.stop - start) for start in range(one.start, one.stop, batch_rows)]
            for one in (part, further)
        )
        numbers = [first + len(sizes) + number for number in range(len(own) + len(others))]
        lanes.append(numbers)
        leading.append(numbers[: len(own)])
        sizes += own + others
    return Dealt(sizes, lanes, leading)


def together(rows: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """Samples [N, T] and [M, T] in one tensor [N + M, T], lane by lane."""
    lanes = zip(parts(len(rows)), parts(len(more)), strict=True)
    return torch.cat([part for own, others in lanes for part in (rows[own], more[others])])


def fold(lanes: Iterable[T]) -> T:
    """The sum 0 + 1 + 2 + 3 of the lanes. Each lane is requested after the ones before it are
    summed, and is added to them in place.

    Raises:
        ValueError: there is none.
    """
    whole: Any = None
    for lane in lanes:
        if whole is None:
            whole = lane
        else:
            whole += lane
        del lane  # free before the next: memory holds at most the sum and one lane
    if whole is None:
        raise ValueError("there is no lane to add up")
    folded: T = whole
    return folded


def fold_for(owners: Mapping[str, Sequence[int]], lanes: Iterable[Mapping[str, T]]) -> dict[str, T]:
    """``fold`` of named sums over the lanes of all processes. Returns the sums that this process gets.

    Args:
        owners: the processes that get each sum, with the same names in all processes.
        lanes: those of this process, in order.
    """
    if ranks.count() == 1:
        return dict(fold(map(Sums, lanes))) if owners else {}
    held: list[dict[str, Any]] = []
    for number, lane in enumerate(lanes):
        if number and ranks.first():  # the first process has the first lanes: they are added up at once
            held[0] = fold([Sums(held[0]), Sums(lane)])
        else:
            held.append(dict(lane))
        del lane  # free before the next
    counts = ranks.gathered(len(held))
    found = {}
    for name, to in owners.items():
        mine = [lane.pop(name) for lane in held]
        if (summed := _summed(mine, counts, to)) is not None:
            found[name] = summed
    return found


def _summed(mine: list[Any], counts: Sequence[int], to: Sequence[int]) -> Any:
    """The sum of all processes' values; ``counts`` has each process's number of values. The first
    process of ``to`` adds them up in order. None for processes that are not in ``to``.
    """
    me, whole = ranks.rank(), None
    for source, count in enumerate(counts):
        for number in range(count):
            one = mine[number] if source == me else None
            if source != to[0]:
                one = ranks.passed(one, source, to[0])
            if me != to[0]:
                continue
            if whole is None:
                whole = one
            else:
                whole += one
            del one  # free before the next
    if len(to) == ranks.count():
        return ranks.broadcast(whole, to[0])
    for other in to[1:]:
        got = ranks.passed(whole, to[0], other)
        whole = got if other == me else whole
    return whole if me in to else None


def total(values: Sequence[Any]) -> Any:
    """The sum of one value (a number or a tensor) per sample, in the lanes' order; the values do not
    change. Each process gives those of its own samples.
    """
    values = ranks.joined(values)
    lanes = [values[part] for part in parts(len(values)) if part.start < part.stop]
    return functools.reduce(operator.add, [functools.reduce(operator.add, lane) for lane in lanes])
