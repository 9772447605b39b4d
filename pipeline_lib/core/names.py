"""Names in params.yaml: which there are, and that every list of names agrees with them."""

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline_lib.core import params
from pipeline_lib.core.errors import SparselineError

RESERVED = "dense"  # the source model


def check() -> None:
    """Refuse names that DVC, a shell or a file system would read as something else, and lists that name what does not exist.

    Raises:
        SparselineError: the first such name, or a section of names that is no mapping.
    """
    texts, presets = _mapping("texts", params.section("texts")), _mapping("presets", params.section("presets"))
    variants = _mapping("variants", params.section("variants"))
    for kind, names in (("text", texts), ("variant", variants), ("preset", presets)):
        for name in names:
            params.check_name(kind, name)
    if RESERVED in variants:
        raise SparselineError(f"{params.FILE}: the variant name {RESERVED!r} is taken by the source model; choose another.")
    _known("induced", _mapping("induced", params.section("induced")), "variant", variants)
    _known("curved", _mapping("curved", params.section("curved")), "variant", variants)
    _known("exported", _mapping("exported", params.section("exported")), "variant", variants)
    _known("tasks.variants", params.section("tasks.variants") or [], "variant", variants)
    _known("tasks.presets", params.section("tasks.presets") or [], "preset", presets)


def _mapping(section: str, value: Any) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise SparselineError(
            f"{params.FILE}: {section} = {value!r} is not a mapping of names to values; write `{section}: {{}}` or names below it."
        )
    return value or {}


def _known(where: str, names: Any, kind: str, known: Iterable[str]) -> None:
    if not isinstance(names, list | Mapping):
        raise SparselineError(f"{params.FILE}: {where} = {names!r} is not a list of names; write [] or names in brackets.")
    for name in names:
        if name not in known:
            raise SparselineError(f"{params.FILE}: {where} names {name!r}, which is no {kind}; {kind}s: {', '.join(known) or 'none'}.")
