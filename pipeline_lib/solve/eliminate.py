"""Elimination of columns, the inner loop of the OBS sweep: later columns compensate for each lost
weight.

A column block is copied with its columns as rows, so that each column is contiguous. It is eliminated
recursively by halves: after the left half, one product passes its errors to the right half. Python
loops run only over the columns of a leaf. On a GPU a leaf is one launch of a kernel. Shape letters:
``R`` outputs, ``C`` inputs, ``B`` columns of a block.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from pipeline_lib.masks.select import n_best
from pipeline_lib.solve.grid import Grid

LEAF, WIDEST = 16, 128  # most columns of a leaf, without the kernel and with it
# columns whose errors are passed on to distant columns in one product, which saves memory traffic;
# with a grid, all columns get the errors of each column block at once
AT_ONCE = 512


def fused(device: torch.device) -> bool:
    """Whether the kernel can eliminate leaves on this device. Triton comes with torch for CUDA."""
    if device.type != "cuda":
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@dataclass(frozen=True)
class Groups:
    """The choice of N:M: in each group of M columns, every output keeps the N weights with the largest
    w² · factor. They are chosen when the sweep reaches the first column of the group.
    """

    n: int
    m: int
    factor: torch.Tensor  # [C]


class Rounding:
    """A grid in the order of the sweep. ``groups`` holds the group of each column; ``starts`` maps the
    first column of each group to all columns of the group.
    """

    def __init__(self, grid: Grid, order: torch.Tensor | None) -> None:
        columns = torch.arange(grid.shape[1]) if order is None else order.cpu()
        self.grid = grid
        self.groups: list[int] = (columns // grid.width).tolist()
        members: dict[int, list[int]] = {}
        for column, group in enumerate(self.groups):
            members.setdefault(group, []).append(column)
        self.starts = {found[0]: found for found in members.values()}


@dataclass
class Columns:
    """Weight and mask [R, C] in the order of the sweep, which changes both in place."""

    weight: torch.Tensor
    mask: torch.Tensor  # True where nothing is chosen yet
    upper: torch.Tensor  # U [C, C] of the factorisation
    groups: Groups | None = None
    rounding: Rounding | None = None
    lost: torch.Tensor = field(init=False)  # [] float64: Σ (w − ŵ)²/U_mm² so far
    # errors [B, R] of the column blocks from column ``since`` on; only columns before ``near`` have them
    held: list[torch.Tensor] = field(default_factory=list, init=False)
    since: int = field(default=0, init=False)
    near: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.lost = torch.zeros((), dtype=torch.float64, device=self.weight.device)

    def eliminate(
        self, start: int, stop: int, choose: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        """Eliminate columns ``start`` … ``stop`` in place, and pass their errors on to later columns.

        Args:
            choose: function from these columns [R, B], as compensated so far, to their mask.
        """
        if stop > self.near:
            self._pass_on(start)
            reach = self.weight.shape[1] if self.rounding is not None else max(start + AT_ONCE, stop)
            self.near = min(reach, self.weight.shape[1])
        part, mask = self.weight[:, start:stop], self.mask[:, start:stop]
        if choose is not None:
            mask.copy_(choose(part))
        block = _Block(self, start, stop)
        block.eliminate(0, stop - start)
        if self.rounding is not None:
            lost = block.errors * block.upper.diagonal()[:, None] * block.kept
            self.rounding.grid.count(block.columns + lost, lost)
        part.copy_(_turned(block.columns.mul_(block.kept).add_(0.0)))  # −0 becomes 0
        if self.groups is not None:
            mask.copy_(_turned(block.kept))
        if stop < self.near:
            self.weight[:, stop : self.near].addmm_(
                block.errors.T, self.upper[start:stop, stop : self.near], alpha=-1
            )
        self.held.append(block.errors)
        self.lost += block.errors.square().sum()

    def _pass_on(self, start: int) -> None:
        """Pass the held errors of the columns before ``start`` on to the columns that lack them."""
        if self.held and self.near < self.weight.shape[1]:
            self.weight[:, self.near :].addmm_(
                torch.cat(self.held).T, self.upper[self.since : start, self.near :], alpha=-1
            )
        self.held, self.since = [], start


def _turned(matrix: torch.Tensor) -> torch.Tensor:
    """The transposed matrix, contiguous. The copy in between makes this several times faster if rows
    are slices of longer rows.
    """
    return matrix.contiguous().T.contiguous()


@contextmanager
def _one_thread() -> Iterator[None]:
    """While open, use one CPU thread: waking another takes as long as eliminating a column."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Block:
    """Columns ``start`` … ``stop``, stored as rows."""

    def __init__(self, whole: Columns, start: int, stop: int) -> None:
        self.whole, self.start = whole, start
        self.columns = _turned(whole.weight[:, start:stop])  # [B, R]
        self.kept = _turned(whole.mask[:, start:stop])
        self.errors = torch.empty_like(self.columns)  # [B, R] (w − ŵ)/U_mm of eliminated columns
        self.upper = whole.upper[start:stop, start:stop].contiguous()
        # per column: how many columns of the block, from the left, have passed their errors on to it
        self.fresh = [0] * (stop - start)
        self.fused = fused(self.columns.device) and self.columns.dtype == torch.float32

    @functools.cached_property
    def inverse(self) -> torch.Tensor:
        """1/U_mm [B, 1]."""
        return 1 / self.upper.diagonal()[:, None]

    @functools.cached_property
    def onward(self) -> torch.Tensor:
        """Factors [B, B] by which the error of a column changes the others: −U_mj to its right, else 0.
        Adding zeros to finished columns is faster than leaving them out.
        """
        return -self.upper.triu(1)

    def eliminate(self, first: int, last: int) -> None:
        """Eliminate columns ``first`` … ``last`` of the block. They have the errors of all columns before."""
        middle = self._middle(first, last)
        if middle is None:
            self._leaf(first, last)
            return
        self.eliminate(first, middle)
        self.columns[middle:last].addmm_(
            self.upper[first:middle, middle:last].T, self.errors[first:middle], alpha=-1
        )
        self.fresh[middle:last] = [middle] * (last - middle)
        self.eliminate(middle, last)

    def _middle(self, first: int, last: int) -> int | None:
        """The column at which to split, or None for a leaf. It is the start of a grid's group if there
        is one, because groups are fitted to fully compensated columns; else the middle.
        """
        rounding, unit = self.whole.rounding, self.whole.groups.m if self.whole.groups else 1
        half = (first + last) // 2
        if rounding is not None:
            inside = [place for place in range(first + 1, last) if self.start + place in rounding.starts]
            if inside:
                return min(inside, key=lambda place: abs(place - half))
        if last - first <= max(WIDEST if self.fused else LEAF, unit):
            return None
        return first + max(unit, (half - first) // unit * unit)  # whole groups of M

    def _leaf(self, first: int, last: int) -> None:
        groups, rounding = self.whole.groups, self.whole.rounding
        self.fresh[first:last] = [last] * (last - first)  # in a leaf, each error goes to all columns at once
        if rounding is not None and (members := rounding.starts.get(self.start + first)) is not None:
            if groups is not None and (self.start + first) % groups.m == 0:
                self._choose(groups, first)  # pruned weights do not count for the grid
            found, mask = self._compensated(first, members)
            rounding.grid.fit(rounding.groups[self.start + first], found.mul_(mask).T)
        torn = groups is not None and ((self.start + first) % groups.m or (self.start + last) % groups.m)
        if self.fused and not torn:
            self._launch(first, last)
            return
        with _one_thread():
            self._loop(first, last)

    def _loop(self, first: int, last: int) -> None:
        """Eliminate a leaf column by column. Tests compare the kernel with this."""
        groups, rounding, place = self.whole.groups, self.whole.rounding, slice(first, last)
        # factor from a column to its error, without a grid: 1/U_mm where pruned, else 0
        leaf, share = self.columns[place], self.inverse[place] * ~self.kept[place]
        parts = zip(
            leaf.unbind(),
            self.errors[place].unbind(),
            share.unbind(),
            self.onward[place, place].unbind(),
            strict=True,
        )
        for j, (column, error, own, factors) in enumerate(parts, first):
            if groups is not None and (self.start + j) % groups.m == 0:
                self._choose(groups, j)
                group = slice(j, min(j + groups.m, last))
                torch.mul(
                    self.inverse[group],
                    ~self.kept[group],
                    out=share[group.start - first : group.stop - first],
                )
            if rounding is None:
                torch.mul(column, own, out=error)
            else:
                rounded = rounding.grid.round(
                    (column * self.kept[j])[:, None], rounding.groups[self.start + j]
                )[:, 0]
                torch.sub(column, rounded, out=error).mul_(self.inverse[j])
                column.copy_(rounded)
            leaf.addr_(factors, error)

    def _choose(self, groups: Groups, first: int) -> None:
        """Choose the mask of the group of M from column ``first`` on. All columns before are eliminated."""
        place = slice(first, first + groups.m)
        found = self.columns[place]
        if min(self.fresh[place]) < first:
            found, _ = self._compensated(first, range(self.start + first, self.start + first + groups.m))
        scores = found.square() * groups.factor[self.start + first :][: groups.m, None]
        self.kept[place] = n_best(scores, groups.n)

    def _launch(self, first: int, last: int) -> None:
        from pipeline_lib.solve import kernel

        groups, rounding, place = (
            self.whole.groups,
            self.whole.rounding,
            slice(self.start + first, self.start + last),
        )
        chosen = None if groups is None else (groups.n, groups.m, groups.factor[place])
        onto = None
        if rounding is not None:
            grid = rounding.grid
            of = torch.tensor(rounding.groups[place], dtype=torch.int32, device=self.columns.device)
            onto = (grid.scale, grid.zero, of, grid.scheme.levels)
        part = slice(first, last)
        kernel.eliminate(
            self.columns[part], self.kept[part], self.errors[part], self.upper[part, part], chosen, onto
        )

    def _compensated(self, done: int, members: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns ``members`` of the whole matrix [n, R] and their masks [n, R]. The columns have the
        errors of all columns before column ``done`` of the block.
        """
        whole, inside = (
            self.whole,
            {member: member - self.start for member in members if 0 <= member - self.start < len(self.fresh)},
        )
        chosen = list(members)
        found, mask = whole.weight[:, chosen].T.contiguous(), whole.mask[:, chosen].T.contiguous()
        for place, member in enumerate(chosen):
            if member in inside:
                found[place], mask[place] = self.columns[inside[member]], self.kept[inside[member]]
        fresh = [self.fresh[inside[member]] if member in inside else 0 for member in chosen]
        for since in {own for own in fresh if own < done}:
            late = [place for place, own in enumerate(fresh) if own == since]
            factors = whole.upper[self.start + since : self.start + done, [chosen[place] for place in late]]
            found[late] -= factors.T @ self.errors[since:done]
        return found, mask
