"""What was measured of every variant, and the figures that follow from it. Reads JSON, imports nothing heavy."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline_lib.core import params
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.params import Params
from pipeline_lib.export import wording

DENSE = "dense"
ABSENT = "–"
PERPLEXITY = "perplexity, "  # group of columns, before the name of the text


class ReportParams(Params):
    """Section ``report``."""

    baseline: str  # the variant that gaps are closed against
    title: str


@dataclass(frozen=True)
class Text:
    """How an evaluation text was cut."""

    rows: int
    length: int  # tokens per row


@dataclass(frozen=True)
class Task:
    """Accuracy of one task, in [0, 1], and of what it is."""

    acc: float
    stderr: float
    chance: float | None
    items: int  # measured
    of: int  # the task has
    truncated: int  # of those measured, to the model's window


@dataclass(frozen=True)
class Completion:
    """A prompt and how the model went on."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Variant:
    """Everything that is known about one model; ``facts`` (build/facts) are empty for the dense one.

    ``sizes`` (build/sizes) are empty for a variant that is not exported.
    """

    name: str
    perplexity: Mapping[str, float]
    tasks: Mapping[str, Task]
    completions: Sequence[Completion]
    facts: Mapping[str, Any]
    sizes: Mapping[str, Any]

    @property
    def pruned(self) -> bool:
        return bool(self.facts)

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that were pruned."""
        return float(self.facts["sparsity"]) if self.facts else 0.0

    @property
    def stages(self) -> list[str]:
        """Stages that it needs beyond those that every variant needs (prepare, text), in the graph's order."""
        if not self.pruned:
            return []
        return _own_stages(self.name, self.facts["settings"]["factors"], self.facts["settings"]["sensitivity"])

    @property
    def zeros(self) -> float | None:
        """Share of the prunable weights that are zero in the checkpoint: pruned, quantised to zero, or zero before; None for the dense model."""
        return self.facts["zeros"] / self.facts["prunable"] if self.facts else None


@dataclass(frozen=True)
class Choice:
    """What the model-level gate named, and on what grounds (build/choice.json)."""

    text: str
    chosen: str | None
    perplexity: Mapping[str, float]  # by candidate


@dataclass(frozen=True)
class Source:
    """A file of rows (build/texts): where it came from, and what it is."""

    name: str
    use: str  # calibrate or evaluate
    facts: Mapping[str, Any]
    sha256: str


@dataclass(frozen=True)
class Results:
    """The whole report's data: the dense model first, then the variants in the order of params.yaml."""

    title: str
    baseline: str
    model: Mapping[str, Any]  # build/prepare/model.json
    texts: Mapping[str, Text]  # evaluation texts in the order of params.yaml
    variants: tuple[Variant, ...]
    choice: Choice
    estimate: Mapping[str, Any]  # build/sensitivity/estimate.json; empty if no variant uses it
    sources: tuple["Source", ...]  # every text that rows were cut from
    params: str  # params.yaml, to the letter

    @property
    def dense(self) -> Variant:
        return self.variants[0]

    @property
    def pruned(self) -> tuple[Variant, ...]:
        return self.variants[1:]

    @property
    def text_names(self) -> list[str]:
        """Texts that perplexity was measured on: the order of params.yaml, then others by name."""
        measured = {text for variant in self.variants for text in variant.perplexity}
        return [text for text in self.texts if text in measured] + sorted(measured - set(self.texts))

    @property
    def task_names(self) -> list[str]:
        return sorted({task for variant in self.variants for task in variant.tasks})

    @property
    def main_text(self) -> str | None:
        """The text that the summary speaks of: ``test`` where there is one, else the last."""
        names = self.text_names
        return "test" if "test" in names else next(reversed(names), None)


@dataclass(frozen=True)
class Column:
    """One column of a table as text; ``best`` are the rows to mark."""

    group: str
    head: str
    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()
    numeric: bool = True


def _own_stages(name: str, factors: str, sensitivity: str) -> list[str]:
    """``factors`` and ``sensitivity`` are artifacts below build/, as in the variant's settings."""
    folder, _, rest = factors.partition("/")
    measured, _, curves = sensitivity.partition("/")
    stages = ["calibrate"] if folder in ("scale", "induce") or measured == "curves" else []
    if folder in ("scale", "induce"):
        stages.append("scale")
    if folder == "induce":
        stages.append(f"induce-{rest.partition('/')[0]}")
    if measured in ("sensitivity", "curves"):
        stages.append("sensitivity")
    if measured == "curves":
        stages.append(f"curves-{curves.removesuffix('.json')}")
    return [*stages, f"prune-{name}"]


def current() -> Results:
    """What the stages left for the model and the variants that params.yaml names.

    Raises:
        SparselineError: a file is missing or damaged, or params.yaml cannot be used.
    """
    texts = {name: Text(text["rows"], text["length"]) for name, text in params.section("texts").items() if text["use"] == "evaluate"}
    names, exported = list(params.section("variants") or {}), list(params.section("exported") or {})
    measured = [DENSE, *params.section("tasks.variants")]
    tasks = dict.fromkeys(params.section("tasks.presets"), measured)
    written = params.FILE.read_text(encoding="utf-8")
    return collect(Path("build"), params.load(ReportParams, "report"), names, texts, exported, tasks, written)


def collect(
    build: Path,
    settings: ReportParams,
    names: Sequence[str],
    texts: Mapping[str, Text],
    exported: Sequence[str],
    tasks: Mapping[str, Sequence[str]],
    written: str,
) -> Results:
    """Read what the stages left below ``build`` for the dense model and the named variants; other files there are ignored.

    ``exported`` are those that have sizes; ``tasks``: of every preset, the models that it was measured on;
    ``written``: params.yaml.

    Raises:
        SparselineError: a file is missing or damaged.
    """
    weighed = {DENSE: "prepare"} | {name: f"export@{name}" for name in exported}
    variants = [_variant(build, name, weighed.get(name), _tasks(build, name, tasks)) for name in (DENSE, *names)]
    source = _read(build / "prepare" / "model.json", "prepare")
    measured = any("sensitivity" in variant.stages for variant in variants)
    estimate = _read(build / "sensitivity" / "estimate.json", "sensitivity") if measured else {}
    return Results(settings.title, settings.baseline, source, texts, tuple(variants), _choice(build), estimate, _sources(build), written)


def _sources(build: Path) -> tuple[Source, ...]:
    found = []
    for path in sorted(build.glob("texts/*/*.safetensors")):
        try:
            raw = path.read_bytes()
            header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
            facts = json.loads(header["__metadata__"]["sparseline"])
        except (OSError, ValueError, KeyError) as error:
            raise SparselineError(f"{path} cannot be read ({error}); run `dvc repro -f text@{path.stem}` to make it again.") from error
        found.append(Source(path.stem, path.parent.name, facts, hashlib.sha256(raw).hexdigest()))
    return tuple(found)


def _choice(build: Path) -> Choice:
    return Choice(**_read(build / "choice.json", "choose"))


def _tasks(build: Path, name: str, presets: Mapping[str, Sequence[str]]) -> dict[str, Task]:
    """Every task that a model was measured on; under its preset's name too where there are several presets."""
    found: dict[str, Task] = {}
    for preset, models in presets.items():
        if name in models:
            stage = f"tasks-dense@{preset}" if name == DENSE else f"tasks@{preset}-{name}"
            measured = _read(build / "evaluate" / preset / f"{name}.json", stage)
            found |= {task if len(presets) == 1 else f"{preset} {task}": Task(**figures) for task, figures in measured.items()}
    return found


def _variant(build: Path, name: str, weighed: str | None, tasks: Mapping[str, Task]) -> Variant:
    """One variant; ``weighed`` is the stage that wrote its sizes, if there is one."""
    stage = "evaluate-dense" if name == DENSE else f"evaluate@{name}"
    evaluated = _read(build / "evaluate" / f"{name}.json", stage)
    completions = _read(build / "completions" / f"{name}.json", stage)
    facts = {} if name == DENSE else _read(build / "facts" / f"{name}.json", f"prune@{name}")
    sizes = _read(build / "sizes" / f"{name}.json", weighed) if weighed else {}
    return Variant(name, evaluated["perplexity"], tasks, [Completion(**sample) for sample in completions], facts, sizes)


def _read(path: Path, stage: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SparselineError(f"{path} is missing; run `dvc repro {stage}` to make it.") from error
    except (OSError, ValueError) as error:
        raise SparselineError(f"{path} cannot be read ({error}); run `dvc repro -f {stage}` to make it again.") from error


# What follows from the measurements


def gap_closed(results: Results, variant: Variant, text: str) -> float | None:
    """(ln ppl_baseline − ln ppl) / (ln ppl_baseline − ln ppl_dense): 0 is the baseline, 1 the dense model.

    None for these two, without a baseline, and where the baseline is no worse than the dense model (there is no gap).
    """
    base = next((other for other in results.pruned if other.name == results.baseline), None)
    if base is None or variant.name in (DENSE, base.name):
        return None
    if not all(text in one.perplexity for one in (base, variant, results.dense)):
        return None
    start, end = math.log(base.perplexity[text]), math.log(results.dense.perplexity[text])
    return None if start - end <= 1e-12 else (start - math.log(variant.perplexity[text])) / (start - end)


def comparison(results: Results) -> list[Column]:
    """The comparison table, column by column; the best cell among the pruned variants is marked."""
    variants = results.variants
    columns = [Column("", "variant", tuple(variant.name for variant in variants), numeric=False)]
    columns.append(Column("", "pruned", tuple(wording.sparsity(variant.sparsity) for variant in variants)))
    if results.pruned:
        shares = [variant.zeros for variant in variants]
        columns.append(Column("", "zeros", tuple(ABSENT if share is None else wording.sparsity(share) for share in shares)))
    for text in results.text_names:
        values = [variant.perplexity.get(text) for variant in variants]
        columns.append(column_of(PERPLEXITY + text, "ppl", values, wording.perplexity, best=min))
        gaps = [gap_closed(results, variant, text) for variant in variants]
        if any(gap is not None for gap in gaps):
            column = column_of(PERPLEXITY + text, "gap closed", gaps, wording.gap, best=max)
            cells = tuple("baseline" if v.name == results.baseline else cell for v, cell in zip(variants, column.cells, strict=True))
            columns.append(Column(column.group, column.head, cells, column.best))
    for task in results.task_names:
        found = [variant.tasks.get(task) for variant in variants]
        column = column_of("accuracy, %", task, [one.acc if one else None for one in found], lambda share: f"{100 * share:.1f}", best=max)
        cells = tuple(f"{cell} ± {100 * one.stderr:.1f}" if one else ABSENT for one, cell in zip(found, column.cells, strict=True))
        columns.append(Column(column.group, column.head, cells, column.best))
    return columns


def notes(results: Results) -> list[str]:
    """What the comparison does not show, and why; empty where nothing is missing. Plain text with `code` marks."""
    said = []
    base = next((variant.perplexity for variant in results.pruned if variant.name == results.baseline), {})
    if results.pruned and results.baseline not in {variant.name for variant in results.pruned}:
        said.append(f"No gap is given: the baseline `{results.baseline}` is not among the variants (see `report.baseline`).")
    level = [text for text, value in base.items() if value <= results.dense.perplexity.get(text, 0.0) * (1 + 1e-12)]
    said += [f"On `{text}` the baseline is no worse than the dense model, so there is no gap to close." for text in level]
    for name in results.task_names:
        cut = max(variant.tasks[name].truncated for variant in results.variants if name in variant.tasks)
        items = next(variant.tasks[name].items for variant in results.variants if name in variant.tasks)
        if cut:
            said.append(f"{cut} of the {items} items of `{name}` are longer than the model's window: their beginning is left out.")
    if results.estimate.get("wanted_moments") == "full" and results.estimate["output_moments"] != "full":
        said.append("Full output moments exceed `sensitivity.moment_budget_bytes`: allocations use their diagonals.")
    return said


def column_of(group: str, head: str, values: Sequence[float | None], show: Any, best: Any) -> Column:
    """Cells as text; the best of the pruned variants is marked with its ties, if there is anything to choose from."""
    cells = tuple(ABSENT if value is None else str(show(value)) for value in values)
    rivals = {row: value for row, value in enumerate(values) if row > 0 and value is not None}
    marked: frozenset[int] = frozenset()
    if len({cells[row] for row in rivals}) > 1:
        chosen = cells[best(rivals, key=lambda row: rivals[row])]
        marked = frozenset(row for row in rivals if cells[row] == chosen)
    return Column(group, head, cells, marked)


def plain(columns: Sequence[Column]) -> str:
    """Aligned columns for a terminal."""
    heads = [
        " ".join([column.group.removeprefix(PERPLEXITY), column.head]) if column.group.startswith(PERPLEXITY) else column.head
        for column in columns
    ]
    widths = [max(map(len, (head, *column.cells))) for head, column in zip(heads, columns, strict=True)]
    rows = [heads, *zip(*(column.cells for column in columns), strict=True)]
    aligned = [
        "  ".join(
            cell.rjust(width) if column.numeric else cell.ljust(width) for cell, width, column in zip(row, widths, columns, strict=True)
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in aligned)


def summary(results: Results) -> dict[str, Any]:
    """What report/summary.json holds: quality and size, to six digits. DVC shows these as metrics, so they are few.

    ``gap`` as a share (``gap_closed``), where there is one; ``bytes`` of the files in the smallest format, where a model was weighed.
    """
    found = {}
    for variant in results.variants:
        gaps = {text: gap for text in results.text_names if (gap := gap_closed(results, variant, text)) is not None}
        sizes = [weighed["file_bytes"] for weighed in variant.sizes.get("formats", {}).values()]
        found[variant.name] = {
            "sparsity": round(variant.sparsity, 6),
            **({} if variant.zeros is None else {"zeros": round(variant.zeros, 6)}),
            "perplexity": {text: round(value, 6) for text, value in variant.perplexity.items()},
            **({"gap": {text: round(gap, 6) for text, gap in gaps.items()}} if gaps else {}),
            **({"bytes": min(sizes)} if sizes else {}),
            **({"accuracy": {name: round(task.acc, 6) for name, task in variant.tasks.items()}} if variant.tasks else {}),
        }
    return found


def points(results: Results) -> list[dict[str, Any]]:
    """What report/perplexity.json holds: every model's perplexity on the main text, for `dvc plots show`."""
    text = results.main_text
    measured = [variant for variant in results.variants if text in variant.perplexity]
    return [{"variant": variant.name, "text": text, "perplexity": variant.perplexity[text]} for variant in measured if text]


# Matrices as depth × kind

ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "down", "fc1", "fc2")  # as data flows through a block


def kinds(facts: Mapping[str, Any]) -> list[str]:
    """Kinds of a variant's matrices, in the order of the computation."""
    found = {matrix["kind"] for matrix in facts["matrices"].values()}
    return sorted(found, key=lambda kind: (ORDER.index(kind) if kind in ORDER else len(ORDER), kind))


def by_place(facts: Mapping[str, Any]) -> dict[tuple[int, str], list[Mapping[str, Any]]]:
    """(block, kind) -> matrices there: one, or one per expert."""
    places: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for matrix in facts["matrices"].values():
        places.setdefault((int(matrix["block"]), matrix["kind"]), []).append(matrix)
    return places


def sparsity_by_place(facts: Mapping[str, Any]) -> dict[tuple[int, str], float]:
    return {
        place: 1 - sum(matrix["kept"] for matrix in matrices) / sum(matrix["size"] for matrix in matrices)
        for place, matrices in by_place(facts).items()
    }


def uniform(facts: Mapping[str, Any]) -> bool:
    """Whether all places are equally sparse, to one percentage point (counts are whole numbers)."""
    shares = sparsity_by_place(facts).values()
    return max(shares) - min(shares) < 0.01
