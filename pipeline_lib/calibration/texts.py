"""Where texts come from: standard-library modules, local files, or hub datasets. Each source gives documents in a fixed order."""

import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.params import Params

Document = str | list[dict[str, Any]]  # plain text, or chat messages {"role", "content"}


class TextParams(Params):
    """One entry of section ``texts``. ``path`` is what DVC watches, so that editing it reruns what depends on it."""

    use: Literal["calibrate", "evaluate"]
    kind: Literal["stdlib", "files", "hub"]
    path: Path
    name: str | None  # stdlib: list in path; hub: entry of path (data/hub.json), or null with the entry given below
    glob: str | None  # files: which files below the directory `path`
    field: str | None  # files: field of .jsonl records
    hub: dict[str, str | bool] | None  # hub: {id, config, split, field[, files, join]} of any other dataset
    revision: str | None  # hub: commit
    chat_template: bool
    packing: Literal["concatenate", "document"]
    rows: int = Field(ge=1)
    length: int = Field(ge=2)
    held_out: float = Field(ge=0, lt=1)
    seed: int | None


@dataclass(frozen=True)
class Texts:
    """Documents with what is needed to tell later which they were."""

    documents: list[Document]
    provenance: dict[str, Any]


def read_texts(params: TextParams) -> Texts:
    """All documents of a source.

    Raises:
        SparselineError: the source cannot be found or read, or holds no text.
    """
    read = {"stdlib": _stdlib, "files": _files, "hub": _hub}[params.kind]
    texts = read(params)
    documents = [d for d in texts.documents if (d.strip() if isinstance(d, str) else d)]
    if not documents:
        raise SparselineError(f"{params.kind} text at {params.path} is empty; give a source with at least one non-empty document.")
    return Texts(documents, texts.provenance | {"kind": params.kind, "documents": len(documents)})


def _entries(path: Path, name: str | None) -> Any:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SparselineError(f"{path} cannot be read as JSON ({error}).") from error
    if name not in entries:
        raise SparselineError(f"{path} has no entry {name!r}; it has: {', '.join(sorted(entries))}.")
    return entries[name]


def _stdlib(params: TextParams) -> Texts:
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: list[Document] = []
    hashes = {}
    for module in _entries(params.path, params.name):
        try:
            raw = (root / module).read_bytes()
        except OSError as error:
            raise SparselineError(f"Python {platform.python_version()} here lacks the standard library's {module} ({error}).") from error
        documents.append(raw.decode("utf-8"))
        hashes[module] = hashlib.sha256(raw).hexdigest()
    return Texts(documents, {"sha256": hashes, "python": platform.python_version()})


def _files(params: TextParams) -> Texts:
    """Text files are one document each; a .jsonl line is one document, its ``field`` a string or a list of chat messages."""
    pattern = params.glob or "**/*"
    paths = sorted(path for path in params.path.glob(pattern) if path.is_file()) if params.path.is_dir() else [params.path]
    if not paths or not paths[0].exists():
        raise SparselineError(f"No file matches {params.path / pattern}; correct the text's path or glob.")
    documents: list[Document] = []
    hashes = {}
    for path in paths:
        raw = path.read_bytes()
        hashes[str(path.relative_to(params.path)) if path != params.path else path.name] = hashlib.sha256(raw).hexdigest()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SparselineError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
        documents += _records(path, text, params.field) if path.suffix == ".jsonl" else [text]
    return Texts(documents, {"sha256": hashes})


def _records(path: Path, text: str, field: str | None) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            yield json.loads(line)[field]
        except (ValueError, KeyError, TypeError) as error:
            raise SparselineError(f"{path}, line {number}: no JSON record with the field {field!r}; set the text's `field`.") from error


def _hub(params: TextParams) -> Texts:
    """Rows of a hub dataset's split; with ``join`` the rows are one text, as the papers' perplexities take WikiText-2 and PTB."""
    from datasets import load_dataset  # imported here: seconds that local texts need not pay
    from datasets.exceptions import DatasetsError

    entry = params.hub or _entries(params.path, params.name)
    try:
        source = {"name": entry.get("config")} if "files" not in entry else {"data_files": {entry["split"]: entry["files"]}}
        rows = load_dataset(entry["id"], split=entry["split"], revision=params.revision, **source)
        column = rows[entry["field"]]
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SparselineError(f"The dataset {entry.get('id')!r} cannot be loaded from the hub or as a directory: {reason}") from error
    documents: list[Document] = ["\n\n".join(column)] if entry.get("join") else list(column)
    return Texts(documents, {"dataset": entry, "revision": params.revision, "fingerprint": _digest(documents)})


def _digest(documents: list[Document]) -> str:
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()
