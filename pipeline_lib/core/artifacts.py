"""Atomic, byte-deterministic artifacts: safetensors and JSON, each with a schema version."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline_lib.core.errors import SparselineError

SCHEMA = 1  # raised when a file's meaning changes; docs/artifacts.md describes each


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write (file or directory), renamed over it only when the body ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    _remove(temporary)
    try:
        yield temporary
        if path.is_dir():  # a file is replaced in one step; a directory cannot be
            _remove(path)
        temporary.replace(path)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Sorted keys, so that equal values are equal bytes; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SparselineError(f"{path} cannot be read ({error}); run `dvc repro` to make it again.") from error


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any] | None = None) -> None:
    """One safetensors file. Facts go into a single metadata key, since several keys come out in random order."""
    metadata = {"sparseline": json.dumps({"schema": SCHEMA, **(facts or {})}, sort_keys=True)}
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with replacing(path) as temporary:
        save_file(ordered, temporary, metadata=metadata)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and facts of one of our safetensors files.

    Raises:
        SparselineError: the file is missing, damaged, or of another schema version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("sparseline", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise SparselineError(f"{path} cannot be read ({error}); run `dvc repro` to make it again.") from error
    if facts.pop("schema", None) != SCHEMA:
        raise SparselineError(f"{path} was written by another version of Sparseline; run `dvc repro` to make it again.")
    return tensors, facts


def block_file(directory: Path, block: int) -> Path:
    """Where an artifact of one file per block keeps a block's tensors."""
    return directory / f"block-{block:03d}.safetensors"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
