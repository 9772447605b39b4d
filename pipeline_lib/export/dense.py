"""``dense``: the ordinary Hugging Face checkpoint."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline_lib.core.artifacts import read_json, replacing, write_json
from pipeline_lib.export import tensorfile
from pipeline_lib.export.shards import copy, write_index
from pipeline_lib.export.tensorfile import Blob

CONFIG = "config.json"
METADATA = {"format": "pt"}  # transformers asks for it


def write(
    out: Path,
    shards: Mapping[str, Mapping[str, Blob]],
    tensors: Callable[[str], Iterable[tuple[str, torch.Tensor]]],
    others: list[Path],
    indexed: bool,
    config: Mapping[str, Any] | None = None,
) -> None:
    """A directory for ``from_pretrained``; one tensor is in memory at a time.

    Args:
        shards: file name -> what it holds.
        tensors: file name -> its tensors, asked for once and in order.
        others: config, tokenizer and the like, copied.
        indexed: whether there is an index of files (there must be for more than one).
        config: keys added to config.json.
    """
    with replacing(out) as directory:
        directory.mkdir()
        for name, blobs in shards.items():
            tensorfile.write(directory / name, blobs, METADATA, tensors(name))
        if indexed:
            files = {tensor: name for name, blobs in shards.items() for tensor in blobs}
            write_index(directory, files, sum(blob.bytes for blobs in shards.values() for blob in blobs.values()))
        copy(others, directory)
        if config:
            write_json(directory / CONFIG, read_json(directory / CONFIG) | dict(config))


def file_bytes(shards: Mapping[str, Mapping[str, Blob]]) -> int:
    """Bytes of all weight files, without writing them."""
    return sum(tensorfile.size(blobs, METADATA) for blobs in shards.values())
