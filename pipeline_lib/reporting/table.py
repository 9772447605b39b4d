"""The measurements of every variant, and the figures derived from them. Imports nothing heavy."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from pipeline_lib.core import files, params
from pipeline_lib.core.params import Params
from pipeline_lib.core.workspace import DENSE, Workspace
from pipeline_lib.evaluation.metrics import by_task, metric, ordered
from pipeline_lib.evaluation.settings import VerdictParams
from pipeline_lib.evaluation.verdict import Measured, Verdict, judge
from pipeline_lib.export import wording
from pipeline_lib.recipe.needs import needs
from pipeline_lib.recipe.settings import Recipe

ABSENT = "–"
COST = "cost"  # group of columns
PERPLEXITY = "perplexity, "  # group of columns, before the name of the text
Facts = Mapping[str, Any]  # a JSON file as docs/artifacts.md describes it


class ReportParams(Params):
    """Section ``report``."""

    baseline: str  # the variant from which gaps are measured
    title: str


@dataclass(frozen=True)
class Variant:
    """All measurements of one model."""

    name: str
    perplexity: Mapping[str, float]
    divergence: Mapping[
        str, Mapping[str, float]
    ]  # text -> kl, kl_99, agreement, maybe reverse_kl, reverse_kl_99; empty for the dense model
    # metrics (value, stderr), chance, items measured, of how many, how many truncated to the
    # model's window
    tasks: Mapping[str, Facts]
    completions: Sequence[Mapping[str, str]]  # prompt, completion
    facts: Facts  # build/facts; empty for the dense model
    sizes: Facts  # build/sizes; empty for a variant without files to weigh
    recipe: Recipe | None = None  # None for the dense model
    training: Facts = field(default_factory=dict)  # empty for a one-shot variant

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that were pruned."""
        return float(self.facts["sparsity"]) if self.facts else 0.0

    @property
    def zeros(self) -> float | None:
        """Share of the prunable weights that are zero in the checkpoint: pruned, quantised to zero,
        or zero before; None for the dense model.
        """
        counted = self.training if self.training.get("kept") else self.facts
        return counted["zeros"] / self.facts["prunable"] if self.facts else None


@dataclass(frozen=True)
class Results:
    """The whole report's data: the dense model first, then the variants in the order of params.yaml."""

    settings: ReportParams
    verdict: VerdictParams
    model: Facts  # build/prepare/model.json
    texts: tuple[str, ...]  # of params.yaml, those for evaluation
    variants: tuple[Variant, ...]
    choice: Facts  # build/choice.json
    estimate: Facts  # build/sensitivity/estimate.json; empty if no variant uses it
    # facts about every file in build/texts, with ``name``, ``use`` and ``rows_sha256``
    sources: tuple[Facts, ...]
    params: str  # text of params.yaml

    @property
    def dense(self) -> Variant:
        return self.variants[0]

    @property
    def pruned(self) -> tuple[Variant, ...]:
        return self.variants[1:]

    @property
    def baseline(self) -> Variant | None:
        return next((variant for variant in self.pruned if variant.name == self.settings.baseline), None)

    @property
    def text_names(self) -> list[str]:
        """Texts that every model's perplexity was measured on, in the order of params.yaml."""
        return [text for text in self.texts if all(text in variant.perplexity for variant in self.variants)]

    @property
    def tasks(self) -> dict[str, list[Facts]]:
        """Task -> the results of the models that were measured on it."""
        names = sorted({task for variant in self.variants for task in variant.tasks})
        return {
            name: [variant.tasks[name] for variant in self.variants if name in variant.tasks]
            for name in names
        }

    @property
    def main_text(self) -> str | None:
        """The text of the first screen: ``test`` if there is one, else the last text."""
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


def stages(variant: Variant) -> list[str]:
    """The stages that a variant needs besides those that all need (prepare, text), in the graph's
    order and by the names of their cost records.
    """
    if variant.recipe is None:
        return []
    name, need = variant.name, needs(variant.recipe)
    learned = ["calibrate"] * (need.factors or need.curves) + ["scale"] * need.factors
    measured = ["sensitivity"] * need.sensitivities + [f"curves-{name}"] * need.curves
    return [
        *learned,
        *measured,
        f"allocate-{name}",
        *[f"induce-{name}"] * need.factors,
        f"prune-{name}",
        *[f"distil-{name}"] * bool(variant.training),
    ]


def sensitivities(facts: Facts) -> dict[str, Facts]:
    """Matrix -> its entry of sensitivity.json, where the allocation read one."""
    return {
        name: matrix["sensitivity"] for name, matrix in facts["matrices"].items() if matrix.get("sensitivity")
    }


def layer_errors(facts: Facts) -> dict[int, float]:
    """Block -> mean error of its matrices, where any was measured (magnitude runs no forward pass)."""
    errors: dict[int, list[float]] = {}
    for matrix in facts["matrices"].values():
        if matrix.get("layer_error") is not None:
            errors.setdefault(int(matrix["block"]), []).append(matrix["layer_error"])
    return {block: mean(errors[block]) for block in sorted(errors)}


def induction(facts: Facts) -> dict[str, Facts]:
    """Block -> the errors that its gate judged, and its choice; empty for a variant that learns no
    factors.
    """
    found = (facts["transform"] or {}).get("induction", {})
    return {block: found[block] for block in sorted(found, key=int)}


def fits(facts: Facts) -> dict[str, dict[str, Facts]]:
    """Step that fits a whole block -> block -> its errors before and after; blocks without the step
    are left out.
    """
    found: dict[str, dict[str, Facts]] = {}
    for block in sorted(facts["blocks"], key=int):
        for step, errors in facts["blocks"][block].items():
            found.setdefault(step, {})[block] = errors
    return found


# Artifacts of the stages


def collect(root: Path = Path()) -> Results:
    """The artifacts below ``root`` of the models in its params.yaml; other files there are ignored.

    Raises:
        SparselineError: a file is missing or damaged, or params.yaml cannot be used.
    """
    path, workspace = root / params.FILE, Workspace(root)
    settings = params.load(ReportParams, "report", path)
    model = workspace.load(workspace.model)
    several = len(workspace.load(workspace.tasks(DENSE))) > 1  # the dense model is measured on every preset
    variants = tuple(
        _variant(workspace, name, several) for name in (DENSE, *(params.section("variants", path) or ()))
    )
    measured = any("sensitivity" in stages(variant) for variant in variants)
    return Results(
        settings,
        params.load(VerdictParams, "verdict", path),
        model,
        tuple(name for name, text in params.section("texts", path).items() if text["use"] == "evaluate"),
        variants,
        workspace.load(workspace.choice),
        workspace.load(workspace.sensitivity / "estimate.json") if measured else {},
        tuple(_source(workspace, path) for path in sorted(workspace.texts("").glob("*/*.safetensors"))),
        files.text(path),
    )


def _variant(workspace: Workspace, name: str, several: bool) -> Variant:
    measured = workspace.load(workspace.evaluation(name))
    completions = workspace.load(workspace.completions(name))["completions"]
    facts = {} if name == DENSE else workspace.load(workspace.facts(name))
    recipe = Recipe.model_validate(facts["settings"]) if facts else None
    training = workspace.load(workspace.training(name)) if facts else {}
    if recipe is not None and needs(recipe).sensitivities:
        for matrix, entry in workspace.load(workspace.sensitivity / "sensitivity.json").items():
            facts["matrices"][matrix]["sensitivity"] = entry
    found = by_task(workspace.load(workspace.tasks(name)), several)
    sizes = workspace.load(workspace.sizes(name))
    return Variant(
        name,
        measured["perplexity"],
        measured["divergence"],
        found,
        completions,
        facts,
        sizes,
        recipe,
        training,
    )


def _source(workspace: Workspace, path: Path) -> Facts:
    """Facts about a file of samples, and its source."""
    facts = workspace.load_facts(path)
    return {**facts, "name": path.stem, "use": path.parent.name, "rows_sha256": files.sha256(path)}


# Derived figures


def gap_closed(results: Results, variant: Variant, text: str) -> float | None:
    """(ln ppl_baseline − ln ppl) / (ln ppl_baseline − ln ppl_dense): 0 is the baseline, 1 the dense model.

    None for these two, without a baseline, and where the baseline is no worse than the dense model
    (there is no gap).
    """
    base = results.baseline
    if base is None or variant.name in (DENSE, base.name):
        return None
    start, own, end = (math.log(v.perplexity[text]) for v in (base, variant, results.dense))
    return None if start - end <= 1e-12 else (start - own) / (start - end)


def comparison(results: Results) -> list[Column]:
    """The comparison table, column by column; the best cell among the pruned variants is marked."""
    variants = results.variants
    columns = [words("variant", [variant.name for variant in variants])]
    columns.append(Column("", "pruned", tuple(wording.sparsity(variant.sparsity) for variant in variants)))
    if results.pruned:
        columns.append(
            Column("", "zeros", tuple(shown([variant.zeros for variant in variants], wording.sparsity)))
        )
    for text in results.text_names:
        group = PERPLEXITY + text
        columns.append(
            ranked(group, "ppl", [variant.perplexity[text] for variant in variants], wording.perplexity, min)
        )
        gaps = [gap_closed(results, variant, text) for variant in variants]
        if any(gap is not None for gap in gaps):
            columns.append(gap_column(group, results, gaps))
    for name, tasks in figures(results).items():
        for task in tasks:
            found = [variant.tasks.get(task, {}).get("metrics", {}).get(name) for variant in variants]
            values, head = [one["value"] if one else None for one in found], headed(task, name)
            show: Callable[[float], str] = wording.points if metric(name).share else wording.perplexity
            if metric(name).share:
                column = ranked(f"{metric(name).words}, %", head, values, show, max)
            else:
                column = ranked(metric(name).words, head, values, show, min)
            errors = [None if one is None else one["stderr"] for one in found]
            cells = (
                cell if error is None else f"{cell} ± {show(error)}"
                for error, cell in zip(errors, column.cells, strict=True)
            )
            columns.append(Column(column.group, column.head, tuple(cells), column.best))
    return columns


def gap_column(group: str, results: Results, gaps: Sequence[float | None]) -> Column:
    """The share of the gap that each variant closes; the baseline is named in its row."""
    column = ranked(group, "gap closed", gaps, wording.share, max)
    named = zip(results.variants, column.cells, strict=True)
    cells = ("baseline" if variant is results.baseline else cell for variant, cell in named)
    return Column(group, column.head, tuple(cells), column.best)


def figures(results: Results) -> dict[str, list[str]]:
    """Figure of tasks -> the tasks that have it, main figures first."""
    found: dict[str, list[str]] = {}
    for task, measured in results.tasks.items():
        for name in measured[0]["metrics"]:
            found.setdefault(name, []).append(task)
    return {name: found[name] for name in ordered(found)}


def headed(task: str, name: str) -> str:
    """The name of a task, with the filter of its answers if the figure has one."""
    return " ".join([task, *name.split(", ")[1:]])


def divergence(results: Results) -> list[Column]:
    """Divergence of the pruned variants from the dense model, per text; the best cells are marked."""
    columns = [words("variant", [variant.name for variant in results.pruned])]
    for text in results.text_names:
        found = [variant.divergence[text] for variant in results.pruned]
        for key, head in wording.DIVERGENCE.items():
            if all(key in one for one in found):
                # a place for the dense model, which ``ranked`` skips
                values = [None, *(one[key] for one in found)]
                column = (
                    ranked(text, head, values, wording.kl, min)
                    if key != "agreement"
                    else ranked(text, head, values, wording.share, max)
                )
                columns.append(
                    Column(text, head, column.cells[1:], frozenset(row - 1 for row in column.best))
                )
    return columns


def verdicts(results: Results) -> dict[str, Verdict]:
    """Variant -> verdict."""
    dense, *pruned = (Measured(one.perplexity, one.divergence, one.tasks) for one in results.variants)
    return {
        variant.name: judge(results.verdict, own, dense)
        for variant, own in zip(results.pruned, pruned, strict=True)
    }


def notes(results: Results) -> list[str]:
    """Sentences on what the comparison lacks, and why. Plain text with `code` marks."""
    said = []
    if results.pruned and results.baseline is None:
        said.append(
            f"There is no column `gap closed`: `report.baseline` = `{results.settings.baseline}` is not a"
            " variant."
        )
    base, dense = results.baseline or results.dense, results.dense.perplexity
    level = [
        text
        for text in results.text_names
        if base.facts and base.perplexity[text] <= dense[text] * (1 + 1e-12)
    ]
    said += [
        f"On `{text}` the baseline is at least as good as the dense model, so there is no gap to close."
        for text in level
    ]
    for name, measured in results.tasks.items():
        if cut := max(task["truncated"] for task in measured):
            of = f"{cut} of the {measured[0]['items']} items of `{name}`"
            said.append(f"{of} are longer than the model's context window; their beginning was cut off.")
    if results.estimate.get("wanted_moments") == "full" and results.estimate["output_moments"] != "full":
        said.append(
            "The full output moments exceed `sensitivity.moment_budget_bytes`, so allocations use their"
            " diagonals."
        )
    return said


def shown(values: Sequence[float | None], show: Callable[[float], str]) -> list[str]:
    return [ABSENT if value is None else show(value) for value in values]


def quoted(names: Iterable[str]) -> str:
    """`a`, `b` and `c`."""
    found = [f"`{name}`" for name in names]
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def words(head: str, cells: Sequence[str]) -> Column:
    """A column without a group, aligned to the left."""
    return Column("", head, tuple(cells), numeric=False)


def ranked(
    group: str,
    head: str,
    values: Sequence[float | None],
    show: Callable[[float], str],
    best: Callable[..., int],
) -> Column:
    """Cells as text; the best cells (``min`` or ``max``) of the pruned variants are marked, unless all
    are equal.
    """
    cells = shown(values, show)
    rivals = {row: value for row, value in enumerate(values) if row > 0 and value is not None}
    marked: frozenset[int] = frozenset()
    if len({cells[row] for row in rivals}) > 1:
        chosen = cells[best(rivals, key=lambda row: rivals[row])]
        marked = frozenset(row for row in rivals if cells[row] == chosen)
    return Column(group, head, tuple(cells), marked)


def plain(columns: Sequence[Column]) -> str:
    """Aligned columns for a terminal. Two lines of heads, so that 80 columns suffice: the name of a
    group is above its columns, and a head outside of groups is broken before its last word.
    """
    blocks = []
    for group, found in groupby(columns, lambda column: "" if column.group == COST else column.group):
        name, members = group.removeprefix(PERPLEXITY), list(found)
        for some in [members] if group else [[column] for column in members]:
            above, heads = (name, [column.head for column in some]) if group else _broken(some[0].head)
            rows = zip(*map(_aligned, heads, some), strict=True)
            cells = ["  ".join(row) for row in rows]
            width = max(len(above), len(cells[0]))
            over = above.center(width) if group else above.rjust(width)
            blocks.append([over, *(cell.rjust(width) for cell in cells)])
    return "\n".join("  ".join(row).rstrip() for row in zip(*blocks, strict=True))


def _broken(head: str) -> tuple[str, list[str]]:
    above, _, last = head.rpartition(" ")
    return above, [last]


def _aligned(head: str, column: Column) -> list[str]:
    cells = [head, *column.cells]
    width = max(map(len, cells))
    return [cell.rjust(width) if column.numeric else cell.ljust(width) for cell in cells]


def summary(results: Results) -> dict[str, Any]:
    """Content of report/summary.json: quality and size, to six digits. DVC shows these as metrics.

    ``gap`` is a share (``gap_closed``), where there is one. ``kl`` in nats per token and the share
    ``agreement`` are those of a pruned variant. ``bytes`` are those of the files in the smallest
    format, if sizes are known.
    """
    found = {}
    for variant in results.variants:
        gaps = {
            text: round(gap, 6)
            for text in results.text_names
            if (gap := gap_closed(results, variant, text)) is not None
        }
        sizes = [weighed["file_bytes"] for weighed in variant.sizes.get("formats", {}).values()]
        found[variant.name] = {
            "sparsity": round(variant.sparsity, 6),
            **({} if variant.zeros is None else {"zeros": round(variant.zeros, 6)}),
            "perplexity": {text: round(value, 6) for text, value in variant.perplexity.items()},
            **({"gap": gaps} if gaps else {}),
            **_by_figure(variant.divergence),
            **({"bytes": min(sizes)} if sizes else {}),
            **_by_metric(variant.tasks),
        }
    return found


def _by_metric(tasks: Mapping[str, Facts]) -> dict[str, dict[str, float]]:
    """Metric -> task -> value; ``acc`` is called accuracy."""
    found: dict[str, dict[str, float]] = {}
    for task, facts in tasks.items():
        for name, one in facts["metrics"].items():
            base = name.split(", ")[0]
            found.setdefault("accuracy" if base == "acc" else base, {})[headed(task, name)] = round(
                one["value"], 6
            )
    return found


def _by_figure(divergence: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Figure -> text -> value, means only."""
    names = [
        name
        for name in ("kl", "reverse_kl", "agreement")
        if any(name in found for found in divergence.values())
    ]
    return {name: {text: round(found[name], 6) for text, found in divergence.items()} for name in names}


def points(results: Results) -> list[dict[str, Any]]:
    """Content of report/perplexity.json: perplexity and sparsity per model and text, for `dvc plots`."""
    return [
        {
            "variant": variant.name,
            "text": text,
            "sparsity": round(variant.sparsity, 6),
            "perplexity": variant.perplexity[text],
        }
        for text in results.text_names
        for variant in results.variants
    ]


# Matrices by block and kind

ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "down", "fc1", "fc2")  # as data flows through a block


def in_order(kinds: Iterable[str]) -> list[str]:
    """Kinds of matrices in the order of the computation."""
    return sorted(kinds, key=lambda kind: (ORDER.index(kind) if kind in ORDER else len(ORDER), kind))


def by_place(facts: Facts) -> dict[tuple[int, str], float]:
    """(block, kind) -> share pruned of its matrices (one, or one per expert)."""
    places: dict[tuple[int, str], list[Facts]] = {}
    for matrix in facts["matrices"].values():
        places.setdefault((int(matrix["block"]), matrix["kind"]), []).append(matrix)
    return {place: pruned_share(*matrices) for place, matrices in places.items()}


def pruned_share(*matrices: Facts) -> float:
    """Share of the weights of these matrices that was pruned."""
    return 1 - sum(matrix["kept"] for matrix in matrices) / sum(matrix["size"] for matrix in matrices)


def uniform(facts: Facts) -> bool:
    """Whether all places are equally sparse, to one percentage point (counts are whole numbers)."""
    shares = by_place(facts).values()
    return max(shares) - min(shares) < 0.01
