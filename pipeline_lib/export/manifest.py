"""The manifest of a bitmask checkpoint, with the checksums of all other files and its own."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline_lib.core import files
from pipeline_lib.core.artifacts import write_text
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.files import check_inside, is_plain
from pipeline_lib.models.files import INDEX

MANIFEST = "bitmask.json"
FORMAT, VERSION = "sparseline-bitmask", 1
SUFFIX = ".bitmask.safetensors"  # no name under which transformers would look for weights


class Weights(BaseModel):
    """Entry of one file of weights."""

    model_config = ConfigDict(extra="forbid")

    bytes: int = Field(ge=0)
    dense: str  # the file that it becomes
    header_sha256: str


class Manifest(BaseModel):
    """Content of bitmask.json."""

    model_config = ConfigDict(extra="forbid")

    format: str
    version: int
    weights: dict[str, Weights]  # by the names of their files
    files: dict[str, str]  # name -> SHA-256 of every other file
    indexed: bool  # the dense weights have an index
    sha256: str


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write(directory: Path, value: dict[str, Any]) -> None:
    """Write the manifest, after all ``files``; its digest covers the text without the digest."""
    whole = {"format": FORMAT, "version": VERSION, **value}
    write_text(
        directory / MANIFEST, _text(whole | {"sha256": hashlib.sha256(_text(whole).encode()).hexdigest()})
    )


def add(directory: Path, name: str) -> None:
    """Add the checksum of one more file."""
    value = read(directory).model_dump(include={"weights", "files", "indexed"})
    value["files"][name] = files.sha256(directory / name)
    write(directory, value)


def read(directory: Path) -> Manifest:
    """The manifest, after a check of it and of every file without weights.

    Raises:
        SparselineError: something is missing, damaged, or of another version.
    """
    path = directory / MANIFEST
    try:
        text = files.read(path, files.LARGE)
    except OSError as error:
        raise SparselineError(
            f"{directory} is not a bitmask checkpoint: {MANIFEST} cannot be read ({error.strerror})."
        ) from error
    try:
        value: dict[str, Any] = json.loads(text)
        bare = {key: one for key, one in value.items() if key != "sha256"}
        whole = (
            value["sha256"] == hashlib.sha256(_text(bare).encode()).hexdigest()
            and _text(value).encode() == text
        )
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise SparselineError(f"{path} is damaged (its checksum differs); copy it again.")
    found = value.get("format"), value.get("version")
    if found != (FORMAT, VERSION):
        raise SparselineError(
            f"{path} is of format {found[0]!r}, version {found[1]!r}; this reads {FORMAT!r}, version"
            f" {VERSION}."
        )
    try:
        checked = Manifest.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise SparselineError(
            f"{path}: {place}: {first['msg']}; take the checkpoint from another source."
        ) from error
    names = [*checked.weights, *(entry.dense for entry in checked.weights.values())]
    if any("/" in name or not is_plain(name) for name in names) or not all(map(is_plain, checked.files)):
        raise SparselineError(
            f"{path} names files outside its directory; take the checkpoint from another source."
        )
    written = [*names, *checked.files, INDEX, MANIFEST]
    if len(set(written)) < len(written):
        raise SparselineError(f"{path} names a file twice; take the checkpoint from another source.")
    for name in (*checked.weights, *checked.files):
        check_inside(directory, directory / name)
    for name, digest in checked.files.items():
        try:
            same = files.sha256(directory / name) == digest
        except OSError as error:
            raise SparselineError(
                f"{directory / name} cannot be read ({error.strerror}); copy it again."
            ) from error
        if not same:
            raise SparselineError(
                f"{directory / name} is damaged or was changed (its checksum differs); copy it again."
            )
    return checked
