"""One harness for all studies: cells, the records of their results, and how a run resumes, gathers,
prints its table and is verified.

A cell is a testbed, a seed and recipe overrides. It is finished when its file exists:
``results/cells/<study>/`` (not in git), named after the cell and a key over its recipes and input
files. A study's record, ``results/<study>.json``, gathers the records of all cells.
"""

import functools
import hashlib
import json
import math
import random
import re
import statistics as stats
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from benchmarks.lab import Changes, Lab, Run, recipe, section
from benchmarks.testbed import MIXTURE, Testbed, inputs
from pipeline_lib.core.artifacts import write_json
from pipeline_lib.core.files import sha256
from pipeline_lib.recipe.settings import Recipe

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TEXTS = ("validation", "test", "wikitext2")
PATTERNS = {
    "50%": (0.5, "unstructured"),
    "60%": (0.6, "unstructured"),
    "70%": (0.7, "unstructured"),
    "2:4": (0.5, "2:4"),
    "4:8": (0.5, "4:8"),
}
MORE = {"80%": (0.8, "unstructured")}  # in addition to those of every study
UNIFORM: Changes = {"allocation": {"method": "uniform"}}
# `best` without samples that only train, as the test models' records have it
EIGHT_EPOCHS: Changes = {"reconstruction": {"finetune": {"epochs": 8, "refresh_epochs": 2}}}
TOLERANCE = 0.01  # of a perplexity: other numbers of threads round differently
Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One unit of work of a study."""

    key: Mapping[str, Any]  # the first fields of its records, among them ``testbed`` and ``seed``
    # field of a perplexity -> changes to params.yaml; None: the dense model
    arms: Mapping[str, Changes | None]
    variant: str | None = None  # of params.yaml, to which the arms' changes are applied
    rows: int = 128  # of calibration text
    source: str = MIXTURE
    training: int = 0  # more rows, which only train
    depth: int | None = None  # prune so many of the first blocks; None: all

    @property
    def name(self) -> str:
        """The name that commands use."""
        return ",".join(map(str, self.key.values()))

    def recipe(self, arm: str) -> Recipe | None:
        changes = self.arms[arm]
        return None if changes is None else recipe(changes, self.variant)


def selection(pattern: str, changes: Changes | None = None) -> Changes:
    """Overrides that prune by one of ``PATTERNS`` or ``MORE``, and other overrides of the section."""
    sparsity, name = (PATTERNS | MORE)[pattern]
    return {"selection": {"sparsity": sparsity, "pattern": name, **(changes or {})}}


@functools.cache
def lab(testbed: str) -> Lab:
    return Lab(Testbed(testbed))


def pruned(
    cell: Cell, texts: Sequence[str], facts: Callable[[Lab, Recipe | None, Run | None], Record] | None = None
) -> list[Record]:
    """Prune and measure a cell. A record per text: the key, ``dense``, each arm's perplexity, the
    last arm's wall seconds and facts.
    """
    here = lab(cell.key["testbed"]).at(cell.source, cell.rows, cell.key["seed"], cell.training)
    found: dict[str, dict[str, float]] = {}
    more: Record = {}
    for arm in cell.arms:
        asked = cell.recipe(arm)
        run = here.run(asked) if asked else None
        found[arm] = {
            text: here.bed.perplexity(run.tensors, text) if run else here.bed.dense(text) for text in texts
        }
        more = ({"wall_s": round(run.wall_s, 2)} if run else {}) | (facts(here, asked, run) if facts else {})
    return [
        {
            **cell.key,
            "text": text,
            "dense": here.bed.dense(text),
            **{arm: ppl[text] for arm, ppl in found.items()},
            **more,
        }
        for text in texts
    ]


@dataclass(frozen=True)
class Study:
    """A question, its cells, and how its record is read."""

    name: str  # of its record
    cells: Callable[[], Iterable[Cell]]
    measure: Callable[[Cell], list[Record]]  # a cell's records, without the commit
    # fields of the key that make the table's columns; the others, except the seed, make its rows
    columns: tuple[str, ...] = ("testbed",)
    # changes to a record's key that give its baseline, which closes nothing of the gap to dense
    base: Callable[[Record], Record] = lambda record: {}
    base_value: str = "ppl"  # field of the baseline's perplexity
    # values that must agree when a cell is computed again; the last is in the table
    values: tuple[str, ...] = ("dense", "ppl")
    texts: tuple[str, ...] = TEXTS  # texts that have tables
    beside: tuple[str, str] | None = None  # field and unit of a value beside the perplexity
    judged: bool = True  # whether values that differ are an error; costs depend on the machine
    whole: Callable[[Record], bool] = lambda record: True  # whether nothing of a record is missing
    finish: Callable[[list[Record]], None] = lambda records: None  # marks gathered records
    more: Callable[[list[Record]], list[str]] = lambda records: []  # other tables
    # the files that a cell reads
    files: Callable[[Cell], list[Path]] = lambda cell: inputs(cell.key["testbed"], TEXTS, cell.source)
    home: Path = field(default=RESULTS)

    @property
    def record(self) -> Path:
        return self.home / f"{self.name}.json"

    @functools.cached_property
    def every(self) -> dict[str, Cell]:
        """Cells by name, in order."""
        return {cell.name: cell for cell in self.cells()}

    def recorded(self) -> list[Record]:
        """The gathered records; none where there is no file yet."""
        return json.loads(self.record.read_text(encoding="utf-8")) if self.record.exists() else []

    def file(self, cell: Cell) -> Path:
        """The file of a cell's records, once it is finished. Their commit identifies the code that
        made them.
        """
        recipes = [cell.recipe(arm) for arm in cell.arms]
        parts: list[Any] = [
            cell.name,
            cell.rows,
            cell.training,
            cell.source,
            cell.depth,
            *(asked and asked.model_dump(mode="json") for asked in recipes),
        ]
        if any(asked and asked.allocation.method != "uniform" for asked in recipes):
            parts += [section(name) for name in ("calibrate", "sensitivity", "curves")]
        if any(asked and asked.induce for asked in recipes):
            parts += [section(name) for name in ("calibrate", "scale")]
        parts += [_digest(path) for path in self.files(cell)]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
        return self.home / "cells" / self.name / f"{re.sub('[^A-Za-z0-9.]+', '-', cell.name)}-{key}.json"

    def compute(self, cell: Cell) -> list[Record]:
        return [record | {"commit": commit()} for record in self.measure(cell)]

    def run(self, only: Mapping[str, str] | None = None, missing: bool = False) -> list[Record]:
        """Compute every cell that has no file yet, keep each as soon as it is done, and gather the record.

        Args:
            only: values of the key, as text, that cells must have.
            missing: leave out what the record has already.

        Raises:
            click.ClickException: no cell has these values.
        """
        asked = [
            cell
            for cell in self.every.values()
            if all(str(cell.key[one]) == value for one, value in (only or {}).items())
        ]
        if not asked:
            raise click.ClickException(
                f"{self.name} has no such cell; its first is {next(iter(self.every))}."
            )
        known = {self._name(record) for record in self.recorded()} if missing else set()
        for cell in asked:
            if cell.name not in known and not self.file(cell).exists():
                self._keep(cell)
        return self.gather()

    def renew(self, name: str) -> list[Record]:
        """Compute a cell even if it has results, and gather the record, which alone keeps the new
        ones.
        """
        cell = self.every[name]
        self._keep(cell)
        gathered = self.gather()
        self.file(cell).unlink()
        return gathered

    def complete(self, only: Mapping[str, str], names: Sequence[str], save: bool) -> list[str]:
        """Compute what the record lacks, or the named cells anew; each is in the record as soon as
        it is done.

        Args:
            only: values of the key, as text, that cells must have.
            save: commit the record in git after each cell.

        Returns:
            Names of the cells that failed. The reasons are printed at once.

        Raises:
            click.ClickException: there is no such cell.
        """
        asked = [
            name
            for name, cell in self.every.items()
            if all(str(cell.key.get(part)) == value for part, value in only.items())
        ]
        pairs = [f"{part}={value}" for part, value in only.items()]
        if unknown := [name for name in names if name not in self.every] or ([] if asked else pairs):
            raise click.ClickException(
                f"there is no cell {unknown[0]!r}; the first is {next(iter(self.every))}."
            )
        recorded = {self._name(record) for record in self.recorded() if self.whole(record)}
        failed = []
        for name in names or [name for name in asked if name not in recorded]:
            try:
                self.renew(name)
            except (click.ClickException, RuntimeError) as error:  # the others do not depend on it
                failed.append(name)
                click.echo(f"{name}: {error}", err=True)
                continue
            if save:
                commit = ["commit", "--quiet", "--only", "-m", f"Benchmark {self.name}: {name}"]
                for command in (["add"], commit):  # git may not know the record yet
                    subprocess.run(["git", *command, "--", str(self.record)], cwd=ROOT, check=True)
        return failed

    def _keep(self, cell: Cell) -> None:
        """Compute a cell, write its file, and print the results."""
        started = time.perf_counter()
        found = self.compute(cell)
        write_json(self.file(cell), found)
        shown = "; ".join(f"{record.get('text') or ''} {self._values(record)}".strip() for record in found)
        click.echo(f"{cell.name}: {shown}; {time.perf_counter() - started:.0f} s")

    def gather(self) -> list[Record]:
        """Write the record, in the cells' order. Of a cell without a file, the old records stay."""
        before: dict[str, list[Record]] = {}
        for record in self.recorded():
            before.setdefault(self._name(record), []).append(record)
        gathered: list[Record] = []
        for name, cell in self.every.items():
            path = self.file(cell)
            gathered += (
                json.loads(path.read_text(encoding="utf-8")) if path.exists() else before.get(name, [])
            )
        self.finish(gathered)
        write_json(self.record, gathered)
        return gathered

    def verify(self, names: Sequence[str], count: int = 3, seed: int | None = None) -> None:
        """Compute recorded cells anew: those named, or random ones. Nothing is written.

        Raises:
            click.ClickException: a name is unknown or not recorded, or values differ by more than
                ``TOLERANCE``.
        """
        known = {(self._name(record), record["text"]): record for record in self.recorded()}
        there = list(dict.fromkeys(name for name, _ in known if name in self.every))
        chosen = [_find(name, there, self.every) for name in names] or random.Random(seed).sample(
            there, min(count, len(there))
        )
        if not chosen:
            raise click.ClickException(f"{self.record} has no records to verify.")
        wrong = 0
        for name in chosen:
            for new in self.compute(self.every[name]):
                old = known.get((name, new["text"]))
                if old is None:
                    raise click.ClickException(f"{self.record} has no record of {name} on {new['text']}.")
                apart = [abs(math.log(new[value] / old[value])) for value in self.values]
                wrong += not all(one <= TOLERANCE for one in apart)  # NaN is wrong
                click.echo(
                    f"{name} {new['text'] or ''}: {self._values(old)} then, {self._values(new)} now; apart by"
                    f" {max(apart):.2%}"
                )
        if wrong and self.judged:
            raise click.ClickException(f"{wrong} records differ by more than {TOLERANCE:.0%}.")

    def table(self, records: list[Record], text: str) -> str:
        """Markdown table. Each entry has the geometric mean over the seeds ± the largest distance
        of a seed from it. In brackets is the mean share of the gap between base and dense that is
        closed, computed seed by seed. ``*`` marks what was selected.
        """
        names = list(next(iter(self.every.values())).key)
        known = {tuple(r[name] for name in names): r for r in records if r["text"] == text}
        rows = [name for name in names if name not in (*self.columns, "seed")]
        groups: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Record]]] = {}
        for r in known.values():
            row, column = (tuple(r[name] for name in part) for part in (rows, self.columns))
            groups.setdefault(row, {}).setdefault(column, []).append(r)
        columns = sorted(
            dict.fromkeys(column for row in groups.values() for column in row), key=lambda column: column[0]
        )
        lines = [f"| {text} | {' | '.join(' '.join(map(str, column)) for column in columns)} | mean closed |"]
        lines.append("|---" * (len(columns) + 2) + "|")
        for row, found in groups.items():
            shares = {column: self._closed(known, names, found.get(column, [])) for column in columns}
            means = [stats.mean(each) for each in shares.values() if each]
            line = [
                self._shown(found[column], shares[column]) if column in found else "" for column in columns
            ]
            lines.append(
                f"| {', '.join(map(str, row))} | {' | '.join(line)} |"
                f" {f'{stats.mean(means):.1f}%' if means else ''} |"
            )
        return "\n".join(lines)

    def _closed(
        self, known: Mapping[tuple[Any, ...], Record], names: Sequence[str], found: Iterable[Record]
    ) -> list[float]:
        """Percent of the gap between the base and dense that each record closes; none for the base itself."""
        shares = []
        for r in found:
            base = known.get(tuple((r | self.base(r))[name] for name in names))
            if base is not None and (base is not r or self.base_value != self.values[-1]):
                shares.append(100 * gap(base[self.base_value], r[self.values[-1]], r["dense"]))
        return shares

    def _shown(self, found: Sequence[Record], shares: Sequence[float]) -> str:
        values = [r[self.values[-1]] for r in found]
        middle = math.exp(stats.mean(map(math.log, values)))
        spread = max(abs(value - middle) for value in values)
        beside = ""
        if self.beside and self.beside[0] in found[0]:
            beside = f", {stats.median(r[self.beside[0]] for r in found):.3g} {self.beside[1]}"
        closed = f" ({stats.mean(shares):.1f}%)" if shares else ""
        around, star = f" ± {spread:.2f}" if spread >= 0.005 else "", "*" if found[0].get("selected") else ""
        return f"{middle:.2f}{around}{closed}{beside}{star}"

    def _name(self, record: Record) -> str:
        return ",".join(str(record[name]) for name in next(iter(self.every.values())).key)

    def _values(self, record: Record) -> str:
        return ", ".join(f"{value} {record[value]:.5g}" for value in self.values if record[value] is not None)


def gap(base: float, new: float, dense: float) -> float:
    """Share of the gap that is closed: (ln ppl_base − ln ppl_new) / (ln ppl_base − ln ppl_dense)."""
    return (math.log(base) - math.log(new)) / (math.log(base) - math.log(dense))


def commands(
    study: Callable[[], Study], show: Callable[[list[Record]], None], told: str | None
) -> click.Group:
    """The commands ``run``, ``table`` and ``verify`` of a study whose cells take so long that each
    is recorded by itself.

    Args:
        show: prints the tables of the records.
        told: the help text.
    """

    @click.group(help=told)
    def main() -> None:
        pass

    @main.command()
    @click.option(
        "--only",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Only cells with this value of the key: method=fast.",
    )
    @click.option("--cell", "names", multiple=True, help="Cells to compute anew, by their names.")
    @click.option("--commit", is_flag=True, help="Commit the record after each cell.")
    def run(only: tuple[str, ...], names: tuple[str, ...], commit: bool) -> None:
        """Compute every cell that the record lacks, or the named ones, and print the tables."""
        failed = study().complete(dict(one.split("=", 1) for one in only), names, commit)
        show(study().recorded())
        if failed:
            raise click.ClickException(f"{len(failed)} cells failed: {'; '.join(failed)}")

    @main.command()
    def table() -> None:
        """Print the tables of the record."""
        show(study().recorded())

    @main.command()
    @click.option("--cell", "names", multiple=True, help="The fields of its key, with commas between them.")
    @click.option("--count", default=3, show_default=True, help="So many random cells where none is named.")
    @click.option("--seed", type=int, help="Of their choice.")
    def verify(names: tuple[str, ...], count: int, seed: int | None) -> None:
        """Compute recorded cells anew and compare: perplexities must agree within 1%."""
        study().verify(names, count, seed)

    return main


def commit() -> str:
    """The commit that is checked out."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=RESULTS.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip()


_digest = functools.cache(sha256)  # many cells share their inputs


def _find(name: str, there: Sequence[str], every: Mapping[str, Cell]) -> str:
    """A recorded cell by its name, in which spaces after commas do not matter.

    Raises:
        click.ClickException: there is none.
    """
    for known in there:
        if known.replace(", ", ",") == name.replace(", ", ","):
            return known
    fields = ",".join(next(iter(every.values())).key)
    example = there[0] if there else next(iter(every))
    raise click.ClickException(
        f"no recorded cell is called {name!r}; a name is {fields}, for example {example}."
    )
