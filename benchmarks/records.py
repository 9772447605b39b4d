"""What every record of a benchmark carries, and cells: where finished ones are kept, how a run resumes, how records are gathered and verified.

A cell is a frozen dataclass whose fields are the first keys of its records. Its file holds them once it is done: a list, or, beside other facts, under ``records``.
"""

import functools
import hashlib
import json
import random
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, astuple, fields
from math import log
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import click

from pipeline_lib.core.artifacts import sha256, write_json

CELLS = Path(__file__).parent / "results" / "cells"
Record = dict[str, Any]


class Cell(Protocol):
    """One unit of work of a benchmark."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def file(self) -> Path:
        """Where it is when finished, see ``cell_file``."""
        ...


C = TypeVar("C", bound=Cell)


def commit() -> str:
    """The commit that is checked out."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    return found.stdout.strip()


_digest = functools.cache(sha256)  # many cells share their inputs


def cell_file(name: str, parameters: Any, inputs: Iterable[Path]) -> Path:
    """Named after the cell and a key over parameters and input files; the code is the records' commit."""
    key = hashlib.sha256("".join([json.dumps(_used(parameters), sort_keys=True), *map(_digest, inputs)]).encode()).hexdigest()
    return CELLS / f"{name.replace(':', 'of')}-{key[:8]}.json"


def _used(parameters: Any) -> Any:
    """Without the section on quantisation where nothing is quantised: cells from before there was one keep their names."""
    if isinstance(parameters, dict):
        return {name: _used(value) for name, value in parameters.items() if name != "quantization" or value.get("bits") is not None}
    return [_used(value) for value in parameters] if isinstance(parameters, list) else parameters


def recorded(results: Path) -> list[Record]:
    """The records of a file; none where there is no file yet."""
    return json.loads(results.read_text(encoding="utf-8")) if results.exists() else []


def finish_cells(cells: Iterable[C], compute: Callable[[C], Any], tell: Callable[[Any], str], again: bool = False) -> None:
    """Compute every cell that is not there yet (or all), and keep each as soon as it is done."""
    for cell in cells:
        path = cell.file()
        if again or not path.exists():
            started = time.perf_counter()
            found = compute(cell)
            write_json(path, found)
            click.echo(f"{cell}: {tell(found)}; {time.perf_counter() - started:.0f} s")


def gather(results: Path, cells: Sequence[Cell]) -> list[Record]:
    """All records, in the cells' order: those of finished cells, and for cells of other parameters or inputs what ``results`` has of before."""
    before: dict[tuple[Any, ...], list[Record]] = {}
    for record in recorded(results):
        before.setdefault(tuple(record[name] for name in _names(cells[0])), []).append(record)
    gathered = []
    for cell in cells:
        if (path := cell.file()).exists():
            gathered += _records(json.loads(path.read_text(encoding="utf-8")))
        else:
            gathered += before.get(astuple(cell), [])
    return gathered


def recompute(results: Path, kind: type[C], compute: Callable[[C], Any], values: Sequence[str], count: int, seed: int | None) -> None:
    """Random recorded cells once more: these values (perplexities) must agree within 1% (other threads, other rounding).

    Raises:
        click.ClickException: some do not.
    """
    names, records = _names(kind), recorded(results)
    wrong = 0
    for key in random.Random(seed).sample(sorted({tuple(r[name] for name in names) for r in records}), count):
        for new in _records(compute(kind(*key))):
            old = next(r for r in records if all(r[name] == new[name] for name in (*names, "text")))
            apart = max(abs(log(new[value] / old[value])) for value in values)
            wrong += apart > 0.01
            shown = ", ".join(f"{value} {old[value]:.3f} then, {new[value]:.3f} now" for value in values)
            click.echo(f"{key} {new['text']}: {shown}; apart by {apart:.2%}")
    if wrong:
        raise click.ClickException(f"{wrong} records differ by more than 1%.")


def _records(found: Any) -> list[Record]:
    """Those of what a cell's file holds."""
    return found["records"] if isinstance(found, dict) else found


def _names(cell: Cell | type[Cell]) -> list[str]:
    return [one.name for one in fields(cell)]
