"""Lanes: the order of sums over calibration samples, which depends on the samples alone.

Samples are divided into four lanes by their numbers. A sum runs sample by sample within a lane, and
then over the lanes in order. Neither the batches nor the worker that adds up a lane change a bit. A
batch has samples of one lane only, because another batch may round differently.
"""

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

LANES = 4
T = TypeVar("T")


@dataclass(frozen=True)
class Dealt:
    """Samples in batches, lane by lane."""

    sizes: list[int]  # rows of each batch
    lanes: list[list[int]]  # for each lane, its batches' numbers


class Sums(dict[str, T]):
    """Named sums, to which terms are added one by one."""

    def __iadd__(self, other: "Sums[T]") -> "Sums[T]":
        for name in self:
            mine: Any = self[name]
            mine += other.pop(name)
            self[name] = mine
        return self


def parts(rows: int) -> list[slice]:
    """The samples of each lane: consecutive ones, a quarter each, rounded. With fewer samples than
    lanes, some lanes are empty.
    """
    borders = [-(-rows * lane // LANES) for lane in range(LANES + 1)]
    return [slice(first, last) for first, last in pairwise(borders)]


def deal(rows: int, batch_rows: int, first: int = 0) -> Dealt:
    """Samples in batches of ``batch_rows``, or the rest of a lane; numbers count from ``first``."""
    sizes: list[int] = []
    lanes = []
    for part in parts(rows):
        own = [min(batch_rows, part.stop - start) for start in range(part.start, part.stop, batch_rows)]
        lanes.append([first + len(sizes) + number for number in range(len(own))])
        sizes += own
    return Dealt(sizes, lanes)


def fold(lanes: Iterable[T]) -> T:
    """0 + 1 + 2 + 3: each is requested when those before it are summed up, and added to them in place.

    Raises:
        ValueError: there is none.
    """
    whole: Any = None
    for lane in lanes:
        if whole is None:
            whole = lane
        else:
            whole += lane
        del lane  # before the next: at most the sum and one lane are in memory
    if whole is None:
        raise ValueError("there is no lane to add up")
    folded: T = whole
    return folded


def total(values: Sequence[Any]) -> Any:
    """The sum of one value (a number or a tensor) per sample, in the lanes' order; the values do not
    change.
    """
    lanes = [values[part] for part in parts(len(values)) if part.start < part.stop]
    return functools.reduce(operator.add, [functools.reduce(operator.add, lane) for lane in lanes])
