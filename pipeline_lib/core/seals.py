"""Seals, by which a reader detects that an artifact is damaged or belongs elsewhere.

A file's seal is in the file: its schema, its path in the project, its model, and its SHA-256. A
directory has the seal in ``seal.json``, with the SHA-256 of every file.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_lib.core import files
from pipeline_lib.core.artifacts import dumps

if TYPE_CHECKING:
    import torch

SCHEMA = 1  # raised when an artifact's meaning changes; docs/artifacts.md describes each
KEY, FILE = "seal", "seal.json"
METADATA = "sparseline"  # key of a safetensors file's metadata
_OPEN = "sha256:" + "0" * 64  # stands for the digest while it is computed
THREADS = 8  # threads that hash a directory's files: hashing is slower than a disk


class BrokenSealError(Exception):
    """The reason why an artifact cannot be used, as the end of a sentence."""


@dataclass(frozen=True)
class Seal:
    """An artifact's description of itself."""

    file: str  # its path in the project
    model: str | None  # digest of the model that it was made for; None: of no model
    schema: int = SCHEMA
    sha256: str = _OPEN  # of the file while it contains this value


def close(raw: bytes) -> bytes:
    """The file's bytes, with the digest in the place of ``_OPEN``."""
    return raw.replace(_OPEN.encode(), f"sha256:{hashlib.sha256(raw).hexdigest()}".encode(), 1)


def check(raw: bytes, told: Any, file: str) -> Seal:
    """The seal of a file, after a check.

    Args:
        raw: the file's bytes.
        told: the file's seal as an object.
        file: the file's path in the project.

    Raises:
        BrokenSealError: it has another version, is damaged, or is another artifact.
    """
    if not isinstance(told, Mapping) or told.get("schema") != SCHEMA:
        raise BrokenSealError("was written by another version of Sparseline, or is damaged")
    digest = told.get("sha256")
    if not isinstance(digest, str) or close(raw.replace(digest.encode(), _OPEN.encode(), 1)) != raw:
        raise BrokenSealError("is damaged or was changed (its checksum differs)")
    if told.get("file") != file:
        raise BrokenSealError(f"was written as {told.get('file')}")
    return Seal(file, told.get("model"))


def sealed_json(value: Mapping[str, Any], seal: Seal) -> bytes:
    """A JSON file with its seal.

    Raises:
        SparselineError: the values contain NaN or infinity.
    """
    return close(dumps({**value, KEY: asdict(seal)}, Path(seal.file)).encode())


def parse_json(raw: bytes, file: str) -> tuple[dict[str, Any], Seal]:
    """A JSON artifact without its seal, and the seal.

    Raises:
        BrokenSealError: as ``check``, or it is not a JSON object.
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BrokenSealError(f"is damaged ({error})") from error
    told = value.pop(KEY, None) if isinstance(value, dict) else None
    return value, check(raw, told, file)


def sealed_tensors(tensors: Mapping[str, "torch.Tensor"], facts: Mapping[str, Any], seal: Seal) -> bytes:
    """A safetensors file with its seal. Facts and seal go into a single metadata key, because several
    keys have a random order.
    """
    from safetensors.torch import save

    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return close(save(ordered, {METADATA: json.dumps({**facts, KEY: asdict(seal)}, sort_keys=True)}))


def parse_facts(raw: bytes, file: str) -> tuple[dict[str, Any], Seal]:
    """The facts of a safetensors artifact, and its seal, which covers the tensors, too.

    Raises:
        BrokenSealError: as ``check``, or it is not such a file.
    """
    try:
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        facts = dict(json.loads(header["__metadata__"][METADATA]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenSealError(f"is damaged ({error})") from error
    return facts, check(raw, facts.pop(KEY, None), file)


def digests(directory: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Path in the directory -> SHA-256, for all files except hidden ones and the seal; ``known`` ones
    are not read.

    Raises:
        SparselineError: something there is not a regular file.
    """
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if name != FILE and not path.name.startswith(".") and (path.is_symlink() or not path.is_dir()):
            found[name] = path
    unknown = {name: path for name, path in found.items() if name not in (known or {})}
    with ThreadPoolExecutor(THREADS) as pool:
        hashed = dict(zip(unknown, pool.map(files.sha256, unknown.values()), strict=True))
    return {name: hashed.get(name) or (known or {})[name] for name in found}


def compare(recorded: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Check a directory's files.

    Raises:
        BrokenSealError: a file is missing, damaged or superfluous.
    """
    for name in sorted({*recorded, *found}):
        if name not in found:
            raise BrokenSealError(f"lacks {name}")
        if name not in recorded:
            raise BrokenSealError(f"holds {name}, which no stage wrote")
        if recorded[name] != found[name]:
            raise BrokenSealError(f"holds a damaged or changed {name} (its checksum differs)")
