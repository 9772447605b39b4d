"""The interface of a pruning step."""

from typing import Protocol

from pipeline_lib.prune.shapes import Shapes
from pipeline_lib.prune.window import Window


class Step(Protocol):
    """A pruning step: a frozen dataclass that holds its parameters."""

    def run(self, window: Window) -> None:
        """Change the window's blocks in place."""

    def memory(self, shapes: Shapes) -> float:
        """Bytes while it runs, without the streams of hidden states."""
        ...

    def flops(self, shapes: Shapes) -> float:
        """FLOPs of one block."""
        ...
