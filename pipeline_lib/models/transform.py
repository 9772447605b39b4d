"""The artifact that the stages scale and induce write, and prune reads. It holds factors, shifts and
selection weights, but no model weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline_lib.core.artifacts import read_tensors, write_tensors


@dataclass(frozen=True)
class Transform:
    """Changes of one block before its mask is chosen. Empty mappings mean no change."""

    # coupling -> d > 0 [size], folded exactly
    factors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    # site -> δ [d] in the original coordinates
    shifts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    # site -> selection weights u > 0 [d], never folded
    importance: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Transform":
        parts = (self.factors, self.shifts, self.importance)
        return Transform(*({name: value.to(device) for name, value in part.items()} for part in parts))

    def tensors(self, block: int) -> dict[str, torch.Tensor]:
        parts = {"factor": self.factors, "shift": self.shifts, "importance": self.importance}
        return {
            f"{block}.{part}.{name}": value
            for part, values in parts.items()
            for name, value in values.items()
        }


def write_transforms(
    path: Path, transforms: Mapping[int, Transform], facts: Mapping[str, Any] | None = None
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for block, transform in transforms.items():
        tensors |= transform.tensors(block)
    write_tensors(path, tensors, facts)


def read_transforms(path: Path, depth: int) -> tuple[list[Transform], dict[str, Any]]:
    """One transform per block, and the facts. Blocks that are not in the file get the identity."""
    tensors, facts = read_tensors(path)
    parts: list[dict[str, dict[str, torch.Tensor]]] = [
        {"factor": {}, "shift": {}, "importance": {}} for _ in range(depth)
    ]
    for key, tensor in tensors.items():
        block, part, name = key.split(".", 2)
        parts[int(block)][part][name] = tensor
    return [Transform(part["factor"], part["shift"], part["importance"]) for part in parts], facts
