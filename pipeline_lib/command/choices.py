"""The options of `sparseline prune`, written into the text of params.yaml. Comments stay."""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from pipeline_lib.command.layout import MODEL, PARAMS
from pipeline_lib.core import files
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.masks.settings import Pattern
from pipeline_lib.models.settings import COMMIT
from pipeline_lib.texts.records import decode, holds_records, read_records, unpack

EMBEDDED = "embedded"  # a model's name: the tiny one that comes with Sparseline
HUB = "data/hub.json"
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# evaluation texts beside calibration text from the hub, as in both papers
EVALUATED = {"validation": "wikitext2-validation", "test": "wikitext2"}


@dataclass(frozen=True)
class Choices:
    """The options of `sparseline prune`."""

    model: str
    revision: str | None
    preset: str
    sparsity: float | None
    pattern: str | None
    calibration: str | None


def chosen(shipped: Mapping[str, bytes], choices: Choices) -> dict[str, bytes]:
    """The files of a project for these options.

    Raises:
        SparselineError: an option cannot be used.
    """
    yaml = _yaml()
    values = yaml.load(shipped[PARAMS].decode())
    values["model"] |= _model(choices)
    _selection(values, choices)
    if choices.calibration is not None:
        _calibration(values["texts"], choices.calibration, json.loads(shipped[HUB]))
    text = io.StringIO()
    yaml.dump(values, text)
    own = choices.model == EMBEDDED
    kept = {name: raw for name, raw in shipped.items() if own or not name.startswith(f"{MODEL}/")}
    return kept | {PARAMS: text.getvalue().encode()}


def outside(directory: Path, choices: Choices) -> None:
    """Check that a project is not inside its own inputs, which would then change while it runs.

    Raises:
        SparselineError: it is.
    """
    for option, given in {"MODEL": choices.model, "--calibration": choices.calibration}.items():
        if (
            given is not None
            and Path(given).is_dir()
            and directory.resolve().is_relative_to(Path(given).resolve())
        ):
            raise SparselineError(
                f"--out {directory} is inside {option} {given}, whose files would then include the results;"
                " choose a directory outside of it."
            )


class _Representer(RoundTripRepresenter):
    """Writes null as a word, as in params.yaml."""


_Representer.add_representer(
    type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null")
)


def _yaml() -> YAML:
    """A YAML object that writes a file again as it was, line for line."""
    yaml = YAML()
    yaml.preserve_quotes, yaml.width, yaml.Representer = True, 10_000, _Representer
    return yaml


def _model(choices: Choices) -> dict[str, str | None]:
    name = choices.model
    if name == EMBEDDED:
        return {"path": MODEL, "id": None, "revision": None}
    path = Path(name)
    if path.exists():
        if not (path / "config.json").is_file():
            raise SparselineError(
                f"{name} has no config.json; give the directory of a Hugging Face checkpoint."
            )
        if not any(found for pattern in TOKENIZERS for found in path.glob(pattern)):
            raise SparselineError(
                f"{name} holds no tokenizer files (tokenizer.json or vocabulary); copy the model's own there."
            )
        if choices.revision is not None:
            raise SparselineError(
                f"--revision {choices.revision} is for a model of the hub, but {name} is a directory; leave"
                " it out."
            )
        return {"path": str(path.resolve()), "id": None, "revision": None}
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise SparselineError(
            f"{name} is not a directory here, no name on the hub (owner/name), and not `{EMBEDDED}`;"
            " correct it."
        )
    return {"path": HUB, "id": name, "revision": _commit(name, choices.revision)}


def _commit(hub_id: str, revision: str | None) -> str:
    """The full hash of a commit. A branch or a tag is looked up once, here: later it may name other
    weights.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi  # imported here: only hub models need it

    try:
        found = HfApi().model_info(hub_id, revision=revision, timeout=10).sha
    except Exception as error:  # of the hub or the network
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SparselineError(
            f"{hub_id} is not a directory here, and its newest commit cannot be fetched from the hub"
            f" ({told}); give --revision with 40 hexadecimal digits."
        ) from error
    return str(found)


def _selection(values: Any, choices: Choices) -> None:
    """Set the one variant, the preset, and what it prunes."""
    for name in [name for name in values["variants"] if name != choices.preset]:
        del values["variants"][name]
    variant = values["variants"][choices.preset]
    values["report"]["baseline"] = choices.preset
    variant.setdefault("export", _yaml().load("[dense]"))
    selection = values["prune"]["selection"]
    if choices.pattern is not None:
        if choices.sparsity is not None:
            raise SparselineError(f"--pattern {choices.pattern} fixes the sparsity; leave --sparsity out.")
        try:
            pattern = Pattern.parse(choices.pattern)
        except ValueError as error:
            raise SparselineError(
                f"--pattern {choices.pattern} is not N:M with 0 < N < M; 2:4 keeps 2 weights of every 4."
            ) from error
        # quoted: DVC and others may read a number
        selection["pattern"] = _yaml().load(f'"{choices.pattern}"')
        variant["allocation"] = _yaml().load("{method: uniform}")  # hardware needs the same N everywhere
        if pattern.m:
            selection["sparsity"] = 1 - pattern.n / pattern.m
    elif choices.sparsity is not None:
        selection["sparsity"] = choices.sparsity


def _calibration(texts: Any, given: str, hub: Mapping[str, Any]) -> None:
    path = Path(given)
    if path.exists():
        one = [path] if path.is_file() else sorted(below for below in path.rglob("*") if below.is_file())
        field = "text" if any(map(holds_records, one)) else None
        _check_text(given, one, field)
        texts["calibration"] |= {"kind": "files", "path": str(path.resolve()), "name": None, "field": field}
        return
    names = [name for name in hub if name not in EVALUATED.values()]
    if given not in names:
        raise SparselineError(
            f"--calibration {given} is no file or directory here, and no name in {HUB}: {', '.join(names)}."
        )
    for text, name in {"calibration": given, **EVALUATED}.items():
        texts[text] |= {"kind": "hub", "path": HUB, "name": name}


def _check_text(given: str, found: list[Path], field: str | None) -> None:
    """Read the first file, so that text of another kind is refused before anything is written."""
    first = next((path for path in found if path.name[0] != "." and path.stat().st_size), None)
    if first is None:
        raise SparselineError(f"--calibration {given} is empty; give a file or a directory with text.")
    raw = unpack(first, files.read(first))
    if holds_records(first):
        next(read_records(first, raw, field), None)
    else:
        decode(first, raw)
