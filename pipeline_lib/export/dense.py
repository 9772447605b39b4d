"""``dense``: the ordinary Hugging Face checkpoint."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline_lib.core.artifacts import read_json, replacing, write_json
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.export import tensorfile
from pipeline_lib.export.shards import write_index
from pipeline_lib.export.tensorfile import Blob
from pipeline_lib.models.checkpoint import CONFIG, copy_files

METADATA = {"format": "pt"}  # transformers requires it
Others = tuple[Path, Sequence[str]]  # a directory and names of files below it


def write(
    out: Path,
    shards: Mapping[str, Mapping[str, Blob]],
    tensors: Callable[[str], Iterable[tuple[str, torch.Tensor]]],
    others: Others,
    indexed: bool,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a directory for ``from_pretrained``; one tensor is in memory at a time.

    Args:
        shards: file name -> the descriptions of its tensors.
        tensors: file name -> its tensors, requested once and in order.
        others: config, tokenizer and the like: a directory, and the names of files below it to
            copy.
        indexed: whether to write an index of files (required for more than one).
        config: keys to add to config.json.
    """
    with replacing(out) as directory:
        directory.mkdir()
        for name, blobs in shards.items():
            tensorfile.write(directory / name, blobs, METADATA, tensors(name))
        if indexed:
            files = {tensor: name for name, blobs in shards.items() for tensor in blobs}
            write_index(
                directory, files, sum(blob.bytes for blobs in shards.values() for blob in blobs.values())
            )
        copy_files(others[1], others[0], directory)
        if config:
            write_json(directory / CONFIG, read_json(directory / CONFIG) | dict(config))


def check_unused(out: Path) -> None:
    """Refuse to overwrite a directory.

    Raises:
        SparselineError: ``out`` exists and is not an empty directory.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SparselineError(f"{out} already exists; give a new or empty directory.")


def file_bytes(shards: Mapping[str, Mapping[str, Blob]]) -> int:
    """Bytes of all weight files, computed without writing them."""
    return sum(tensorfile.size(blobs, METADATA) for blobs in shards.values())
