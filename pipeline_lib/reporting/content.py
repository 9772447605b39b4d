"""What the report says, section by section, once for both formats. Prose is plain text with `code` marks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

from pipeline_lib.export import wording
from pipeline_lib.recipe import words
from pipeline_lib.recipe.settings import Recipe
from pipeline_lib.reporting import plots, sizes, table
from pipeline_lib.reporting.costs import Costs, by_stage, by_variant
from pipeline_lib.reporting.plots import Figure
from pipeline_lib.reporting.table import ABSENT, DENSE, Column, Results, Variant

MOST_ROWS = 12  # a longer table per block is closed until asked for
MOVED = "nothing → kept"  # group of columns


@dataclass(frozen=True)
class Paragraph:
    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Table:
    kind: ClassVar[str] = "table"
    columns: Sequence[Column]

    @property
    def rows(self) -> list[list[tuple[Column, str, bool]]]:
        """Row by row: column, cell, whether it is marked."""
        return [[(column, column.cells[row], row in column.best) for column in self.columns] for row in range(len(self.columns[0].cells))]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Neighbouring columns under one group head, and how many they are; none if no column has a group."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans if any(name for name, _ in spans) else []


@dataclass(frozen=True)
class Figures:
    kind: ClassVar[str] = "figures"
    figures: Sequence[Figure]


@dataclass(frozen=True)
class Continuation:
    """A completion, split where it leaves the dense model's."""

    name: str
    same: str
    own: str


@dataclass(frozen=True)
class Sample:
    kind: ClassVar[str] = "sample"
    number: int
    prompt: str
    continuations: Sequence[Continuation]


@dataclass(frozen=True)
class Code:
    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Details:
    """Closed until asked for."""

    kind: ClassVar[str] = "details"
    summary: str
    blocks: Sequence[Any]


@dataclass(frozen=True)
class Slot:
    """A place on the HTML page that a script file beside it fills, if there is one."""

    kind: ClassVar[str] = "slot"
    script: str


@dataclass(frozen=True)
class Section:
    name: str  # anchor
    title: str
    blocks: Sequence[Any]


def lead(results: Results) -> str:
    """The page's first sentences: what was pruned, and what came of it on the main text."""
    model, text = results.model, results.main_text
    source = model.get("id") or model["path"]
    said = [
        f"{model['family']} model `{source}` with {model['parameters']:,} parameters ({model['dtype']}); {_variants(len(results.pruned))}."
    ]
    rivals = [variant for variant in results.pruned if text in variant.perplexity]
    if text is not None and rivals and text in results.dense.perplexity:
        best = min(rivals, key=lambda variant: variant.perplexity[text])
        gap = table.gap_closed(results, best, text)
        closes = "" if gap is None else f"; it closes {100 * gap:.1f}% of the gap that `{results.baseline}` leaves"
        said.append(
            f"On `{text}`, `{best.name}` has the lowest perplexity of them: {wording.perplexity(best.perplexity[text])} with "
            f"{wording.sparsity(best.sparsity)} of the prunable weights pruned, against {wording.perplexity(results.dense.perplexity[text])} dense{closes}."
        )
    return " ".join(said)


def sections(results: Results) -> list[Section]:
    """Everything below the lead, in reading order."""
    return [
        Section("comparison", "Comparison", _comparison(results)),
        Section("costs", "Costs", _costs()),
        Section("sizes", "Sizes", _sizes(results)),
        Section("sparsity", "Share pruned per matrix", _sparsity(results)),
        Section("sensitivity", "Sensitivity", _sensitivity(results)),
        Section("induction", "Induction", _induction(results)),
        Section("reconstruction", "Reconstruction", _reconstruction(results)),
        Section("samples", "Sample completions", _samples(results)),
        Section("provenance", "Provenance", _provenance(results)),
    ]


def figures(content: Sequence[Section]) -> list[Figure]:
    """All figures of the report."""
    return [figure for section in content for block in section.blocks if isinstance(block, Figures) for figure in block.figures]


def _variants(count: int) -> str:
    return {0: "no pruned variant", 1: "one pruned variant"}.get(count, f"{count} pruned variants")


def _list(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def _range(values: Sequence[float], digits: int = 2) -> str:
    return f"{100 * min(values):.{digits}f}% to {100 * max(values):.{digits}f}%"


# Comparison


def _comparison(results: Results) -> list[Any]:
    blocks: list[Any] = [Table(table.comparison(results))]
    if results.pruned:
        blocks.append(
            Paragraph(
                "Marked is the best figure among the pruned variants, as printed; accuracies that differ by less than their errors are "
                "level. Of the prunable weights, those pruned have a zero in the mask. Zeros are counted in the checkpoint: where weights are "
                "quantised, kept ones can be zero too."
            )
        )
    blocks += [Paragraph(said) for said in table.notes(results)]
    blocks += [Paragraph(said) for said in (_protocol(results), _gap(results), _choice(results), _tasks(results)) if said]
    blocks.append(Figures([figure for figure in (plots.perplexity(results), plots.accuracy(results)) if figure]))
    if results.pruned:
        blocks.append(Paragraph("What each variant is made of; the full settings are under Provenance."))
        blocks.append(Table(_recipes(results)))
    return blocks


def _protocol(results: Results) -> str:
    """How perplexity is measured, with the numbers of params.yaml."""
    cuts = {name: text for name, text in results.texts.items() if name in results.text_names}
    said = "Perplexity is exp of the mean negative log-likelihood per token over rows without overlap or shared context"
    if cuts:
        lengths = sorted({text.length for text in cuts.values()})
        rows = ", ".join(f"{text.rows} rows of {text.length} tokens of `{name}`" for name, text in cuts.items())
        predicted = " or ".join(str(length - 1) for length in lengths)
        said += f" ({rows}); a row's first token is not predicted, the {predicted} after it are"
    if {"validation", "test"} <= set(results.text_names):
        said += ". Recipes are chosen on `validation`; `test` is only reported"
    return said + "."


def _gap(results: Results) -> str:
    base = next((variant for variant in results.pruned if variant.name == results.baseline), None)
    if base is None:
        return ""
    return f"Gap closed = (ln ppl of `{base.name}` − ln ppl) / (ln ppl of `{base.name}` − ln ppl dense): 0% is the baseline, 100% the dense model."


def _choice(results: Results) -> str:
    choice = results.choice
    if choice.chosen is None:
        return ""
    others = [f"`{name}` {wording.perplexity(value)}" for name, value in choice.perplexity.items() if name != choice.chosen]
    return (
        f"The gate (`choose`) names `{choice.chosen}`: perplexity {wording.perplexity(choice.perplexity[choice.chosen])} on `{choice.text}`, against "
        f"{', '.join(others) or 'no other candidate'}."
    )


def _tasks(results: Results) -> str:
    if not results.task_names:
        return "No tasks were run (`tasks.presets` is empty)."
    chances: dict[str, float | None] = {}
    for variant in results.variants:
        for name, task in variant.tasks.items():
            chances.setdefault(name, task.chance)
    known = [f"{100 * chances[name]:.0f}% on `{name}`" for name in results.task_names if chances[name] is not None]  # type: ignore[operator]
    unknown = [name for name in results.task_names if chances[name] is None]
    counted = {name: next(v.tasks[name] for v in results.variants if name in v.tasks) for name in results.task_names}
    items = [f"{'all' if task.items == task.of else f'{task.items} of'} {task.of} items of `{name}`" for name, task in counted.items()]
    said = f"Accuracies are of {', '.join(items)}, and stand with the standard error of their mean."
    if known:
        said += f" Guessing gives {' and '.join([', '.join(known[:-1]), known[-1]] if len(known) > 1 else known)}."
    return said + (f" What guessing gives on {_list(unknown)} is not known." if unknown else "")


def _recipes(results: Results) -> list[Column]:
    recipes = [{"variant": variant.name} | words.rows(Recipe.model_validate(variant.facts["settings"])) for variant in results.pruned]
    return [Column("", head, tuple(recipe[head] for recipe in recipes), numeric=False) for head in recipes[0]]


# Costs


def _costs() -> list[Any]:
    """Nothing that was measured: it differs from run to run, and equal runs must write equal reports. ``costs`` completes the section."""
    return [
        Paragraph(
            "Seconds and memory differ from run to run, so they are not part of the cached report. `make run` writes those of the stages "
            "that ran on this machine to `costs.js` beside this page, which then shows them here."
        ),
        Slot("costs.js"),
    ]


def costs(results: Results, measured: Costs) -> list[Any]:
    """What completes the section Costs on the machine where the stages ran."""
    return [
        Table(by_variant(results, measured)),
        Paragraph(
            "Seconds are the wall time of the stages that a variant needs for itself, one after another: `prune`, and `calibrate`, `scale`, "
            "`induce`, `sensitivity` and `curves` where its recipe uses them. Peak is the largest resident memory of these stages. A dash "
            "means that a stage did not run here: the cache had its result."
        ),
        Details("Every stage that ran here", [Table(by_stage(measured))]),
    ]


# Sizes


def _sizes(results: Results) -> list[Any]:
    if not sizes.exported(results):
        return [Paragraph("No variant is exported (`exported`), so there are no files to weigh.")]
    found = [Table(sizes.columns(results)), Paragraph(sizes.explanation(results))]
    return [*found, *(Figures([figure]) for figure in [plots.sizes(results)] if figure)]


# Sparsity per matrix


def _sparsity(results: Results) -> list[Any]:
    if not results.pruned:
        return [Paragraph("There is no pruned variant.")]
    blocks: list[Any] = []
    even = [variant for variant in results.pruned if table.uniform(variant.facts)]
    if even:
        shares = sorted({wording.sparsity(variant.sparsity) for variant in even})
        verb = "prunes" if len(even) == 1 else "prune"
        each = f" ({shares[0]})" if len(shares) == 1 else ""
        blocks.append(
            Paragraph(f"{_list([variant.name for variant in even])} {verb} the same share of every matrix, to one percentage point{each}.")
        )
    for variant in results.pruned:
        if variant not in even:
            shares_of = {name: 1 - matrix["kept"] / matrix["size"] for name, matrix in variant.facts["matrices"].items()}
            least, most = min(shares_of, key=lambda name: shares_of[name]), max(shares_of, key=lambda name: shares_of[name])
            blocks.append(
                Paragraph(
                    f"`{variant.name}` prunes from {wording.sparsity(shares_of[least])} (`{least}`) to {wording.sparsity(shares_of[most])} (`{most}`)"
                    f"{_allocated(variant)}."
                )
            )
    if heatmaps := plots.heatmaps(results):
        blocks.append(Figures(heatmaps))
    else:
        blocks.append(Paragraph("There is no map to draw: it would have one colour."))
    first = results.pruned[0].facts["matrices"]
    names = sorted(first, key=lambda name: (int(first[name]["block"]), name))
    columns = [Column("", "matrix", tuple(names), numeric=False)]
    for variant in results.pruned:
        matrices = variant.facts["matrices"]
        cells = [wording.sparsity(1 - matrices[n]["kept"] / matrices[n]["size"]) if n in matrices else ABSENT for n in names]
        columns.append(Column("", variant.name, tuple(cells)))
    return [*blocks, Details(f"All {len(names)} matrices", [Table(columns)])]


def _allocated(variant: Variant) -> str:
    told = {
        "weight": ": the more sensitive a matrix is estimated to be, the less of it is pruned",
        "layer": ": the more sensitive a block is estimated to be, the less of it is pruned",
        "predicted": ", which the matrices' measured error curves predict to cost the loss least",
    }
    return told.get(variant.facts["settings"]["allocation"]["method"], "")


# Sensitivity


def _sensitivity(results: Results) -> list[Any]:
    measured = next((v for v in results.pruned if any(matrix["sensitivity"] for matrix in v.facts["matrices"].values())), None)
    if measured is None or not results.estimate:
        return [Paragraph("No variant uses sensitivities (`variants.<name>.sensitivity`), so there are none to show.")]
    found = {name: matrix["sensitivity"] for name, matrix in measured.facts["matrices"].items() if matrix["sensitivity"]}
    made = results.estimate
    quantity = {"hutchinson": "Hessian", "fisher": "Fisher information"}[made["estimator"]]
    order = sorted(found, key=lambda name: -found[name]["sensitivity"])
    said = (
        f"Sensitivity is what changing a weight costs: the mean diagonal of the loss's {quantity} over a matrix's weights, measured on the "
        f"original model (`{made['estimator']}`) with {made['probes']} probes of {made['rows_per_probe']} calibration rows each. Ranked by the even and by "
        f"the odd probes alone, the matrices' orders agree to Kendall's τ = {made['agreement']:.2f}"
    )
    said += (
        f" ({made['wanted']:g} was asked for)."
        if made["reached"]
        else f", less than the {made['wanted']:g} asked for: all probes allowed were used."
    )
    said += f" The median standard error is {100 * made['relative_error']:.0f}% of the estimate."
    if floored := sum(one["trace"] < one["stderr"] for one in found.values()):
        said += f" {floored} of {len(found)} estimates are below their standard error and stand there."
    ranked = f"Most sensitive: {_list(order[:3])}; least: {_list(order[-3:])}."
    by_kind = {kind: [one["sensitivity"] for one in found.values() if one["kind"] == kind] for kind in table.kinds(measured.facts)}
    typical = {kind: median(values) for kind, values in by_kind.items() if values}
    ranked += f" By kind, median over blocks: {' > '.join(f'`{kind}`' for kind in sorted(typical, key=lambda kind: -typical[kind]))}."
    return [Paragraph(said), Paragraph(ranked), Figures([plots.sensitivity(measured, quantity)])]


# Induction


def _induction(results: Results) -> list[Any]:
    induced = [variant for variant in results.pruned if variant.facts["transform"].get("induction")]
    if not induced:
        return [Paragraph("No variant has an induce stage, so there are no scores, masks or curves to compare.")]
    blocks: list[Any] = [
        Paragraph(
            "Induction learns, with the mask in the loop, factors that leave the dense model's function as it is and selection weights that bring out "
            "what matters. A gate prunes each block with nothing, with the starting factors, and with what was learned, and keeps what brings the block's "
            "output on held-out rows closest to the dense one: never worse than nothing."
        )
    ]
    for variant in induced:
        facts = variant.facts["transform"]["induction"]
        order = sorted(facts, key=int)
        kept = [facts[block]["choice"] for block in order]
        changed = [facts[block]["mask_changed"] for block in order]
        none, best = (sum(facts[b]["judged"][c] for b, c in zip(order, chosen, strict=True)) for chosen in (["none"] * len(order), kept))
        blocks.append(
            Paragraph(
                f"`{variant.name}`: the gate kept what was learned in {kept.count('learned')} of {len(order)} blocks, the start in {kept.count('start')}, "
                f"nothing in {kept.count('none')}; the mean error of a block's output goes from {100 * none / len(order):.2f}% to "
                f"{100 * best / len(order):.2f}%. Induction changed {100 * sum(changed) / len(changed):.2f}% of the mask entries on average "
                f"({_range(changed)} by block), against the mask that the same score picks without it."
            )
        )
        choices_table = Table(_choices(facts, order))
        blocks.append(choices_table if len(order) <= MOST_ROWS else Details(f"All {len(order)} blocks of {variant.name}", [choices_table]))
        drawn = [plots.scores(variant)] if variant.facts["transform"].get("scores") else []
        if curve := plots.curve(variant):
            drawn.append(curve)
        blocks.append(Figures(drawn))
        if curve is None:
            blocks.append(Paragraph(f"There is no curve for `{variant.name}`: its induction took no steps."))
    return blocks


def _choices(facts: Mapping[str, Any], order: Sequence[str]) -> list[Column]:
    """Per block: the candidates' judged errors with the kept one marked; layer error, mask and stable ranks of nothing and of the kept one."""
    columns = [Column("", "block", tuple(order))]
    for name in ("none", "start", "learned"):
        cells = tuple(f"{100 * facts[block]['judged'][name]:.2f}%" for block in order)
        kept = frozenset(row for row, block in enumerate(order) if facts[block]["choice"] == name)
        columns.append(Column("judged block error, kept marked", name, cells, kept))
    columns.append(Column("", "mask changed", tuple(f"{100 * facts[block]['mask_changed']:.2f}%" for block in order)))
    errors = [(facts[block]["held_out"]["none"], facts[block]["held_out"][facts[block]["choice"]]) for block in order]
    columns.append(Column(MOVED, "layer error", tuple(f"{100 * before:.2f}% → {100 * after:.2f}%" for before, after in errors)))
    for name in ("weights", "features"):
        ranks = [facts[block]["stable_rank"][name] for block in order]
        columns.append(Column(MOVED, f"stable rank, {name}", tuple(f"{rank['before']:.1f} → {rank['after']:.1f}" for rank in ranks)))
    return columns


# Reconstruction

FITS = ("channel", "block")  # steps that fit a whole block


def _reconstruction(results: Results) -> list[Any]:
    if not results.pruned:
        return [Paragraph("There is no pruned variant.")]
    blocks: list[Any] = [
        Paragraph(
            "Layer error says how far the outputs of single matrices are off after pruning, on inputs from the pruned blocks before; variants differ in it "
            "by their masks, by the OBS sweep and by least squares. A fit of the whole block then moves it towards the dense model's hidden states."
        )
    ]
    drawn = [figure for figure in (plots.layer_error(results),) if figure]
    fits = [(variant, step, found) for variant in results.pruned for step in FITS if (found := fitted(variant, step))]
    for variant, step, found in fits:
        held, seen = ([_mean(found, f"{side}_{when}") for when in ("before", "after")] for side in ("held_out", "fit"))
        blocks.append(
            Paragraph(
                f"`{variant.name}`: step `{step}` takes the mean error of a block on held-out rows from {held[0]:.2f}% to {held[1]:.2f}%, on rows it "
                f"was fitted to from {seen[0]:.2f}% to {seen[1]:.2f}% (squared distance to the dense model's output, against its variance); "
                f"it was kept in {_kept(found)} of {len(found)} blocks."
            )
        )
        drawn.append(plots.reconstruction(variant.name, step, found))
    if not fits:
        blocks.append(Paragraph("No variant has the step `channel` or `block` in `reconstruction.steps`, so there is no fit to show."))
    return [*blocks, Figures(drawn)]


def fitted(variant: Variant, step: str) -> dict[int, Mapping[str, float]]:
    """Block -> its errors before and after a step; blocks without it are left out."""
    return {
        int(block): facts[step] for block, facts in sorted(variant.facts["blocks"].items(), key=lambda item: int(item[0])) if step in facts
    }


def _mean(found: Mapping[int, Mapping[str, float]], key: str) -> float:
    """In percent."""
    return 100 * sum(facts[key] for facts in found.values()) / len(found)


def _kept(found: Mapping[int, Mapping[str, float]]) -> int:
    """Blocks whose fit was kept: in the others the unfitted block was no worse on the held-out rows."""
    return sum(facts["epochs"] > 0 for facts in found.values())


# Samples


def _samples(results: Results) -> list[Any]:
    if not results.dense.completions:
        return [Paragraph("None were asked for (`evaluate.completions.count` is 0).")]
    samples = []
    for number, dense in enumerate(results.dense.completions):
        written = {
            variant.name: variant.completions[number].completion for variant in results.variants if number < len(variant.completions)
        }
        samples.append(Sample(number + 1, dense.prompt, [_continuation(name, text, dense.completion) for name, text in written.items()]))
    said = (
        "Greedy continuations of the text's first rows, the dense model's beside the pruned ones; what equals the dense model's beginning is pale. A "
        "continuation ends where the model ends the text, if that comes before `evaluate.completions.new_tokens`."
    )
    return [Paragraph(said), *samples]


def _continuation(name: str, text: str, dense: str) -> Continuation:
    if name == DENSE:
        return Continuation(name, "", text)
    same = next((at for at, (a, b) in enumerate(zip(text, dense, strict=False)) if a != b), min(len(text), len(dense)))
    return Continuation(name, text[:same], text[same:])


# Provenance


def _provenance(results: Results) -> list[Any]:
    model = results.model
    facts = {
        "path": model["path"],
        "hub id": model.get("id") or ABSENT,
        "revision": model.get("revision") or ABSENT,
        "family": model["family"],
        "dtype": model["dtype"],
        "parameters": f"{model['parameters']:,}",
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(model["versions"].items())),
    }
    if results.pruned:
        facts["prunable"] = f"{results.pruned[0].facts['prunable']:,}"
        facts |= {f"kept by {variant.name}": f"{variant.facts['kept']:,}" for variant in results.pruned}
    hashes = dict(sorted(model["sha256"].items()))
    return [
        Paragraph(
            "Every figure above follows from the model, the texts, the parameters and the versions below: equal ones give equal "
            "artifacts on the same kind of machine. `dvc.lock` has the hashes of all that lies between."
        ),
        Table([Column("", "model", tuple(facts), numeric=False), Column("", "", tuple(facts.values()), numeric=False)]),
        Table(_texts(results)),
        Details("SHA-256 of the model's files", [_hashes(hashes)]),
        Details("SHA-256 of the texts: rows, and what they were cut from", [_hashes(_digests(results))]),
        Details("All parameters", [Code(results.params.strip())]),
        *(Details(f"Settings of {variant.name}", [Code(_settings(variant))]) for variant in results.pruned),
    ]


def _texts(results: Results) -> list[Column]:
    found = results.sources
    columns = [Column("", "text", tuple(text.name for text in found), numeric=False)]
    columns.append(
        Column("", "for", tuple({"calibrate": "calibration", "evaluate": "evaluation"}[text.use] for text in found), numeric=False)
    )
    columns.append(Column("", "kind", tuple(text.facts["kind"] for text in found), numeric=False))
    for head, key in (("rows", "rows"), ("tokens per row", "length"), ("documents", "documents"), ("their tokens", "tokens")):
        columns.append(Column("", head, tuple(f"{text.facts[key]:,}" for text in found)))
    begins = {"document": "each document", "row": "each row", "none": "none"}
    columns.append(Column("", "start token", tuple(begins[text.facts["start"]] for text in found), numeric=False))
    seeds = (text.facts["seed"] for text in found)
    return [*columns, Column("", "seed of the rows", tuple("none: in order" if seed is None else str(seed) for seed in seeds))]


def _digests(results: Results) -> dict[str, str]:
    """Name -> SHA-256, of every text's rows and of what was read for it (a hub's dataset: of its documents)."""
    digests = {}
    for text in results.sources:
        digests[f"{text.name}, rows"] = text.sha256
        digests |= {f"{text.name}, {name}": digest for name, digest in sorted(text.facts.get("sha256", {}).items())}
        if "fingerprint" in text.facts:
            digests[f"{text.name}, {text.facts['dataset']['id']}"] = text.facts["fingerprint"]
    return digests


def _hashes(digests: Mapping[str, str]) -> Code:
    return Code("\n".join(f"{digest}  {name}" for name, digest in digests.items()))


def _settings(variant: Variant) -> str:
    return json.dumps(variant.facts["settings"], indent=2, ensure_ascii=False)
