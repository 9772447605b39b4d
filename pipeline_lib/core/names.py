"""Names in params.yaml: which there are, and that every list of names agrees with them."""

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.params import FILE, check_name

RESERVED = "dense"  # the source model


def check(values: Mapping[str, Any]) -> None:
    """Refuse names that DVC, a shell or a file system would read as something else, and lists that name what does not exist.

    Args:
        values: params.yaml, or those of its sections that hold names.

    Raises:
        SparselineError: the first such name.
    """
    for section, kind in (("texts", "text"), ("variants", "variant"), ("presets", "preset")):
        for name in _mapping(values, section):
            check_name(kind, name)
    if RESERVED in _mapping(values, "variants"):
        raise SparselineError(f"{FILE}: the variant name {RESERVED!r} is taken by the source model; choose another.")
    variants = _mapping(values, "variants")
    for section in ("induced", "curved", "exported"):
        _known(section, _mapping(values, section), "variant", variants)
    tasks = values.get("tasks") or {}
    _known("tasks.variants", tasks.get("variants") or [], "variant", variants)
    _known("tasks.presets", tasks.get("presets") or [], "preset", _mapping(values, "presets"))


def _mapping(values: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    found = values.get(section)
    if found is not None and not isinstance(found, Mapping):
        raise SparselineError(
            f"{FILE}: {section} = {found!r} is not a mapping of names to values; write `{section}: {{}}` or names below it."
        )
    return found or {}


def _known(where: str, names: Iterable[Any], kind: str, known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise SparselineError(f"{FILE}: {where} names {name!r}, which is no {kind}; {kind}s: {', '.join(known) or 'none'}.")
