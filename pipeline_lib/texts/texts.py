"""Sources of texts: standard-library modules, local files, or hub datasets. Each source gives
documents in a fixed order.
"""

import hashlib
import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline_lib.core import files
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.files import check_inside
from pipeline_lib.core.params import Conflict, Params
from pipeline_lib.models.settings import COMMIT
from pipeline_lib.models.start import Place
from pipeline_lib.texts.chat import Message, check_messages, is_blank
from pipeline_lib.texts.records import (
    READERS,
    Placed,
    check_characters,
    decode,
    holds_records,
    kind,
    pick,
    read_records,
    unpack,
)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MOST = 200_000  # files and directories of a text
# required keys, and optional keys
HUB_KEYS = {"id", "split", "field"}, {"config", "files", "join", "revision"}


class GeneratedParams(Params):
    """Key ``generated`` of a text that the source model writes."""

    # kind of the source of the prompts, which the text's other keys describe
    prompts: Literal["stdlib", "files", "hub"]
    prompt_tokens: int = Field(ge=1)  # of a document's opening; a chat's prompt is all before its last answer
    new_tokens: int = Field(ge=1)  # at most
    temperature: float = Field(ge=0)  # 0: the most likely token
    batch_rows: int = Field(ge=1)
    seed: int


class TextParams(Params):
    """One entry of the section ``texts``. DVC watches ``path``, so a change of it reruns the stages
    that depend on it.
    """

    use: Literal["calibrate", "evaluate"]
    kind: Literal["stdlib", "files", "hub", "generated"]
    path: Path
    # stdlib: list in path; hub: entry of path (data/hub.json), or null with the entry given below
    name: str | None
    glob: str | None  # files: which files below the directory `path`
    field: str | None  # files: field of the records
    # hub: {id, split, field[, config or files, join, revision]} of any other dataset
    hub: dict[str, str | bool] | None
    revision: str | None  # hub: commit; null takes the entry's
    generated: GeneratedParams | None  # needed for kind: generated
    chat_template: bool
    # where the start token stands; null: where the model family's usual evaluation has it
    start: Place | None
    packing: Literal["concatenate", "document"]
    rows: int | None = Field(ge=1)  # null: all of an evaluation text
    length: int = Field(ge=2)
    distinct: int = Field(ge=1)  # minimum number of different tokens in the rows
    held_out: float = Field(ge=0, lt=1)
    # at most so many further calibration samples, which only train: four lanes share them equally
    training: int = Field(ge=0, multiple_of=4)
    seed: int | None

    @model_validator(mode="after")
    def _counts_calibration_rows(self) -> Self:
        if self.rows is None and self.use == "calibrate":
            raise Conflict(
                "only a text with use: evaluate may have rows: null (the whole text); give the number"
                " of rows",
                "use",
                "rows",
            )
        return self

    @model_validator(mode="after")
    def _trains_on_calibration_text(self) -> Self:
        if self.training and self.use != "calibrate":
            raise Conflict(
                "only a text with use: calibrate has samples for training; give 0", "use", "training"
            )
        return self

    @property
    def samples(self) -> int | None:
        """Maximal number of samples that are drawn; None: the whole text."""
        return None if self.rows is None else self.rows + self.training

    @model_validator(mode="after")
    def _says_how_it_is_generated(self) -> Self:
        if (self.kind == "generated") != (self.generated is not None):
            raise Conflict(
                "kind: generated and the section `generated` go together; give both, or another kind and"
                " null",
                "kind",
                "generated",
            )
        if self.generated is not None and self.rows is None:
            raise Conflict("a generated text has no fixed length; give the number of rows", "kind", "rows")
        return self

    @property
    def source(self) -> Literal["stdlib", "files", "hub"]:
        """Kind of the source."""
        if self.kind != "generated":
            return self.kind
        assert self.generated is not None  # validated
        return self.generated.prompts


@dataclass(frozen=True)
class Texts:
    """Documents or chats (by ``chat_template``), and their provenance."""

    documents: list[str]
    chats: list[list[Message]]
    places: list[str]  # where each document or chat was read
    provenance: dict[str, Any]


def read_texts(params: TextParams) -> Texts:
    """All documents of a source; empty ones are skipped and counted.

    Raises:
        SparselineError: the source cannot be found or read, has no text, or does not match the
            parameters.
    """
    for key, kinds in {"glob": {"files"}, "field": {"files"}, "hub": {"hub"}, "revision": {"hub"}}.items():
        if getattr(params, key) is not None and params.source not in kinds:
            raise SparselineError(
                f"The text at {params.path} has `{key}`, which kind: {params.source} does not read; set it to"
                " null."
            )
    read = {"stdlib": _stdlib, "files": _files, "hub": _hub}[params.source]
    placed, provenance = read(params)
    documents: list[str] = []
    chats: list[list[Message]] = []
    places = []
    empty = 0
    for where, value in placed:
        if value is not None:
            check_characters(value, where)
        if isinstance(value, list):
            value = check_messages(value, where)
        if value is None or (
            not value.strip() if isinstance(value, str) else isinstance(value, list) and is_blank(value)
        ):
            empty += 1
            continue
        if params.chat_template and isinstance(value, str):
            raise SparselineError(
                f"{where}: chat_template is true, but this is plain text; give lists of {{role, content}}"
                " messages."
            )
        if not params.chat_template and isinstance(value, list):
            raise SparselineError(
                f"{where}: this is a list of messages; set chat_template: true, or choose a `field` with"
                " text."
            )
        if isinstance(value, str):
            documents.append(value)
        elif isinstance(value, list):
            chats.append(value)
        else:
            raise SparselineError(
                f"{where}: the text's `field` holds {kind(value)}, neither text nor a list of messages."
            )
        places.append(where)
    if not places:
        raise SparselineError(
            f"{params.source} text at {params.path} is empty; give a source with at least one non-empty"
            " document."
        )
    return Texts(
        documents,
        chats,
        places,
        provenance | {"kind": params.source, "documents": len(places), "empty": empty},
    )


def _entries(path: Path, name: str | None) -> Any:
    try:
        entries = json.loads(files.text(path, "utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SparselineError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(entries, dict) or name not in entries:
        has = ", ".join(sorted(entries)) if isinstance(entries, dict) else "no entries at all"
        raise SparselineError(f"{path} has no entry {name!r}; it has: {has}.")
    return entries[name]


def _stdlib(params: TextParams) -> tuple[Iterable[Placed], dict[str, Any]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = _entries(params.path, params.name)
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise SparselineError(
            f'{params.path}: the entry {params.name!r} must be a list of modules, such as ["csv.py"].'
        )
    documents = []
    hashes = {}
    for module in modules:
        parts = Path(module).parts
        if Path(module).is_absolute() or {"..", "site-packages", "dist-packages"} & set(parts):
            raise SparselineError(
                f"{params.path}: {module!r} is outside the standard library; name files below {root}, such as"
                " csv.py."
            )
        try:
            raw = files.read(root / module)
        except OSError as error:
            raise SparselineError(
                f"Python {platform.python_version()} here lacks the standard library's {module} ({error})."
            ) from error
        documents.append((module, decode(root / module, raw)))
        hashes[module] = hashlib.sha256(raw).hexdigest()
    return documents, {"sha256": hashes, "python": platform.python_version()}


def _files(params: TextParams) -> tuple[Iterable[Placed], dict[str, Any]]:
    """Records of JSON and Parquet files, one document each; any other file is one document."""
    paths = _listed(params.path, params.glob)
    plain = next((path for path in paths if not holds_records(path)), None)
    if params.field is not None and plain is not None:
        raise SparselineError(
            f"{plain} is read as one plain text, but the text's `field` is {params.field!r}; set field: null,"
            " or choose files of records "
            f'({", ".join(READERS)}, also compressed) with `glob`, such as "*.jsonl".'
        )
    hashes = {}
    documents: list[Placed] = []
    for path in paths:
        try:
            raw = files.read(path)
        except OSError as error:
            raise SparselineError(f"{path} cannot be read ({error.strerror}).") from error
        hashes[str(path.relative_to(params.path)) if path != params.path else path.name] = hashlib.sha256(
            raw
        ).hexdigest()
        raw = unpack(path, raw)
        documents += (
            read_records(path, raw, params.field) if holds_records(path) else [(str(path), decode(path, raw))]
        )
    return documents, {"sha256": hashes}


def _listed(root: Path, glob: str | None) -> list[Path]:
    """The files of a text, sorted: all that DVC hashes with ``root``, and nothing else.

    Names that begin with a dot are passed over. Links to files are read as DVC reads them; links to
    directories are refused, since DVC does not follow them.
    """
    if str(root).startswith("~"):
        raise SparselineError(f"The text's path {root} is not expanded; write the home directory in full.")
    if not root.is_dir():
        if glob is not None and root.exists():
            raise SparselineError(
                f"{root} is a file, but the text has glob: {glob}; set it to null, or give the directory as"
                " path."
            )
        if not root.exists():
            raise SparselineError(f"No file matches {root}; correct the text's path or glob.")
        return [_named(root)]
    if glob is not None and (Path(glob).is_absolute() or ".." in Path(glob).parts):
        raise SparselineError(
            f"The text's glob {glob!r} reaches outside its path {root}, where DVC does not watch; correct"
            " the two."
        )
    try:
        found = _visible(root, root.glob(glob if glob is not None else "**/*"))
    except (ValueError, NotImplementedError, IndexError) as error:
        raise SparselineError(
            f'The text\'s glob {glob!r} is not a pattern ({error}); write one such as "*.jsonl".'
        ) from error
    paths = []
    for path in found:
        for part in (path, *path.parents[: len(path.relative_to(root).parts) - 1]):
            if part.is_dir() and part.is_symlink():
                raise SparselineError(
                    f"{part} is a link to a directory, which DVC does not follow; copy it, or give its target"
                    " as path."
                )
        if not path.is_dir():
            check_inside(root, path)
            paths.append(_named(path))
        elif not os.access(path, os.R_OK | os.X_OK):
            raise SparselineError(
                f"The directory {path} cannot be read; change its permissions, or exclude it by the text's"
                " glob."
            )
    if not paths:
        some = [str(path.relative_to(root)) for path in _visible(root, root.rglob("*")) if path.is_file()][:2]
        has = f"it has, for example, {' and '.join(some)}" if some else "it has no file"
        raise SparselineError(
            f"No file matches {root / (glob or '**/*')}; correct the text's path or glob: {has}."
        )
    return paths


def _visible(root: Path, paths: Iterable[Path]) -> list[Path]:
    found = []
    for number, path in enumerate(paths):
        if number == MOST:
            raise SparselineError(
                f"{root} holds more than {MOST:,} files; give a directory of texts as path, or fewer and"
                " larger files."
            )
        if not any(part.startswith(".") for part in path.relative_to(root).parts):
            found.append(path)
    return sorted(found)


def _named(path: Path) -> Path:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise SparselineError(f"The file name {str(path)!r} is not UTF-8; rename the file.") from error
    return path


def _hub(params: TextParams) -> tuple[Iterable[Placed], dict[str, Any]]:
    """Rows of a hub dataset's split. With ``join`` they become one text, as in the papers'
    perplexities on WikiText-2 and PTB.
    """
    from datasets import load_dataset  # imported here: it takes seconds, and local texts do not need it
    from datasets.exceptions import DatasetsError

    if params.hub is not None and params.name is not None:
        raise SparselineError(
            f"A text of kind: hub has both `hub` and name: {params.name}; set one of them to null."
        )
    where = "the text's `hub`" if params.hub is not None else f"{params.path}, entry {params.name!r}"
    entry = _checked(params.hub if params.hub is not None else _entries(params.path, params.name), where)
    revision = params.revision or entry.get("revision")
    if revision is None or not COMMIT.fullmatch(str(revision)):
        raise SparselineError(
            f"{where}: the dataset {entry['id']!r} has the revision {revision!r}, which is not a commit"
            " and may change under cached results; set the text's `revision` to 40 hexadecimal"
            f" digits{_newest(entry['id'])}."
        )
    source = (
        {"data_files": {entry["split"]: entry["files"]}}
        if "files" in entry
        else {"name": entry.get("config")}
    )
    try:
        rows = load_dataset(entry["id"], split=entry["split"], revision=revision, **source)
        names = rows.column_names
        column = entry["field"] if entry["field"] in names else entry["field"].split(".")[0]
        if column not in names:
            raise KeyError(f"no column {column!r}; it has: {', '.join(names)}")
        values = list(rows[column])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).splitlines()[:1]) or type(error).__name__
        raise SparselineError(
            f"The dataset {entry['id']!r} cannot be loaded from the hub: {reason}"
        ) from error
    placed = [
        (f"{entry['id']}, row {n}", pick({column: value}, entry["field"], f"{entry['id']}, row {n}"))
        for n, value in enumerate(values, 1)
    ]
    if entry.get("join"):
        placed = [(entry["id"], "\n\n".join(_strings(placed)))]
    digest = hashlib.sha256(json.dumps([value for _, value in placed], default=str).encode()).hexdigest()
    return placed, {"dataset": entry, "revision": revision, "fingerprint": digest}


def _strings(placed: Iterable[Placed]) -> Iterator[str]:
    for where, value in placed:
        if not isinstance(value, str | None):
            raise SparselineError(f"{where}: `join` is for text, but the field holds {kind(value)}.")
        yield value or ""


def _checked(entry: Any, where: str) -> dict[str, Any]:
    """Check an entry and return it. It must have the needed keys, no unknown ones, and no path on
    this machine, which DVC would have to watch.
    """
    needed, possible = HUB_KEYS
    if not isinstance(entry, dict):
        raise SparselineError(f"{where} must be a mapping with the keys {', '.join(sorted(needed))}.")
    if unknown := sorted(entry.keys() - needed - possible):
        raise SparselineError(
            f"{where} has the unknown key {unknown[0]!r}; it may have:"
            f" {', '.join(sorted(needed | possible))}."
        )
    if missing := sorted(needed - entry.keys()):
        raise SparselineError(f"{where} has no {missing[0]!r}; add it.")
    if wrong := sorted(
        key for key, value in entry.items() if not isinstance(value, bool if key == "join" else str)
    ):
        raise SparselineError(
            f"{where}: {wrong[0]} = {entry[wrong[0]]!r} must be"
            f" {'true or false' if wrong[0] == 'join' else 'a text'}."
        )
    if "config" in entry and "files" in entry:
        raise SparselineError(
            f"{where} has both 'config' and 'files'; files are named by their path in the repository alone,"
            " so drop 'config'."
        )
    if Path(entry["id"]).exists() or not HUB_ID.fullmatch(entry["id"]):
        raise SparselineError(
            f"{where}: id = {entry['id']!r} is not a dataset of the hub (owner/name); files of this machine"
            " are read with kind: files, which DVC watches."
        )
    files = entry.get("files", "")
    if "://" in files or files.startswith(("/", "~")) or ".." in Path(files).parts:
        raise SparselineError(
            f"{where}: files = {files!r} is outside the dataset's repository; give a path in it."
        )
    return entry


def _newest(hub_id: str) -> str:
    """What the hub says about the newest commit, for a message; a hint if the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return f" (the newest commit is {HfApi().dataset_info(hub_id, timeout=10).sha})"
    except (OSError, ValueError, HfHubHTTPError):
        return " (the dataset's page has them under Files, History)"
