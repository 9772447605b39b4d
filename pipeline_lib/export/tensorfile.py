"""safetensors files, written and read tensor by tensor: one tensor is in memory at a time, and every
byte read is checked.

The official package writes a file from all its tensors at once. It maps files into memory, where
damage goes unnoticed.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, RootModel

from pipeline_lib.core.artifacts import replacing
from pipeline_lib.core.errors import SparselineError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
HEADER = 100_000_000  # bytes, as the official package has it
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Blob:
    """Description of one tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def blob(tensor: torch.Tensor) -> Blob:
    return Blob(tensor.dtype, tuple(tensor.shape))


def header(blobs: Mapping[str, Blob], metadata: Mapping[str, str]) -> bytes:
    """Length and header like the official package's: widest types first, then by name, padded to 8
    bytes.
    """
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in sorted(blobs, key=lambda name: (-blobs[name].dtype.itemsize, name)):
        start, end = end, end + blobs[name].bytes
        described[name] = {
            "dtype": NAMES[blobs[name].dtype],
            "shape": list(blobs[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def size(blobs: Mapping[str, Blob], metadata: Mapping[str, str]) -> int:
    """Bytes of the whole file."""
    return len(header(blobs, metadata)) + sum(one.bytes for one in blobs.values())


def raw(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes (little-endian, like every machine that torch supports)."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class Writer:
    """An open file; its tensors may come in any order."""

    def __init__(self, file: BinaryIO, blobs: Mapping[str, Blob], metadata: Mapping[str, str]) -> None:
        self._file = file
        self._blobs = blobs
        first = header(blobs, metadata)
        file.write(first)
        self._data = len(first)
        self._offsets = {
            name: one["data_offsets"][0]
            for name, one in json.loads(first[8:]).items()
            if name != "__metadata__"
        }
        self.missing = set(blobs)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        if blob(tensor) != self._blobs[name]:
            raise RuntimeError(f"{name}: planned {self._blobs[name]}, not {blob(tensor)}")
        self._file.seek(self._data + self._offsets[name])
        self._file.write(raw(tensor))
        self.missing.remove(name)

    def amend(self, metadata: Mapping[str, str]) -> bytes:
        """Replace the metadata by others of the same length, and return the header."""
        final = header(self._blobs, metadata)
        if len(final) != self._data:
            raise RuntimeError("metadata of another length")
        self._file.seek(0)
        self._file.write(final)
        return final


@contextmanager
def writing(path: Path, blobs: Mapping[str, Blob], metadata: Mapping[str, str]) -> Iterator[Writer]:
    """Open a file to write, which gets its name when it is complete."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        writer = Writer(file, blobs, metadata)
        yield writer
        if writer.missing:
            raise RuntimeError(f"{path}: {sorted(writer.missing)} were not written")


def write(
    path: Path,
    blobs: Mapping[str, Blob],
    metadata: Mapping[str, str],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> None:
    with writing(path, blobs, metadata) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)


class Described(BaseModel):
    """Description of a tensor in a header."""

    model_config = ConfigDict(extra="forbid")

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


class Header(RootModel[dict[str, Described | dict[str, str]]]):
    """A header; ``__metadata__`` is its only entry that is not a tensor."""


class Reader:
    """An open file with a checked header; ``metadata`` and ``blobs`` are its content."""

    def __init__(self, file: BufferedReader, path: Path, length: int, sha256: str) -> None:
        self._file = file
        self._path = path
        found = path.stat().st_size
        if found != length:
            raise SparselineError(
                f"{path} has {found:,} bytes instead of {length:,}: it is truncated or damaged; copy it"
                " again."
            )
        prefix = file.read(8)
        text = file.read(min(int.from_bytes(prefix, "little"), length, HEADER))
        if hashlib.sha256(prefix + text).hexdigest() != sha256:
            raise SparselineError(f"{path} is damaged (its header's checksum differs); copy it again.")
        self._data = len(prefix) + len(text)
        try:
            header = Header.model_validate_json(text, strict=True).root
            metadata = header.pop("__metadata__", {})
            described = {name: one for name, one in header.items() if isinstance(one, Described)}
            if not isinstance(metadata, dict) or len(described) < len(header):
                raise ValueError("metadata must be texts, and tensors described")
            self.metadata = metadata
            self.blobs = {name: Blob(DTYPES[one.dtype], tuple(one.shape)) for name, one in described.items()}
            self._offsets = {name: one.data_offsets[0] for name, one in described.items()}
            end = 0
            for name in sorted(described, key=lambda name: tuple(described[name].data_offsets)):
                begin, (start, stop) = end, described[name].data_offsets
                end = begin + self.blobs[name].bytes
                if (start, stop) != (begin, end):
                    raise ValueError(f"{name} does not lie where its shape says")
            if self._data + end != length:
                raise ValueError("the file is longer or shorter than its tensors")
        except (ValueError, KeyError) as error:  # a ValidationError too
            reason = " ".join(str(error).split())[:200]
            raise SparselineError(
                f"{path} is not a safetensors file ({reason}); take it from another source."
            ) from error

    def read(self, name: str) -> torch.Tensor:
        one = self.blobs[name]
        data = np.empty(one.bytes, np.uint8)
        self._file.seek(self._data + self._offsets[name])
        if self._file.readinto(data.data) != one.bytes:
            raise SparselineError(f"{self._path} ended while it was read; copy it again.")
        if not one.bytes:  # a view of no bytes does not have this shape
            return torch.empty(one.shape, dtype=one.dtype)
        return torch.from_numpy(data).view(one.dtype).reshape(one.shape)


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of the tensors' bytes, one after another."""
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(raw(tensor))
    return sha256.hexdigest()
