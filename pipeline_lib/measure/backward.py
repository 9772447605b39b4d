"""Derivatives of the loss block by block: forward through the blocks, with the inputs of each kept,
then backward with one block's graph at a time.

By the chain rule these are the derivatives of the whole model. The blocks are read once forward and
once backward for a group of batches. Only the graph of one block and one batch is in memory, at the
price of one more forward pass.

Shape letters: ``B`` samples in a batch, ``T`` tokens per sample, ``D`` channels of the residual
stream, ``V`` tokens of the vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import nn

from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.stream import BlockModel

# hidden states [B, T, D] after the last block -> logits [B, T, V]
Logits = Callable[[torch.Tensor], torch.Tensor]
S = TypeVar("S")


@dataclass(frozen=True)
class Subject:
    """The model and the text of an estimate."""

    model: BlockModel
    rows: torch.Tensor  # token rows [N, T]
    # block -> logical name -> matrix; only the requested ones
    matrices: Mapping[int, Mapping[str, Matrix]]

    def batch(self, probe: int, count: int) -> torch.Tensor:
        """The samples [count, T] of a probe: each probe takes the next ones, cyclically."""
        return self.rows[(torch.arange(count) + probe * count) % len(self.rows)]


class Walk(Protocol[S]):
    """The state of a pass: hidden states forward, then gradients with respect to them backward,
    with or without tangents. ``number`` is the index of the batch.
    """

    def enter(self, hidden: torch.Tensor) -> S:
        """The state before the first block, for its inputs [B, T, D]."""

    def up(self, block: nn.Module, index: int, number: int, state: S) -> S:
        """Pass the state forward through a block."""

    def turn(self, logits: Logits, number: int, state: S) -> S:
        """Turn hidden states into gradients at the loss."""

    def down(self, block: nn.Module, index: int, number: int, state: S, gradient: S) -> S:
        """Pass the gradient backward through a block with the inputs ``state``: from its outputs to
        its inputs.
        """


def walk(model: BlockModel, batches: Sequence[torch.Tensor], method: Walk[S]) -> None:
    """Pass batches of samples [B, T] forward and backward through all blocks."""
    if not batches:  # with few probes, other processes have all of them
        return
    depth = model.checkpoint.architecture.depth
    stream = model.embed(torch.cat(list(batches)), [len(batch) for batch in batches])
    kept = [[method.enter(hidden)] for hidden in stream.hidden]
    for index in range(depth):
        block = model.block(index)
        for number, states in enumerate(kept):
            states.append(method.up(block, index, number, states[-1]))
    with model.head() as logits:
        gradients = [method.turn(logits, number, states.pop()) for number, states in enumerate(kept)]
    for index in reversed(range(depth)):
        block = model.block(index)
        for number, states in enumerate(kept):
            gradients[number] = method.down(block, index, number, states.pop(), gradients[number])
