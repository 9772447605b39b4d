"""Sort the files of a model directory: weights that transformers loads, files to copy, and files to
leave out.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.files import check_inside, is_plain, opened, text

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "readme.md"  # in any case of letters
TEMPLATES = "additional_chat_templates"  # the only subdirectory that a tokenizer reads
CONVERT = "python -m stages.convert"
# Weights and training states that transformers does not load if there are safetensors
OTHER_PROGRAMS = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx",
    ".onnx_data", ".ot", ".npz", ".npy", ".tflite", ".mlmodel", ".nemo", ".engine", ".llamafile",
)  # fmt: skip


@dataclass(frozen=True)
class Files:
    """The content of a model directory; names are relative to it."""

    weights: tuple[str, ...]  # in the order in which transformers reads them
    index: Mapping[str, str] | None  # tensor name -> file name; None: the weights have no index
    others: tuple[str, ...]  # copied verbatim beside new weights
    left_out: Mapping[str, str]  # name -> why


def reason_left_out(name: str) -> str | None:
    """The reason why a file of a model is not copied, or None; ``name`` is relative, with slashes."""
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts):
        return "hidden"
    if len(path.parts) > 1:
        return (
            None if path.parts[0] == TEMPLATES and path.match(f"{TEMPLATES}/*.jinja") else "in a subdirectory"
        )
    if path.name.lower() == CARD:
        return "the result has a model card of its own"
    if path.name.startswith("consolidated") and (
        path.suffix == ".safetensors" or path.name.endswith(".index.json")
    ):
        return "weights in Mistral's own format"
    if path.suffix.lower() in OTHER_PROGRAMS:
        return "weights or states of another kind"
    if path.name.endswith(".index.json") and path.name != INDEX:
        return "an index of weights that are left out"
    return "belongs to a bitmask checkpoint" if path.name == "bitmask.json" else None


def find_files(path: Path) -> Files:
    """Sort a directory's files. The weights are the files that transformers' ``from_pretrained`` loads
    (``_get_resolved_checkpoint_files``).

    Raises:
        SparselineError: there are no weights, two sets of them, or a damaged index; a shard is
            missing; a file cannot be read.
    """
    names, left_out = list_files(path)
    stored = [name for name in names if name.endswith(".safetensors")]
    index: dict[str, str] | None = None
    weights: tuple[str, ...] = (WEIGHTS,)
    if WEIGHTS in names:
        rivals = [name for name in stored if name != WEIGHTS]
        if INDEX in names and _names_one_file(path / INDEX):
            left_out[INDEX] = "an index that one file does not need"
        elif INDEX in names:
            rivals.insert(0, INDEX)
    elif INDEX in names:
        index = _read_index(path / INDEX)
        weights = tuple(sorted(set(index.values())))
        rivals = [name for name in stored if name not in weights]
    else:
        raise SparselineError(_no_weights(path, stored))
    if rivals:
        raise SparselineError(
            f"{path} holds two sets of weights, {WEIGHTS if index is None else INDEX} and {rivals[0]},"
            " of which transformers loads the former; keep the files of one set only (in a separate"
            " directory, given as model.path)."
        )
    for name in weights:
        if name not in names:
            raise SparselineError(
                f"{path / name} is missing or truncated ({INDEX} names it); fetch the checkpoint again."
            )
    others = tuple(name for name in names if name != INDEX and name not in weights)
    return Files(weights, index, others, left_out)


def list_files(path: Path) -> tuple[list[str], dict[str, str]]:
    """The files to use, and name -> reason for those to leave out. A subdirectory that is left out
    counts as one entry.

    Raises:
        SparselineError: the directory or a file cannot be read, or a file to copy is not a regular
            file of this directory.
    """
    found: list[str] = []
    left_out: dict[str, str] = {}
    try:
        entries = sorted(path.iterdir())
        templates = sorted((path / TEMPLATES).iterdir()) if (path / TEMPLATES).is_dir() else []
    except OSError as error:
        raise SparselineError(
            f"{path} cannot be read ({error.strerror}); give this user the right to read it."
        ) from error
    for entry in (*(entry for entry in entries if entry.name != TEMPLATES or not templates), *templates):
        name = entry.relative_to(path).as_posix()
        if entry.is_dir():
            left_out[f"{name}/"] = "hidden" if entry.name.startswith(".") else "a subdirectory"
        elif reason := reason_left_out(name):
            left_out[name] = reason
        else:
            check_inside(path, entry)
            try:
                with opened(entry):
                    found.append(name)
            except OSError as error:
                raise SparselineError(
                    f"{entry} cannot be read ({error.strerror}); give this user the right to read it."
                ) from error
    return found, left_out


def _names_one_file(index: Path) -> bool:
    """Whether an index places all tensors in model.safetensors."""
    try:
        return set(_read_index(index).values()) == {WEIGHTS}
    except SparselineError:
        return False


def _read_index(path: Path) -> dict[str, str]:
    try:
        value = json.loads(text(path))
        named: dict[str, str] = dict(value["weight_map"])
        if (
            not named
            or not isinstance(value["metadata"], dict)
            or not all(isinstance(name, str) for name in named.values())
        ):
            raise ValueError("weight_map and metadata must be mappings")
    except OSError as error:
        raise SparselineError(
            f"{path} cannot be read ({error.strerror}); fetch the checkpoint again."
        ) from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise SparselineError(f"{path} is damaged ({error}); fetch the checkpoint again.") from error
    for name in named.values():
        if not is_plain(name) or "/" in name or not name.endswith(".safetensors"):
            raise SparselineError(
                f"{path} names {name}, which is not a .safetensors file beside it; put all shards into one"
                " directory."
            )
    return named


def _no_weights(path: Path, stored: list[str]) -> str:
    """The error message for a directory without weights that transformers would load. Its remedy
    depends on the files that are there.
    """
    lacking = f"{path} holds no {WEIGHTS} and no {INDEX}"
    if (path / "bitmask.json").exists():
        return (
            f"{lacking}, but a bitmask checkpoint; turn it back with `python -m stages.unpack {path} OUT`,"
            " and give OUT as model.path."
        )
    if stored:
        return (
            f"{lacking}, which transformers needs to load {stored[0]}; fetch the index too, or name a"
            f" single file {WEIGHTS}."
        )
    if pickled := sorted(found.name for found in path.glob("pytorch_model*.bin")):
        return (
            f"{lacking}, but {pickled[0]}; convert it with `{CONVERT} {path} OUT`, and give OUT as"
            " model.path."
        )
    for below in sorted(path.glob("*/*.safetensors")):
        return (
            f"{lacking}, but {below.parent} holds weights; give the directory that has config.json and"
            " *.safetensors side by side."
        )
    return (
        f"{lacking}; give a directory with the weights (where there is pytorch_model.bin only, `{CONVERT}`"
        " makes safetensors of it)."
    )


def grouped(reasons: Mapping[str, str]) -> list[str]:
    """One line per reason, with at most three of its files."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in sorted(by_reason.items()):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"{', '.join(names[:3])}{more} ({reason})")
    return lines
