"""Finished runs side by side: DVC's experiments, the branches and the workspace, by the figures that git keeps (report/summary.json)."""

import io
import json
import math
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.export import wording
from pipeline_lib.reporting import content, plots, render, table
from pipeline_lib.reporting.table import DENSE, Column

SUMMARY = "report/summary.json"
PARAMS = "params.yaml"
WORKSPACE = "workspace"
EXPERIMENT = re.compile(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/(.+)")  # others below refs/exps are DVC's own notes
MOST_CHANGES = 60  # characters of a run's changes that are written out
MISSING = object()


class Model(BaseModel):
    """What a summary says of one model, as far as it is compared."""

    sparsity: float
    perplexity: dict[str, float]
    gap: dict[str, float] = {}


SCHEMA = TypeAdapter(dict[str, Model])


@dataclass(frozen=True)
class Run:
    """One revision's figures: a branch, an experiment, or the workspace."""

    name: str
    changes: Mapping[str, str]  # dotted key -> "=value", " added" or " removed", where its params.yaml differs from HEAD's
    models: Mapping[str, Model]


@dataclass(frozen=True)
class Point:
    """One pruned model of one run."""

    run: str
    changes: Mapping[str, str]
    variant: str
    model: Model


@dataclass(frozen=True)
class Comparison:
    """Points by sparsity, the best on the first text first."""

    texts: tuple[str, ...]
    dense: Mapping[str, float]  # perplexity of the source model, by text
    points: tuple[Point, ...]
    apart: tuple[str, ...]  # runs on another model or other texts

    def best(self, text: str) -> frozenset[int]:
        """Points of the lowest perplexity at their sparsity, ties included; none where there is nothing to choose from."""
        marked: set[int] = set()
        measured = [number for number, point in enumerate(self.points) if text in point.model.perplexity]
        for sparsity in {wording.sparsity(self.points[number].model.sparsity) for number in measured}:
            rivals = {
                n: self.points[n].model.perplexity[text] for n in measured if wording.sparsity(self.points[n].model.sparsity) == sparsity
            }
            if len(rivals) > 1:
                marked |= {number for number, perplexity in rivals.items() if perplexity == min(rivals.values())}
        return frozenset(marked)


# What git holds


def collect(root: Path) -> list[Run]:
    """HEAD, the other local branches, all experiments, and the workspace; those without figures are left out.

    Raises:
        SparselineError: no git repository, no commit, or a file of a run cannot be read.
    """
    here = _git(root, "rev-parse", "--abbrev-ref", "HEAD").strip()
    names = {here: "HEAD"}
    for ref in _git(root, "for-each-ref", "--sort=refname", "--format=%(refname)", "refs/heads").split():
        names.setdefault(ref.removeprefix("refs/heads/"), ref)
    for ref in _git(root, "for-each-ref", "--sort=committerdate", "--format=%(refname)", "refs/exps").split():
        if match := EXPERIMENT.fullmatch(ref):
            names.setdefault(match[1] if match[1] not in names else f"{match[1]} ({ref[10:12]}{ref[13:18]})", ref)
    base = _params(_show(root, "HEAD", PARAMS), here)
    runs = [
        Run(name, _told(_changes(base, _params(_show(root, ref, PARAMS), name))), _models(summary, name))
        for name, ref in names.items()
        if (summary := _show(root, ref, SUMMARY)) is not None
    ]
    if (root / SUMMARY).exists():
        texts = {path: (root / path).read_text(encoding="utf-8") if (root / path).exists() else None for path in (SUMMARY, PARAMS)}
        changes = _told(_changes(base, _params(texts[PARAMS], WORKSPACE)))
        runs.append(Run(WORKSPACE, changes, _models(texts[SUMMARY] or "", WORKSPACE)))
    return runs


def _git(root: Path, *arguments: str) -> str:
    try:
        return subprocess.run(("git", *arguments), cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = " ".join((getattr(error, "stderr", None) or str(error)).split())
        raise SparselineError(f"git cannot tell the runs ({said}); compare works in a git repository with a commit.") from error


def _show(root: Path, revision: str, path: str) -> str | None:
    """A file of a revision; None where that has none."""
    done = subprocess.run(("git", "show", f"{revision}:./{path}"), cwd=root, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def _models(text: str, name: str) -> Mapping[str, Model]:
    try:
        return SCHEMA.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise SparselineError(
            f"{SUMMARY} of {name} cannot be read ({where or 'the file'}: {first['msg']}); `dvc repro report` writes it."
        ) from error


def _params(text: str | None, name: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(io.StringIO(text or "{}")) or {}
    except YAMLError as error:
        raise SparselineError(f"{PARAMS} of {name} cannot be read as YAML: {' '.join(str(error).split())}") from error


def _changes(base: Any, own: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of ``own`` that differ, with their values (``MISSING`` where there is none); a whole mapping that came or went is one change."""
    if isinstance(base, Mapping) and isinstance(own, Mapping):
        for name in dict.fromkeys((*base, *own)):
            yield from _changes(base.get(name, MISSING), own.get(name, MISSING), f"{key}.{name}".lstrip("."))
    elif base != own:
        yield key, own


def _told(changes: Iterator[tuple[str, Any]]) -> dict[str, str]:
    return {key: _value(value) for key, value in changes}


def _value(value: Any) -> str:
    if value is MISSING:
        return " removed"
    return " added" if isinstance(value, Mapping) else f"={value if isinstance(value, str) else json.dumps(value)}"


# What follows from it


def compare(runs: Sequence[Run], first: str) -> Comparison:
    """Pruned models of all runs that measured the same source model on the same texts as the workspace (or else HEAD).

    What a run has in common with an earlier one, a variant of the same sparsity and perplexities, is told once.

    Args:
        first: the text to rank by; the others follow by name.

    Raises:
        SparselineError: there are no two runs to compare.
    """
    mend = "queue some: `make sweep-sparsity`, then `dvc queue start`."
    if not runs:
        raise SparselineError(f"no run has a {SUMMARY} yet; `dvc repro` makes one, and experiments to compare it with: {mend}")
    reference = next((run for run in runs if run.name == WORKSPACE), runs[0])
    dense = reference.models[DENSE].perplexity if DENSE in reference.models else {}
    alike = [run for run in runs if _same(dense, run.models)]
    found: dict[tuple[Any, ...], Point] = {}
    for run in alike:
        for variant, model in run.models.items():
            if variant != DENSE:
                key = (variant, model.sparsity, *sorted(model.perplexity.items()))
                found.setdefault(key, Point(run.name, run.changes, variant, model))
    if len({point.run for point in found.values()}) < 2:
        raise SparselineError(f"no experiment and no branch has other figures than {alike[0].name if alike else reference.name}; {mend}")
    texts = tuple(sorted(dense, key=lambda text: (text != first, text)))
    points = sorted(found.values(), key=lambda point: (round(point.model.sparsity, 4), point.model.perplexity.get(texts[0], math.inf)))
    return Comparison(texts, dense, tuple(points), tuple(run.name for run in runs if run not in alike))


def _same(dense: Mapping[str, float], models: Mapping[str, Model]) -> bool:
    own = models[DENSE].perplexity if DENSE in models else {}
    return bool(dense) and dense.keys() == own.keys() and all(math.isclose(dense[text], own[text], rel_tol=1e-4) for text in dense)


def columns(comparison: Comparison) -> list[Column]:
    """The table, column by column; the lowest perplexity at each sparsity is marked."""
    points = comparison.points
    found = [
        Column("", "run", tuple(point.run for point in points), numeric=False),
        Column("", "changed", tuple(_short(point.changes, points) for point in points), numeric=False),
        Column("", "variant", tuple(point.variant for point in points), numeric=False),
        Column("", "pruned", tuple(wording.sparsity(point.model.sparsity) for point in points)),
    ]
    for text in comparison.texts:
        values, gaps = ([getattr(point.model, kind).get(text) for point in points] for kind in ("perplexity", "gap"))
        cells = tuple(table.ABSENT if value is None else wording.perplexity(value) for value in values)
        found.append(Column(table.PERPLEXITY + text, "ppl", cells, comparison.best(text)))
        if any(gap is not None for gap in gaps):
            cells = tuple(table.ABSENT if gap is None else f"{round(100 * gap, 1) + 0.0:.1f}%" for gap in gaps)
            found.append(Column(table.PERPLEXITY + text, "gap closed", cells))
    return found


def _short(changes: Mapping[str, str], points: Sequence[Point]) -> str:
    """A run's changes by the last two parts of their keys, or by the whole key where that would be two keys' name."""
    keys = {key for point in points for key in point.changes}
    tails = [".".join(key.split(".")[-2:]) for key in keys]
    said: list[str] = []
    for key, value in changes.items():
        tail = ".".join(key.split(".")[-2:])
        said.append((tail if tails.count(tail) == 1 else key) + value)
        if len(", ".join(said)) > MOST_CHANGES:
            said = said[: max(1, len(said) - 1)]
            break
    more = len(changes) - len(said)
    return ", ".join([*said, *([f"{more} more"] if more else [])]) or table.ABSENT


def terminal(comparison: Comparison) -> str:
    """The table for a terminal, the marked cells with a star."""
    starred = [
        replace(column, cells=tuple(f"{cell}{' *' if row in column.best else '  '}" for row, cell in enumerate(column.cells)))
        if column.best
        else column
        for column in columns(comparison)
    ]
    said = [table.plain(starred), "* the lowest perplexity at its share of pruned weights"]
    return "\n".join(said + ([_apart(comparison)] if comparison.apart else []))


def _apart(comparison: Comparison) -> str:
    return f"Left out, since they measured another model or other texts: {', '.join(comparison.apart)}."


def page(comparison: Comparison) -> str:
    """One self-contained HTML page: a figure per text, and the table."""
    figures = []
    for text in comparison.texts:
        lines: dict[str, list[tuple[float, float]]] = {}
        for point in comparison.points:
            if text in point.model.perplexity:
                lines.setdefault(point.variant, []).append((point.model.sparsity, point.model.perplexity[text]))
        figures.append(plots.tradeoff(text, dict(sorted(lines.items())), comparison.dense[text]))
    runs = len({point.run for point in comparison.points})
    lead = f"{runs} runs with {len(comparison.points)} different models. Pruned is the share of all prunable weights; what a run repeats of an earlier one is told once."
    notes = [
        content.Paragraph(
            "The lowest perplexity at each share of pruned weights is marked. `changed` is against the `params.yaml` of HEAD."
        )
    ]
    notes += [content.Paragraph(_apart(comparison))] if comparison.apart else []
    sections = [
        content.Section("figures", "Perplexity over the share of pruned weights", [content.Figures(figures)]),
        content.Section("table", "All runs", [content.Table(columns(comparison)), *notes]),
    ]
    return render.page("Runs compared", lead, sections)
