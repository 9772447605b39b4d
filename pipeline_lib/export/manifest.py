"""The file that vouches for all others of a bitmask checkpoint, and for itself."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline_lib.core.artifacts import write_text
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.files import is_plain, sha256

MANIFEST = "bitmask.json"
FORMAT, VERSION = "sparseline-bitmask", 1
SUFFIX = ".bitmask.safetensors"  # no name under which transformers would look for weights


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write(directory: Path, value: dict[str, Any]) -> None:
    """Last of all: ``files`` are checked from here on, and the digest covers the text without itself."""
    whole = {"format": FORMAT, "version": VERSION, **value}
    write_text(directory / MANIFEST, _text(whole | {"sha256": hashlib.sha256(_text(whole).encode()).hexdigest()}))


def add(directory: Path, name: str) -> None:
    """Vouch for one more file."""
    value = read(directory)
    write(directory, {key: value[key] for key in ("weights", "indexed")} | {"files": value["files"] | {name: sha256(directory / name)}})


def read(directory: Path) -> dict[str, Any]:
    """The manifest, after a look at it and at every file that is not weights.

    Raises:
        SparselineError: something is missing, damaged, or of another version.
    """
    path = directory / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        raise SparselineError(f"{directory} is no bitmask checkpoint: {MANIFEST} cannot be read ({error.strerror}).") from error
    try:
        value: dict[str, Any] = json.loads(text)
        bare = {key: one for key, one in value.items() if key != "sha256"}
        whole = value["sha256"] == hashlib.sha256(_text(bare).encode()).hexdigest() and _text(value).encode() == text
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise SparselineError(f"{path} is damaged (its checksum differs); copy it again.")
    found = value.get("format"), value.get("version")
    if found != (FORMAT, VERSION):
        raise SparselineError(f"{path} is of format {found[0]!r}, version {found[1]!r}; this reads {FORMAT!r}, version {VERSION}.")
    weights = [*value["weights"], *(entry["dense"] for entry in value["weights"].values())]
    if any(Path(name).name != name for name in weights) or not all(map(is_plain, value["files"])):
        raise SparselineError(f"{path} names files outside its directory; take the checkpoint from another source.")
    for name, digest in value["files"].items():
        try:
            same = sha256(directory / name) == digest
        except OSError as error:
            raise SparselineError(f"{directory / name} cannot be read ({error.strerror}); copy it again.") from error
        if not same:
            raise SparselineError(f"{directory / name} is damaged or was changed (its checksum differs); copy it again.")
    return value
