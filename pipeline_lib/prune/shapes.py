"""Sizes that decide what a step takes, from the model's header alone: nothing is loaded."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from pipeline_lib.models.checkpoint import Checkpoint
from pipeline_lib.stats.lanes import LANES


@dataclass(frozen=True)
class Shapes:
    """Of the largest block, and of the calibration rows. Bytes; floats are 4 bytes while computing."""

    checkpoint: Checkpoint
    rows: int
    length: int  # tokens of a row
    batch_rows: int
    window: int = 1  # blocks that are pruned together
    dtype: torch.dtype = torch.float32  # of forward passes
    held_out: float = 0.0  # share of the rows that judges

    @property
    def matrices(self) -> list[tuple[int, int]]:
        return self._of(self._largest)

    @property
    def sites(self) -> list[int]:
        """Channels of each."""
        return [len(site.index) for site in self.checkpoint.architecture.layouts[self._largest].sites]

    @property
    def consumers(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """Channels of each site, in the order in which they are pruned, and the matrices [R, C]
        that share it.
        """
        layout = self.checkpoint.architecture.layouts[self._largest]
        shape = self.checkpoint.matrix_shape
        return [
            (len(site.index), [shape(self._largest, matrix) for matrix in layout.consumers(site.name)])
            for site in layout.sites
        ]

    @property
    def blocks(self) -> float:
        """How many of the largest block would have all prunable weights of the model."""
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
    def block(self) -> int:
        """Prunable weights of a block."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def largest(self) -> int:
        return max(rows * columns for rows, columns in self.matrices)

    @property
    def stored(self) -> int:
        """Bytes of a weight: as stored, and another 4 to compute with if that is not float32."""
        item = self.checkpoint.dtype.itemsize
        return item + (item != 4) * 4

    @property
    def copied(self) -> int:
        """Bytes of a weight of a block that computes beside the stored one; 0 where both have one
        dtype, and share it.
        """
        return 0 if self.dtype == self.checkpoint.dtype else self.dtype.itemsize

    @property
    def batch(self) -> int:
        """Rows of the largest batch: none holds rows of two lanes, or both fitting and held-out ones."""
        rows = self.rows * max(self.held_out, 1 - self.held_out)
        return min(self.batch_rows, math.ceil(rows / LANES))

    @property
    def forward(self) -> int:
        """FLOPs of all rows through the block's products."""
        return 2 * self.tokens * self.block

    @property
    def sweep(self) -> int:
        """FLOPs of a product [R, C] × [C, C] for every matrix, which a column sweep takes, too."""
        return sum(rows * columns * columns for rows, columns in self.matrices)

    @property
    def grams(self) -> int:
        """Bytes of all Gram matrices."""
        return 4 * sum(d * d for d in self.sites)

    @property
    def gram_flops(self) -> int:
        return 2 * self.tokens * sum(d * d for d in self.sites)

    @property
    def factor_flops(self) -> int:
        return 3 * sum(d**3 for d in self.sites)

    def inner(self, rows: int) -> float:
        """Bytes of a batch's activations within the block: every site's inputs, four of the
        stream's width, rows of the attention.
        """
        heads, width = self.checkpoint.heads, self.checkpoint.architecture.width
        return 4 * rows * self.length * (sum(self.sites) + 4 * width + heads * self.length / 4)

    def activations(self, rows: int) -> float:
        """Bytes of tensors that a block's forward pass holds at its peak, its input left out: where
        it is widest three tensors of that width (gate, up, and their product; two in an MLP without
        a gate), or in the attention six of the stream's (Q, K and V, before and after the
        rotation), and three of the stream's width beside them (residual, normed, output).
        Attention's fused kernels hold no row of it.
        """
        width, widest = self.checkpoint.architecture.width, max(self.sites)
        tensors = 1 + min(2, sum(outputs // widest for outputs, _ in self.matrices if outputs % widest == 0))
        return self.dtype.itemsize * rows * self.length * (max(tensors * widest, 6 * width) + 3 * width)

    def stream(self, dtype: torch.dtype) -> int:
        """Bytes of the hidden states of all rows."""
        return dtype.itemsize * self.tokens * self.checkpoint.architecture.width


def outside(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> float:
    """Bytes of embeddings, head and last norm."""
    return dtype.itemsize * sum(math.prod(checkpoint.shapes[name]) for name in checkpoint.outside_blocks())
