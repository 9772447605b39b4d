"""The source's files, and which tensors each of them holds: exported checkpoints are cut in the
same places.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from pipeline_lib.core.artifacts import write_json
from pipeline_lib.models.checkpoint import Checkpoint
from pipeline_lib.models.files import INDEX


def partition(source: Checkpoint) -> dict[str, list[str]]:
    """File name -> its tensors, both in order."""
    found: dict[str, list[str]] = {}
    for name in sorted(source.files):
        found.setdefault(source.files[name], []).append(name)
    return dict(sorted(found.items()))


def one_by_one(checkpoint: Checkpoint, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors with their file closed after each, so that none of it stays mapped."""
    for name in names:
        yield from checkpoint.read([name])


def write_index(directory: Path, files: Mapping[str, str], total: int) -> None:
    """Which file holds which tensor, as transformers reads it; ``total`` are the tensors' bytes."""
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(files)})
