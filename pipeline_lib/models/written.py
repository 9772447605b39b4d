"""An architecture as JSON. The prepare stage writes it for all other stages."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pipeline_lib.models.architecture import Architecture, Coupling, Layout, Matrix, Site, Tie

_PARTS = {"matrices": Matrix, "sites": Site, "couplings": Coupling}


def to_json(architecture: Architecture) -> dict[str, Any]:
    """The architecture as a JSON object, in which equal blocks share one layout."""
    kinds = list(dict.fromkeys(architecture.layouts))
    return {
        "family": architecture.family,
        "blocks": architecture.blocks,
        "width": architecture.width,
        "returns": architecture.returns,
        "outside": sorted(architecture.outside),
        "kinds": [
            {name: [_record(part) for part in getattr(kind, name)] for name in _PARTS}
            | {"routers": sorted(kind.routers)}
            for kind in kinds
        ],
        "kind_of_block": [kinds.index(layout) for layout in architecture.layouts],
    }


def from_json(value: Mapping[str, Any]) -> Architecture:
    """The inverse of ``to_json``.

    Raises:
        KeyError, TypeError, IndexError: ``value`` is not an architecture.
    """
    kinds = []
    for kind in value["kinds"]:
        couplings = [
            {**one, "ties": tuple(Tie(**_given(tie)) for tie in one["ties"])} for one in kind["couplings"]
        ]
        parts = {"matrices": kind["matrices"], "sites": kind["sites"], "couplings": couplings}
        made = {name: tuple(part(**_given(one)) for one in parts[name]) for name, part in _PARTS.items()}
        kinds.append(Layout(**made, routers=frozenset(kind["routers"])))
    layouts = tuple(kinds[number] for number in value["kind_of_block"])
    return Architecture(
        value["family"],
        value["blocks"],
        value["width"],
        layouts,
        frozenset(value["outside"]),
        value["returns"],
    )


def _record(part: Any) -> dict[str, Any]:
    """A data class as a JSON object, without default values. An index is a list; one that counts up
    from 0 is stored as its length (see ``compact``).
    """
    found = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if value == field.default:
            continue
        if field.name == "ties":
            value = [_record(tie) for tie in value]
        elif field.name == "index":
            value = len(value) if isinstance(value, range) else list(value)
        found[field.name] = value
    return found


def _given(record: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments from a record of ``_record``."""
    index = (
        {"index": range(record["index"]) if isinstance(record["index"], int) else tuple(record["index"])}
        if "index" in record
        else {}
    )
    tuples = {name: tuple(record[name]) for name in ("rows", "positions") if record.get(name) is not None}
    return {**record, **index, **tuples}
