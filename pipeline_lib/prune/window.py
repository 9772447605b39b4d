"""What pruning works on: blocks as they are pruned, the streams before them, and a window of consecutive blocks."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipeline_lib.fit.fit import Pairs
from pipeline_lib.masks.bits import BitMasks
from pipeline_lib.masks.rule import Rule
from pipeline_lib.masks.scores import Curvature
from pipeline_lib.models.architecture import Layout, Matrix
from pipeline_lib.models.stream import BlockModel, Stream, tapped
from pipeline_lib.models.transform import Transform
from pipeline_lib.solve.grid import Grid
from pipeline_lib.stats.lanes import Sums, fold
from pipeline_lib.stats.moments import DiagonalSums, Moments, MomentSums


@dataclass
class Block:
    """One block as it is pruned. The transform's factors are folded into ``tensors``; its other parts go into masks and biases."""

    layout: Layout
    where: str  # its name in the model
    transform: Transform
    kept: Mapping[Matrix, int]  # how many weights each included matrix keeps
    tensors: dict[str, torch.Tensor]  # every parameter
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # in which the checkpoint stores them
    masks: BitMasks = field(default_factory=BitMasks)  # parameter -> bool, True = kept, in the checkpoint's orientation
    # Per matrix: kept, size, layer error, damping; per step that fitted the block: its errors.
    facts: dict[str, Any] = field(default_factory=lambda: {"matrices": {}})
    curvatures: dict[Matrix, Curvature] = field(default_factory=dict)  # what scores need, for masks chosen anew
    rules: dict[Matrix, Rule] = field(default_factory=dict)  # by which masks were chosen
    grids: dict[Matrix, Grid] = field(default_factory=dict)  # of the matrices that are quantised

    @property
    def sites(self) -> list[str]:
        """The sites of its included matrices, in order."""
        wanted = {matrix.site for matrix in self.kept}
        return [site.name for site in self.layout.sites if site.name in wanted]

    def consumers(self, site: str) -> list[Matrix]:
        """The included matrices that share a site."""
        return [matrix for matrix in self.layout.consumers(site) if matrix in self.kept]

    def take(self, matrix: Matrix, mask: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        """A matrix's mask [R, C]; the parameter that holds the matrix becomes a copy, in this dtype, whose weights may be changed."""
        name = matrix.parameter
        if name not in self.masks:
            self.tensors[name] = self.tensors[name].to(dtype, copy=True)
        whole = self.masks.get(name, torch.ones(self.tensors[name].shape, dtype=torch.bool))
        matrix.view(whole).copy_(mask)
        self.masks[name] = whole


@dataclass(frozen=True)
class Streams:
    """Hidden states before a window. Batches before number ``cut`` hold the fitting rows, the others those that judge; each of one lane."""

    pruned: Stream
    dense: Stream | None  # what the dense model has in the same places; None where nothing needs it
    cut: int
    seen: Sequence[Sequence[int]]  # for each lane, the numbers of its batches that statistics are taken from

    def pairs(self) -> tuple[Pairs, Pairs]:
        """Fitting and held-out rows: before the window in the pruned stream, after it in the dense one."""
        if self.dense is None:
            raise ValueError("nothing is fitted without the dense stream")
        inputs, targets = self.pruned.hidden, self.dense.hidden
        return Pairs(inputs[: self.cut], targets[: self.cut]), Pairs(inputs[self.cut :], targets[self.cut :])


@dataclass(frozen=True)
class Window:
    """Consecutive blocks that a step changes in place."""

    model: BlockModel
    blocks: Mapping[int, Block]
    # The pruned one is before the first block; the dense one, too, while masks are chosen, else behind the last block. None: no text is read.
    streams: Streams | None
    dense: nn.Module | None = None  # while masks of a single block are chosen: the block as it was

    @property
    def rows(self) -> Streams:
        """The streams, where a step must have them.

        Raises:
            ValueError: no text is read.
        """
        if self.streams is None:
            raise ValueError("this step needs calibration rows")
        return self.streams


class _Reached(Exception):
    """All sites that were asked for were reached: what comes after them in the block is not needed."""


def collect(
    model: BlockModel,
    block: tuple[int, nn.Module],
    hidden: Sequence[torch.Tensor],
    lanes: Sequence[Sequence[int]],
    sites: Sequence[str],
    beside: tuple[nn.Module, Sequence[torch.Tensor]] | None = None,
) -> dict[str, Moments]:
    """Moments of the sites' inputs for batches of a stream before a block. No more of the block is run than they need.

    Memory: two matrices [d, d] per site, the sum and one lane's; twice that with ``beside``.

    Args:
        block: its number, and the block.
        hidden: [B, T, D] each.
        lanes: for each, the numbers of its batches.
        sites: names of those that are wanted.
        beside: the dense block and the dense stream's batches before it: the cross moments with its inputs are collected too.
    """

    def summed(lane: Sequence[int]) -> Sums[MomentSums]:
        sums = Sums({name: MomentSums() for name in sites})
        for number in lane:
            dense: dict[str, torch.Tensor] = {}
            if beside is not None:
                _tap(model, (block[0], beside[0]), beside[1][number], sites, dense.__setitem__)
            _tap(model, block, hidden[number], sites, lambda name, x, dense=dense: sums[name].add(x, dense.get(name)))  # type: ignore[misc]
        return sums

    sums = fold(map(summed, lanes))
    return {name: sums.pop(name).finish(beside is not None) for name in list(sums)}


def collect_diagonals(
    model: BlockModel,
    block: tuple[int, nn.Module],
    hidden: Sequence[torch.Tensor],
    lanes: Sequence[Sequence[int]],
    sites: Sequence[str],
) -> dict[str, torch.Tensor]:
    """The diagonals [d] of the second moments of the sites' inputs, see ``collect``."""

    def summed(lane: Sequence[int]) -> Sums[DiagonalSums]:
        sums = Sums({name: DiagonalSums() for name in sites})
        for number in lane:
            _tap(model, block, hidden[number], sites, lambda name, x: sums[name].add(x))
        return sums

    return {name: one.finish() for name, one in fold(map(summed, lanes)).items()}


def _tap(
    model: BlockModel, block: tuple[int, nn.Module], hidden: torch.Tensor, sites: Sequence[str], take: Callable[[str, torch.Tensor], None]
) -> None:
    """Run a block on a batch [B, T, D] until ``take(site, X)`` has got the inputs X [B, T, d] of every site."""
    modules = {one.name: one.module for one in model.checkpoint.architecture.layouts[block[0]].sites if one.name in sites}
    ahead = set(modules)

    def reach(name: str, x: torch.Tensor) -> None:
        take(name, x.unflatten(0, (len(hidden), -1)))
        ahead.discard(name)
        if not ahead:
            raise _Reached

    with torch.no_grad(), suppress(_Reached), tapped(block[1], modules, reach):
        model.call(block[1], block[0], hidden)
