"""Lanes: the order in which sums over calibration rows are taken, which depends on the rows alone.

Rows are dealt to four lanes by their numbers. A sum runs row by row within a lane, and then over
the lanes in order. How the rows come in batches, and who adds up which lane, changes no bit. A
batch holds rows of one lane, since another batch may round otherwise.
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
    """Rows in batches, lane by lane."""

    sizes: list[int]  # rows of each batch
    lanes: list[list[int]]  # for each lane, its batches' numbers


class Sums(dict[str, T]):
    """Sums by the name of what they are of; added one by one."""

    def __iadd__(self, other: "Sums[T]") -> "Sums[T]":
        for name in self:
            mine: Any = self[name]
            mine += other.pop(name)
            self[name] = mine
        return self


def parts(rows: int) -> list[slice]:
    """The rows of each lane: consecutive ones, a quarter each, rounded. Of fewer rows than lanes,
    some get none.
    """
    borders = [-(-rows * lane // LANES) for lane in range(LANES + 1)]
    return [slice(first, last) for first, last in pairwise(borders)]


def deal(rows: int, batch_rows: int, first: int = 0) -> Dealt:
    """Rows in batches of ``batch_rows``, or what is left of a lane; numbers count from ``first``."""
    sizes: list[int] = []
    lanes = []
    for part in parts(rows):
        own = [min(batch_rows, part.stop - start) for start in range(part.start, part.stop, batch_rows)]
        lanes.append([first + len(sizes) + number for number in range(len(own))])
        sizes += own
    return Dealt(sizes, lanes)


def fold(lanes: Iterable[T]) -> T:
    """0 + 1 + 2 + 3: each is added in place to those before it, and is asked for when these are summed up.

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
    """The sum of one value (a number or a tensor) per row, in the lanes' order; the values stay as
    they are.
    """
    lanes = [values[part] for part in parts(len(values)) if part.start < part.stop]
    return functools.reduce(operator.add, [functools.reduce(operator.add, lane) for lane in lanes])
