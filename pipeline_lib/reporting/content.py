"""What the report says, section by section."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, get_args

from pipeline_lib.core.workspace import DENSE
from pipeline_lib.export import wording
from pipeline_lib.recipe import words as recipes
from pipeline_lib.recipe.settings import Format
from pipeline_lib.reporting import costs, plots, table
from pipeline_lib.reporting.table import ABSENT, PERPLEXITY, Column, Facts, Results, words

MOST_ROWS = 12  # a longer table per block is closed until asked for


@dataclass(frozen=True)
class Block:
    """More than a paragraph: the template says how each kind of content is shown."""

    # table (columns), figures, sample, code (text), or script (a file beside the page that
    # completes it, if there is one)
    kind: str
    content: Any
    summary: str = ""  # where there is one, the block is closed behind it until asked for


Blocks = list[str | Block]  # a string is a paragraph: plain text with `code` marks


def lead(results: Results) -> str:
    """The page's first sentences: what was pruned, and what came of it on the main text."""
    model, text = results.model, results.main_text
    count = {0: "no pruned variant", 1: "one pruned variant"}.get(
        len(results.pruned), f"{len(results.pruned)} pruned variants"
    )
    said = (
        f"{model['family']} model `{model.get('id') or model['path']}`, {model['parameters']:,} parameters"
        f" ({model['dtype']}); {count}."
    )
    if text is None or not results.pruned:
        return said
    best = min(results.pruned, key=lambda variant: variant.perplexity[text])
    gap = table.gap_closed(results, best, text)
    closes = (
        ""
        if gap is None
        else f"; it closes {100 * gap:.1f}% of the gap that `{results.settings.baseline}` leaves"
    )
    own, dense = (wording.perplexity(one.perplexity[text]) for one in (best, results.dense))
    pruned = wording.sparsity(best.sparsity)
    return (
        f"{said} On `{text}`, `{best.name}` has the lowest perplexity: {own} with {pruned} of the prunable"
        f" weights pruned, against {dense} dense{closes}."
    )


def _listed(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _drawn(*figures: plots.Figure | None) -> Blocks:
    """The figures that there are, as a block; no block without."""
    found = [figure for figure in figures if figure]
    return [Block("figures", found)] if found else []


# Comparison

PROTOCOL = (
    "Perplexity is exp of the mean negative log-likelihood per token, over rows without overlap or shared"
    " context (how many and how long: see Provenance); a row's first token is not predicted. Recipes are"
    " chosen on the text `choose.text`; `test` is only reported."
)


def _comparison(results: Results) -> Blocks:
    blocks: Blocks = [Block("table", table.comparison(results))]
    if results.pruned:
        blocks.append(
            "Marked is the best figure among the pruned variants, as printed; accuracies that differ by less"
            " than their errors are level. Pruned weights have a zero in the mask. Zeros are counted in the"
            " checkpoint, where quantisation makes more of them."
        )
    if trained := [f"`{variant.name}`" for variant in results.pruned if variant.training.get("kept")]:
        blocks.append(
            f"Trained as a whole after pruning, so not one-shot: {', '.join(trained)}. All others are."
        )
    blocks += [*table.notes(results), PROTOCOL]
    if base := results.baseline:
        ratio = f"(ln ppl of `{base.name}` − ln ppl) / (ln ppl of `{base.name}` − ln ppl dense)"
        blocks.append(f"Gap closed = {ratio}: 0% is the baseline, 100% the dense model.")
    chosen, values = (
        results.choice["chosen"],
        {name: wording.perplexity(value) for name, value in results.choice["perplexity"].items()},
    )
    if chosen is not None:
        others = (
            ", ".join(f"`{name}` {value}" for name, value in values.items() if name != chosen)
            or "no other candidate"
        )
        blocks.append(
            f"The gate (`choose`) names `{chosen}`: perplexity {values[chosen]} on"
            f" `{results.choice['text']}`, against {others}."
        )
    blocks += [_tasks(results), *_drawn(plots.perplexity(results))]
    if results.pruned:
        blocks += [
            f"How far each variant is from the dense model. {wording.DIVERGES}",
            Block("table", table.divergence(results)),
        ]
        blocks += _verdicts(results)
        listed = [
            {"variant": variant.name}
            | recipes.rows(variant.recipe)
            | {"trained afterwards": recipes.training(variant.training)}
            for variant in results.pruned
            if variant.recipe
        ]
        blocks.append("What each variant is made of; the full settings are under Provenance.")
        blocks.append(
            Block("table", [words(head, [recipe[head] for recipe in listed]) for head in listed[0]])
        )
    return blocks


def _verdicts(results: Results) -> Blocks:
    found = table.verdicts(results)
    if not any(verdict.findings for verdict in found.values()):
        return []
    return [
        (
            "The thresholds of the section `verdict` judge each variant on every evaluation text, and on"
            " every task that it was measured on. Where one is exceeded, the table says which; else it lists"
            " all that was compared. An accuracy's drop is in units of its standard error."
        ),
        Block(
            "table",
            [
                words("variant", list(found)),
                words("verdict", [verdict.word for verdict in found.values()]),
                words("because", [verdict.reasons for verdict in found.values()]),
            ],
        ),
    ]


def _tasks(results: Results) -> str:
    if not results.tasks:
        return "No tasks were run: no variant names a preset in its key `tasks`."
    said = []
    for name, (task, *_) in results.tasks.items():
        guess = "an unknown share" if task["chance"] is None else f"{100 * task['chance']:.0f}%"
        said.append(
            f"`{name}`: {'all' if task['items'] == task['of'] else task['items']} of {task['of']} items,"
            f" guessing gives {guess}"
        )
    return f"Figures of tasks stand with their standard error, where there is one. {'; '.join(said)}."


# Costs


def _costs(_results: Results) -> Blocks:
    """Nothing that was measured: equal runs must write equal reports. ``measured_costs`` completes
    the section.
    """
    said = (
        "Costs differ from run to run, so the cached report holds none. `make run` and `sparseline run` write"
        " those of this machine to `costs.js`"
    )
    return [f"{said} beside this page, which then shows them here.", Block("script", "costs.js")]


def measured_costs(results: Results, measured: costs.Costs) -> Blocks:
    """What completes the section Costs on the machine where the stages ran."""
    names = words("variant", [variant.name for variant in results.variants])
    columns = costs.by_variant(results, measured)
    gpu = ", and of tensors on its GPU" if any(column.head == "peak GPU GB" for column in columns) else ""
    said = (
        "Wall time of all stages that a variant needs for itself, and the largest resident memory of"
        f" any{gpu}. A dash: the cache had a stage's result."
    )
    return [Block("table", [names, *columns]), said]


# Sizes


def _sizes(results: Results) -> Blocks:
    if not any(variant.sizes for variant in results.pruned):
        return ["No variant is exported, so there are no files to weigh."]
    said = (
        "Pruned matrices: all that a format stores for them, masks and scales included. All weights: the"
        " whole safetensors files, with embeddings and head. Theory is H(p) + (1 − p)·b bits per weight, p"
        " the share of zeros in a parameter (the dense row: none), b the bits of a stored weight: no lossless"
        " code of independent zeros is shorter; scales come on top. Perplexity is the same in every format."
        " `dense` stores zeros like any weight."
    )
    written = {name for variant in results.pruned if variant.sizes for name in variant.sizes["formats"]}
    for name in ("compressed-tensors", "gguf"):
        if name in written:
            said += f" So does `{name}`: it is no smaller than the same quantisation without pruning."
    if left := [variant.name for variant in results.pruned if not variant.sizes]:
        said += f" Not exported, so not weighed: {_listed(left)}."
    return [Block("table", sizes(results)), said]


def sizes(results: Results) -> list[Column]:
    """A row for the dense model, then one per variant and format."""
    rows = [
        (variant, name, found)
        for variant in results.variants
        if variant.sizes
        for name in get_args(Format)
        if (found := variant.sizes["formats"].get(name))
    ]
    source, text = results.dense.sizes["formats"]["dense"], results.main_text
    columns = [
        words("variant", [variant.name for variant, _, _ in rows]),
        words("format", [name for _, name, _ in rows]),
    ]
    for group, key in (("pruned matrices", "matrix_bytes"), ("all weights", "file_bytes")):
        columns.append(Column(group, "bytes", tuple(wording.size(found[key]) for _, _, found in rows)))
        columns.append(
            Column(group, "of dense", tuple(f"{found[key] / source[key]:.3f}" for _, _, found in rows))
        )
    columns.append(Column("bits per weight", "stored", tuple(f"{found['bits']:.3f}" for _, _, found in rows)))
    columns.append(
        Column(
            "bits per weight",
            "theory",
            tuple(f"{variant.sizes['theoretical_bits']:.3f}" for variant, _, _ in rows),
        )
    )
    if text is not None:
        columns.append(
            Column(
                PERPLEXITY + text,
                "ppl",
                tuple(wording.perplexity(variant.perplexity[text]) for variant, _, _ in rows),
            )
        )
    return columns


# Sparsity per matrix


def _sparsity(results: Results) -> Blocks:
    if not results.pruned:
        return ["There is no pruned variant."]
    blocks: Blocks = []
    shares = {
        v.name: {name: table.pruned_share(one) for name, one in v.facts["matrices"].items()}
        for v in results.pruned
    }
    even = [variant.name for variant in results.pruned if table.uniform(variant.facts)]
    for name, own in shares.items():
        if name not in even:
            least, most = (
                f"{wording.sparsity(own[matrix])} (`{matrix}`)"
                for matrix in (min(own, key=own.__getitem__), max(own, key=own.__getitem__))
            )
            blocks.append(f"`{name}` prunes from {least} to {most}.")
    if even:
        blocks.append(f"The same share of every matrix, to one percentage point: {_listed(even)}.")
    blocks += _drawn(*plots.heatmaps(results))
    first = results.pruned[0].facts["matrices"]
    names = sorted(first, key=lambda name: (int(first[name]["block"]), name))
    cells = {
        variant: table.shown([own.get(name) for name in names], wording.sparsity)
        for variant, own in shares.items()
    }
    columns = [words("matrix", names), *(Column("", variant, tuple(own)) for variant, own in cells.items())]
    return [*blocks, Block("table", columns, f"All {len(names)} matrices")]


# Sensitivity


def _sensitivity(results: Results) -> Blocks:
    measured = next((variant for variant in results.pruned if table.sensitivities(variant.facts)), None)
    if measured is None or not results.estimate:
        return ["No variant uses sensitivities, so there are none to show."]
    made, found = results.estimate, table.sensitivities(measured.facts)
    order = sorted(found, key=lambda name: -found[name]["sensitivity"])
    quantity = {"hutchinson": "Hessian", "fisher": "Fisher information"}[made["estimator"]]
    asked = "was asked for" if made["reached"] else "was asked for, but all probes allowed were used"
    floored = sum(one["trace"] < one["stderr"] for one in found.values())
    said = (
        f"Sensitivity is what changing a weight costs: the mean diagonal of the loss's {quantity} over a"
        f" matrix's weights, measured on the original model (`{made['estimator']}`) with"
        f" {made['probes']} probes of {made['rows_per_probe']} calibration rows each. Ranked by the even and"
        " by the odd probes alone, the matrices' orders agree to Kendall's τ ="
        f" {made['agreement']:.2f} ({made['wanted']:g} {asked}). The median standard error is"
        f" {100 * made['relative_error']:.0f}% of the estimate; {floored} of {len(found)} estimates are below"
        f" theirs, and stand there. Most sensitive: {_listed(order[:3])}; least: {_listed(order[-3:])}."
    )
    return [said, *_drawn(plots.sensitivity(measured, quantity))]


# What gates and fits did, block by block


def _induction(results: Results) -> Blocks:
    induced = {variant.name: found for variant in results.pruned if (found := table.induction(variant.facts))}
    if not induced:
        return ["No variant learns factors, so there are no gates to compare."]
    blocks: Blocks = [
        "Induction learns, with the mask in the loop, factors that leave the dense model's function as it is"
        " and selection weights that bring out what matters. A gate prunes each block with nothing, with the"
        " starting factors, and with what was learned, and keeps what brings the block's output on held-out"
        " rows closest to the dense one: never worse than nothing."
    ]
    for name, facts in induced.items():
        kept, changed = ([one[key] for one in facts.values()] for key in ("choice", "mask_changed"))
        before, after = (
            mean(one["judged"][choice or one["choice"]] for one in facts.values())
            for choice in ("none", None)
        )
        blocks.append(
            f"`{name}`: the gate kept what was learned in {kept.count('learned')} of {len(facts)} blocks, the"
            f" start in {kept.count('start')}, nothing in {kept.count('none')}; the mean error of a block's"
            f" output goes from {_percent(before)} to {_percent(after)}. Induction changed"
            f" {_percent(mean(changed))} of the mask entries on average ({_percent(min(changed))} to"
            f" {_percent(max(changed))} by block), against the mask that the same score picks without it."
        )
        columns = []
        for candidate in ("none", "start", "learned"):
            best = frozenset(row for row, one in enumerate(kept) if one == candidate)
            cells = tuple(_percent(one["judged"][candidate]) for one in facts.values())
            columns.append(Column("judged block error, kept marked", candidate, cells, best))
        columns.append(Column("", "mask changed", tuple(map(_percent, changed))))
        errors = ((one["held_out"]["none"], one["held_out"][one["choice"]]) for one in facts.values())
        columns.append(Column("nothing → kept", "layer error", tuple(_change(*error) for error in errors)))
        blocks.append(_block_table(name, facts, columns))
    return blocks


def _reconstruction(results: Results) -> Blocks:
    if not results.pruned:
        return ["There is no pruned variant."]
    blocks: Blocks = [
        (
            "Layer error says how far the outputs of single matrices are off after pruning, on inputs from"
            " the pruned blocks before; variants differ in it by their masks, by the OBS sweep and by least"
            " squares. A fit of the whole block then moves it towards the dense model's hidden states."
        ),
        *_drawn(plots.layer_error(results)),
    ]
    fitted = [
        (variant.name, step, found)
        for variant in results.pruned
        for step, found in table.fits(variant.facts).items()
    ]
    for name, step, found in fitted:
        kept = [one["epochs"] > 0 for one in found.values()]  # else the unfitted block was no worse
        columns, said = [], []
        for side, rows in (("held_out", "held-out rows"), ("fit", "rows it was fitted to")):
            pairs = [(one[f"{side}_before"], one[f"{side}_after"]) for one in found.values()]
            best = frozenset(row for row, one in enumerate(kept) if one and side == "held_out")
            columns.append(
                Column("block error, kept marked", rows, tuple(_change(*pair) for pair in pairs), best)
            )
            said.append(
                f"on {rows} from {_percent(mean(before for before, _ in pairs))} to"
                f" {_percent(mean(after for _, after in pairs))}"
            )
        blocks.append(
            f"`{name}`: step `{step}` takes the mean error of a block {', '.join(said)} (squared distance to"
            f" the dense model's output, against its variance); it was kept in {sum(kept)} of"
            f" {len(found)} blocks."
        )
        blocks.append(
            _block_table(
                name,
                found,
                [*columns, Column("", "epochs", tuple(str(one["epochs"]) for one in found.values()))],
            )
        )
    return (
        blocks
        if fitted
        else [*blocks, "No variant fits whole blocks by gradients, so there is no fit to show."]
    )


def _distillation(results: Results) -> Blocks:
    trained = {variant.name: variant.training for variant in results.pruned if variant.training}
    if not trained:
        return ["No variant is trained as a whole: all are one-shot."]
    blocks: Blocks = [
        "After pruning, the whole model is trained on calibration rows towards the dense model's distribution"
        " of the next token; zeros stay zeros. The measure is the mean KL divergence from the dense model in"
        " nats per token, on held-out rows where there are any."
    ]
    for name, facts in trained.items():
        before, after = facts["held_out_before"], facts["held_out_after"]
        became = "no number, since training diverged" if after is None else f"{after:.4f}"
        kept = (
            "it was kept"
            if facts["kept"]
            else "it was not kept, so every figure of this variant is that of the pruned checkpoint"
        )
        blocks.append(
            f"`{name}`: {facts['steps']} steps over {facts['rows']} rows took it from {before:.4f} to"
            f" {became}; {kept}."
        )
    return blocks


def _change(before: float, after: float) -> str:
    return f"{_percent(before)} → {_percent(after)}"


def _block_table(name: str, facts: Facts, columns: Sequence[Column]) -> Block:
    summary = f"All {len(facts)} blocks of {name}" if len(facts) > MOST_ROWS else ""
    return Block("table", [Column("", "block", tuple(facts)), *columns], summary)


# Samples


def _samples(results: Results) -> Blocks:
    if not results.dense.completions:
        return ["None were asked for (`evaluate.completions.count` is 0)."]
    blocks: Blocks = [
        "Greedy continuations of the text's first rows; what equals the dense model's beginning is pale. A"
        " continuation ends where the model ends the text, if that comes before"
        " `evaluate.completions.new_tokens`."
    ]
    for number, dense in enumerate(results.dense.completions):
        written = {variant.name: variant.completions[number]["completion"] for variant in results.variants}
        split = [
            (name, *_split(text, "" if name == DENSE else dense["completion"]))
            for name, text in written.items()
        ]
        blocks.append(
            Block("sample", {"number": number + 1, "prompt": dense["prompt"], "continuations": split})
        )
    return blocks


def _split(text: str, dense: str) -> tuple[str, str]:
    """``text`` before and after it leaves ``dense``."""
    same = next(
        (at for at, (a, b) in enumerate(zip(text, dense, strict=False)) if a != b), min(len(text), len(dense))
    )
    return text[:same], text[same:]


# Provenance

# of a text: its rows, the files or the hub's dataset that they were cut from
HASHES = ("rows_sha256", "sha256", "dataset", "fingerprint")


def _provenance(results: Results) -> Blocks:
    model, counts = results.model, {"parameters": results.model["parameters"]}
    for variant in results.pruned:
        counts |= {"prunable": variant.facts["prunable"], f"kept by {variant.name}": variant.facts["kept"]}
    facts = {key: model.get(key) or ABSENT for key in ("path", "id", "revision", "family", "dtype")}
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in sorted(model["versions"].items()))
    facts |= {key: f"{count:,}" for key, count in counts.items()}
    hashes = {
        source["name"]: {key: source[key] for key in source if key in HASHES} for source in results.sources
    }
    return [
        (
            "Every figure above follows from the model, the texts, the parameters and the versions below:"
            " equal ones give equal artifacts on the same kind of machine. `dvc.lock` has the hashes of all"
            " that lies between."
        ),
        Block("table", [words("model", list(facts)), words("", list(facts.values()))]),
        Block("table", _texts(results.sources)),
        Block("code", _json(model["sha256"]), "SHA-256 of the model's files"),
        Block("code", _json(hashes), "SHA-256 of the texts: rows, and what they were cut from"),
        Block("code", results.params.strip(), "All parameters"),
        *(
            Block("code", _json(variant.facts["settings"]), f"Settings of {variant.name}")
            for variant in results.pruned
        ),
        *(
            Block(
                "code", _json(variant.training["settings"]), f"Settings of the distillation of {variant.name}"
            )
            for variant in results.pruned
            if variant.training
        ),
    ]


def _texts(sources: Sequence[Facts]) -> list[Column]:
    facts = {"text": "name", "use": "use", "kind": "kind", "start token of each": "start"}
    counts = {"rows": "rows", "tokens per row": "length", "documents": "documents", "their tokens": "tokens"}
    columns = [words(head, [source[key] for source in sources]) for head, key in facts.items()]
    columns += [
        Column("", head, tuple(f"{source[key]:,}" for source in sources)) for head, key in counts.items()
    ]
    seeds = tuple("none: in order" if source["seed"] is None else str(source["seed"]) for source in sources)
    return [*columns, Column("", "seed of the rows", seeds)]


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


# Model

# a Gram matrix of d channels is drawn half way to all experts' by fewer than d / RARE tokens, see
# ``stats.moments.prior``
RARE = 4


def _model(results: Results) -> Blocks:
    """What factors fold into, block by block, and how many tokens each expert saw."""
    found = results.model["architecture"]
    kinds, numbers = found["kinds"], found["kind_of_block"]
    folded = [
        [one["name"] for one in kind["couplings"] if not one["name"].startswith("expert_")] for kind in kinds
    ]
    fixed = [
        [site["name"] for site in kind["sites"] if "coupling" not in site or site["coupling"] is None]
        for kind in kinds
    ]
    experts = [
        len({site["name"] for site in kind["sites"] if site.get("pool", "").endswith("input")})
        for kind in kinds
    ]
    columns = [
        words(
            "blocks",
            [
                _ranges([block for block, own in enumerate(numbers) if own == number])
                for number in range(len(kinds))
            ],
        ),
        Column("", "matrices", tuple(str(len(kind["matrices"])) for kind in kinds)),
        words("factors fold into", [", ".join(names) or ABSENT for names in folded]),
        words(
            "inputs that cannot be scaled",
            [
                ", ".join(name for name in names if not name.startswith("expert_")) or ABSENT
                for names in fixed
            ],
        ),
    ]
    if any(experts):
        columns.append(Column("", "experts", tuple(str(count or ABSENT) for count in experts)))
        columns.append(words("never pruned", [", ".join(kind["routers"]) or ABSENT for kind in kinds]))
    return [
        (
            "Discovered from the model, and tried on its own weights before use: random powers of two on each"
            " coupling leave what a block computes as it is."
        ),
        Block("table", columns),
        *_experts(results),
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as 1–3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _experts(results: Results) -> Blocks:
    """The tokens that came to each expert while the first variant that reads any was pruned."""
    for variant in results.pruned:
        seen: dict[int, dict[str, int]] = {}
        for one in variant.facts["matrices"].values():
            if one.get("site", "").endswith("_input"):
                seen.setdefault(one["block"], {})[one["site"].removesuffix("_input")] = one["tokens"]
        if not seen:
            continue
        rare = results.model["architecture"]["width"] / RARE
        rows = {block: sorted(tokens.values()) for block, tokens in sorted(seen.items())}
        none = {block: [name for name, count in seen[block].items() if not count] for block in rows}
        columns = [
            Column("", "block", tuple(map(str, rows))),
            Column("", "experts", tuple(str(len(counts)) for counts in rows.values())),
            Column("tokens of an expert", "minimum", tuple(f"{counts[0]:,}" for counts in rows.values())),
            Column(
                "tokens of an expert",
                "median",
                tuple(f"{counts[len(counts) // 2]:,}" for counts in rows.values()),
            ),
            Column(
                "tokens of an expert",
                f"below {rare:.0f}",
                tuple(_percent(mean(count < rare for count in counts)) for counts in rows.values()),
            ),
            words("without any", [", ".join(names) or ABSENT for names in none.values()]),
        ]
        said = (
            f"Tokens that the router sent to each expert while `{variant.name}` was pruned. Statistics of n"
            " tokens are drawn to those of all experts of the layer by n / (n + d/4), d the channels; an"
            " expert without any uses those."
        )
        return [
            said,
            Block("table", columns, f"All {len(rows)} blocks with experts" if len(rows) > MOST_ROWS else ""),
        ]
    return []


SECTIONS = {
    "Comparison": _comparison,
    "Costs": _costs,
    "Sizes": _sizes,
    "Model": _model,
    "Share pruned per matrix": _sparsity,
    "Sensitivity": _sensitivity,
    "Induction": _induction,
    "Reconstruction": _reconstruction,
    "Distillation": _distillation,
    "Sample completions": _samples,
    "Provenance": _provenance,
}  # in reading order
