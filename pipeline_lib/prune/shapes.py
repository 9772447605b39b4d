"""Sizes that determine the cost of a step, from the model's header alone: nothing is loaded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from pipeline_lib.core import ranks
from pipeline_lib.models.checkpoint import Checkpoint
from pipeline_lib.stats.lanes import LANES


@dataclass(frozen=True)
class Shapes:
    """Sizes of the largest block and of the calibration samples. Bytes; floats take 4 bytes while
    computing.

    With several processes, bytes and FLOPs are those of the busiest one: samples are dealt lane by
    lane, and each matrix of a block has an owner, which factorises and solves.
    """

    checkpoint: Checkpoint
    rows: int
    length: int  # tokens of a row
    batch_rows: int
    window: int = 1  # blocks that are pruned together
    dtype: torch.dtype = torch.float32  # of forward passes
    held_out: float = 0.0  # share of the rows in the held-out split
    processes: int = 1
    training: int = 0  # further rows that only train
    room: float = math.inf  # bytes for values that could be computed again (``Storage.room``)

    @property
    def matrices(self) -> list[tuple[int, int]]:
        return self._of(self._largest)

    @property
    def sites(self) -> list[int]:
        """Channels of each site."""
        return [len(site.index) for site in self.checkpoint.architecture.layouts[self._largest].sites]

    @property
    def consumers(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """Channels of each site, in the order of pruning, and its matrices [R, C]."""
        layout = self.checkpoint.architecture.layouts[self._largest]
        shape = self.checkpoint.matrix_shape
        return [
            (len(site.index), [shape(self._largest, matrix) for matrix in layout.consumers(site.name)])
            for site in layout.sites
        ]

    @property
    def inputs(self) -> list[float]:
        """Bytes of each site's inputs for all tokens of the process, in the order of pruning; 0 for
        experts.
        """
        sites = self.checkpoint.architecture.layouts[self._largest].sites
        value = self.dtype.itemsize * self.own
        return [0 if site.pool is not None else value * len(site.index) for site in sites]

    @property
    def blocks(self) -> float:
        """Prunable weights of the model, in units of the largest block."""
        depth = self.checkpoint.architecture.depth
        return sum(rows * columns for block in range(depth) for rows, columns in self._of(block)) / self.block

    def _of(self, block: int) -> list[tuple[int, int]]:
        return [
            self.checkpoint.matrix_shape(block, matrix)
            for matrix in self.checkpoint.architecture.layouts[block].matrices
        ]

    @cached_property
    def _largest(self) -> int:
        sizes = [
            sum(rows * columns for rows, columns in self._of(block))
            for block in range(self.checkpoint.architecture.depth)
        ]
        return sizes.index(max(sizes))

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def share(self) -> float:
        """Share of the rows that the busiest process has."""
        return math.ceil(LANES / self.processes) / LANES

    @property
    def own(self) -> int:
        """Tokens of the busiest process."""
        return math.ceil(self.tokens * self.share)

    @property
    def extended(self) -> float:
        """Samples in all, in units of those that enter statistics or judge."""
        return 1 + self.training / self.rows

    @property
    def block(self) -> int:
        """Prunable weights of a block."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def largest(self) -> int:
        return max(rows * columns for rows, columns in self.matrices)

    @property
    def stored(self) -> int:
        """Bytes per weight: as stored, and 4 more for a float32 copy unless the stored weight is
        float32.
        """
        item = self.checkpoint.dtype.itemsize
        return item + (item != 4) * 4

    @property
    def copied(self) -> int:
        """Bytes per weight of the block's copy in the computing dtype; 0 if the checkpoint has the
        same dtype, so that no copy exists.
        """
        return 0 if self.dtype == self.checkpoint.dtype else self.dtype.itemsize

    @property
    def batch(self) -> int:
        """Samples of the largest batch; no batch has samples of two lanes or of both splits."""
        rows = self.rows * max(self.held_out, 1 - self.held_out)
        return min(self.batch_rows, math.ceil(rows / LANES))

    @property
    def forward(self) -> int:
        """FLOPs of the process's samples through the block's products."""
        return 2 * self.own * self.block

    @property
    def sweep(self) -> float:
        """FLOPs of a product [R, C] × [C, C] for every matrix, which is also the cost of a column
        sweep.
        """
        return self.solving()[0]

    def solving(self, by_site: bool = False) -> tuple[float, float]:
        """FLOPs of the products [R, C] × [C, C] of all matrices, and of the factorisations that
        they need.

        Args:
            by_site: each site is solved before the next one's statistics are collected; else all
                sites of a block are solved together.
        """
        sites = self.consumers
        parts = [[site] for site in sites] if by_site else [sites]
        found = [_busiest(part, self.processes) for part in parts]
        return sum(sweep for sweep, _ in found), sum(factor for _, factor in found)

    @property
    def grams(self) -> int:
        """Bytes of all Gram matrices."""
        return 4 * sum(d * d for d in self.sites)

    @property
    def gram_flops(self) -> int:
        return 2 * self.own * sum(d * d for d in self.sites)

    @property
    def factor_flops(self) -> float:
        return self.solving()[1]

    def inner(self, rows: int) -> float:
        """Bytes of a batch's activations within the block: every site's inputs, four tensors of the
        stream's width, and the rows of the attention matrix.
        """
        heads, width = self.checkpoint.heads, self.checkpoint.architecture.width
        return 4 * rows * self.length * (sum(self.sites) + 4 * width + heads * self.length / 4)

    def graph(self, rows: int, bfloat16: bool) -> int:
        """Bytes that a block's graph keeps of a batch for the backward pass: every site's inputs, five
        tensors of the stream's width, and for the activation function of the MLP one tensor of its
        width, or three with a gate. Attention matrices, which unfused kernels keep, are not counted.

        Args:
            bfloat16: products are in bfloat16. Norms keep float32; the block's weights are kept in
                bfloat16.
        """
        activation = 3 if self._into_mlp > 1 else 1
        values = sum(self.sites) + activation * max(self.sites) + 5 * self.checkpoint.architecture.width
        whole = 4 * rows * self.length * values
        return 2 * whole // 3 + 2 * self.block if bfloat16 else whole

    @property
    def _into_mlp(self) -> int:
        """Number of projections to the widest site: with a gate two, or one that is twice as wide."""
        widest = max(self.sites)
        return sum(outputs // widest for outputs, _ in self.matrices if outputs % widest == 0)

    def activations(self, rows: int) -> float:
        """Bytes of the tensors of a block's forward pass at its peak, without its input. In the MLP
        these are three tensors of its width (gate, up, and their product), or two without a gate.
        In the attention they are six of the stream's width (Q, K and V, before and after the
        rotation). The larger counts, and three more of the stream's width (residual, normed,
        output). Fused attention kernels store no row of the attention matrix.
        """
        width, widest = self.checkpoint.architecture.width, max(self.sites)
        tensors = 1 + min(2, self._into_mlp)
        return self.dtype.itemsize * rows * self.length * (max(tensors * widest, 6 * width) + 3 * width)

    def stream(self, dtype: torch.dtype) -> int:
        """Bytes of the hidden states of the process's samples."""
        return dtype.itemsize * self.own * self.checkpoint.architecture.width


def _busiest(sites: Sequence[tuple[int, list[tuple[int, int]]]], processes: int) -> tuple[float, float]:
    """The most FLOPs of one process for products, and for factorisations. Matrices are dealt by
    their cost R·C², the most expensive first. A process factorises every site of its matrices, at
    3·C³ each.
    """
    costs = {
        (site, number): rows * channels**2
        for site, (channels, matrices) in enumerate(sites)
        for number, (rows, _) in enumerate(matrices)
    }
    loads, factors = [0.0] * processes, [set[int]() for _ in range(processes)]
    for item, owner in ranks.deal(costs, processes).items():
        loads[owner] += costs[item]
        factors[owner].add(item[0])
    return max(loads), max(3 * sum(sites[site][0] ** 3 for site in own) for own in factors)


def outside(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> float:
    """Bytes of embeddings, head and last norm."""
    return dtype.itemsize * sum(math.prod(checkpoint.shapes[name]) for name in checkpoint.outside_blocks())
