"""Read ``params.yaml`` into the frozen pydantic models beside each algorithm."""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline_lib.core import files
from pipeline_lib.core.errors import SparselineError

FILE = Path("params.yaml")


class Params(BaseModel):
    """A section of params.yaml: frozen, complete (no defaults in code), no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


P = TypeVar("P", bound=Params)
Location = tuple[int | str, ...]  # keys from a section down to a value
MOST = 100_000  # values in a file
SHOWN = 60  # characters of a value in an error


class Conflict(ValueError):
    """Raised by a validator if values of several keys (of the section that it validates) contradict
    each other.
    """

    def __init__(self, reason: str, *keys: str) -> None:
        super().__init__(reason)
        self.keys = keys


class Merged(dict[str, Any]):
    """A section merged with the one that it overrides. It knows where each value was written."""

    def __init__(
        self, defaults: str, overrides: str, below: Mapping[str, Any], above: Mapping[str, Any]
    ) -> None:
        super().__init__(merge(below, above))
        self.defaults, self.overrides, self.above = defaults, overrides, above

    def section_of(self, location: Location) -> str:
        """The overriding section if the value is written there, else the section with the defaults."""
        value: Any = self.above
        for part in location:
            if not isinstance(value, Mapping):  # inside a value that replaces the default as a whole
                break
            if part not in value:
                return self.defaults
            value = value[part]
        return self.overrides

    def without(self, *keys: str) -> "Merged":
        """The same section without some keys."""
        below, above = ({key: part[key] for key in part if key not in keys} for part in (self, self.above))
        return Merged(self.defaults, self.overrides, below, above)


def check_name(kind: str, name: object) -> None:
    """Check a name, which becomes part of file names, of DVC's stage names and of dotted keys.

    Args:
        kind: what is named, for the message ("variant", "text").
        name: a key of params.yaml; YAML may read it as a number or as true.

    Raises:
        SparselineError: the name is empty or has other characters than ASCII letters, digits, '-'
            and '_'.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        quotes = (
            "" if isinstance(name, str) else "; put it in quotes, because YAML does not read it as a name"
        )
        raise SparselineError(
            f"{FILE}: the {kind} name {name!r} cannot be used: a name may have letters, digits, '-' and"
            f" '_'{quotes}."
        )


@lru_cache(maxsize=4)
def _loaded(text: str) -> Any:
    found = YAML(typ="safe", pure=True).load(text)
    _check_size(found)
    return found


def _check_size(value: Any) -> None:
    """Refuse values that aliases of aliases blow up: one line of text may hold a million values, or
    itself.

    Raises:
        ValueError: there are too many values.
    """
    count, left = 0, [value]
    while left:
        one = left.pop()
        count += 1
        if count > MOST:
            raise ValueError(f"it holds more than {MOST:,} values")
        left += one.values() if isinstance(one, Mapping) else one if isinstance(one, list) else []


def section(name: str, path: Path = FILE) -> Any:
    """The raw value of a dotted section, read as YAML 1.2 (so ``1e-4`` is a number and ``2:4`` a string).

    Raises:
        SparselineError: the file cannot be read, or has no such section.
    """
    try:
        value = _loaded(files.text(path))
    except (OSError, ValueError, RecursionError, YAMLError) as error:
        raise SparselineError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise SparselineError(
                f"{path} has no section {name!r}; add it (git shows the shipped one: git show HEAD:{path})."
            )
        value = value[key]
    return value


def merge(defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``defaults``, overridden by ``overrides``, mapping by mapping; an empty mapping in ``overrides``
    changes nothing.
    """
    merged = dict(defaults)
    for key, value in overrides.items():
        both = (value is None or isinstance(value, Mapping)) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value or {}) if both else value
    return merged


def merged(defaults: str, overrides: str, path: Path = FILE) -> Merged:
    """The section ``defaults``, overridden by the section ``overrides`` (which may be empty).

    Raises:
        SparselineError: a section is missing, or is not a mapping.
    """
    values = [section(name, path) or {} for name in (defaults, overrides)]
    for name, value in zip((defaults, overrides), values, strict=True):
        if not isinstance(value, Mapping):
            raise SparselineError(
                f"{path}: {name} = {value!r} is not a mapping of keys to values; write"
                f" `{name.split('.')[-1]}: {{}}` or keys below it."
            )
    return Merged(defaults, overrides, *values)


def parse(model: type[P], value: Any, name: str) -> P:
    """Validate ``value`` as ``model``; ``name`` is the value's key in params.yaml (a ``Merged`` has
    more precise keys).

    Raises:
        SparselineError: the first violation, with its key, its value and what is allowed.
    """

    def place(location: Location) -> str:
        start = value.section_of(location) if isinstance(value, Merged) else name
        return ".".join([start, *map(str, location)])

    try:
        # As JSON: strict mode then accepts lists as tuples and texts as paths, but not "0.5" as 0.5
        # or true as 1.
        return model.model_validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = _keys(value, first["loc"])
        key = place(location)
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(_submodel(model, location[:-1]).model_fields))
            raise SparselineError(
                f"{FILE}: {key} is not a known key; remove it or use one of: {known}."
            ) from error
        if first["type"] == "missing":
            above = ".".join([value.overrides, *map(str, location)]) if isinstance(value, Merged) else key
            raise SparselineError(f"{FILE}: {above} is missing; add it.") from error
        message, given = first["msg"].removeprefix("Value error, "), first["input"]
        message = message.replace("valid array", "valid list")  # YAML's word
        if first["type"] == "model_type":
            message = "it must be a mapping of keys to values"
        conflict = first.get("ctx", {}).get("error")
        if isinstance(conflict, Conflict) and isinstance(given, Mapping):
            shown = " with ".join(
                f"{place((*location, part))} = {_shown(given[part])}" for part in conflict.keys
            )
        else:
            shown = key if isinstance(given, Mapping) else f"{key} = {_shown(given)}"
        raise SparselineError(f"{FILE}: {shown} cannot be used: {message}.") from error


def _keys(value: Any, location: Location) -> Location:
    """The part of a location that consists of keys and list indices. Behind it, pydantic adds the
    member of a union that it tried.
    """
    for count, part in enumerate(location):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part] if part < len(value) else None
        else:
            return location[:count]
    return location


def _shown(value: Any) -> str:
    """A value as errors show it. Whole sections and long lists are cut, because they do not fit
    into a sentence.
    """
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _submodel(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return model


def load(model: type[P], name: str, path: Path = FILE) -> P:
    """Read and validate one section."""
    return parse(model, section(name, path), name)
