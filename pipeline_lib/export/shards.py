"""The partition of the source's tensors into files; exported checkpoints have the same one."""

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
    """Tensors, each with its file closed afterwards, so that nothing stays mapped."""
    for name in names:
        yield from checkpoint.read([name])


def write_index(directory: Path, files: Mapping[str, str], total: int) -> None:
    """Write transformers' index from tensors to files; ``total`` is the bytes of all tensors."""
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(files)})
