"""Derivatives of the loss block by block: up through the blocks with the inputs of each kept, then
down with each block's graph alone.

Nothing but the chain rule: the derivatives are those of the whole model. The blocks are read once
up and once down for a group of batches; the graph of one block and one batch is all that is ever in
memory, at the price of one more forward pass.

Shape letters: ``B`` rows in a batch, ``T`` tokens in a row, ``D`` channels of the residual stream,
``V`` tokens of the vocabulary.
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
    """Whose sensitivity is estimated, on which text."""

    model: BlockModel
    rows: torch.Tensor  # token rows [N, T]
    # block -> logical name -> matrix; only those that are asked for
    matrices: Mapping[int, Mapping[str, Matrix]]

    def batch(self, probe: int, count: int) -> torch.Tensor:
        """The rows [count, T] behind a probe: each takes the next ones, from the start again after
        the last.
        """
        return self.rows[(torch.arange(count) + probe * count) % len(self.rows)]


class Walk(Protocol[S]):
    """What is carried: hidden states up and gradients with respect to them down, with their
    tangents or without; ``number`` is the batch's.
    """

    def enter(self, hidden: torch.Tensor) -> S:
        """Before the first block, for its inputs [B, T, D]."""

    def up(self, block: nn.Module, index: int, number: int, state: S) -> S:
        """Through a block."""

    def turn(self, logits: Logits, number: int, state: S) -> S:
        """At the loss: from hidden states to gradients."""

    def down(self, block: nn.Module, index: int, number: int, state: S, gradient: S) -> S:
        """Back through a block whose inputs were ``state``: from the gradient at its outputs to the
        one at its inputs.
        """


def walk(model: BlockModel, batches: Sequence[torch.Tensor], method: Walk[S]) -> None:
    """Take batches of token rows [B, T] through all blocks and back."""
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
