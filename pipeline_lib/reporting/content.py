"""The text of the report, section by section."""

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

MOST_ROWS = 12  # a longer table per block is collapsed


@dataclass(frozen=True)
class Block:
    """Content other than a paragraph; the template has the markup of each kind."""

    # table (columns), figures, sample, code (text), or script (an optional file beside the page)
    kind: str
    content: Any
    summary: str = ""  # if not empty, the block is collapsed behind this line


Blocks = list[str | Block]  # a string is a paragraph: plain text with `code` marks


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _drawn(*figures: plots.Figure | None) -> Blocks:
    """A block of the figures that are not None; empty if there are none."""
    found = [figure for figure in figures if figure]
    return [Block("figures", found)] if found else []


# Comparison

PROTOCOL = (
    "Perplexity is exp of the mean negative log-likelihood per token. The samples do not overlap and share no"
    " context; the first token of a sample is not predicted. Provenance has their number and length. Variants"
    " are chosen on the text `choose.text`; `test` is only reported."
)


def _comparison(results: Results) -> Blocks:
    blocks: Blocks = [Block("table", table.comparison(results))]
    if results.pruned:
        blocks.append(
            "The best value among the pruned variants is marked. Accuracies that differ by less than their"
            " standard errors are ties. `pruned` is the share of weights that the masks remove. `zeros` is"
            " counted in the checkpoint; quantisation adds zeros."
        )
    if trained := [f"`{variant.name}`" for variant in results.pruned if variant.training.get("kept")]:
        blocks.append(
            f"Not one-shot, because the whole model was trained after pruning: {', '.join(trained)}."
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
        others = ", ".join(f"`{name}` {value}" for name, value in values.items() if name != chosen) or "none"
        blocks.append(
            f"The stage `choose` selects `{chosen}`: its perplexity on `{results.choice['text']}` is"
            f" {values[chosen]}. The other candidates: {others}."
        )
    blocks += [_tasks(results), *_drawn(plots.perplexity(results))]
    if results.pruned:
        blocks += [
            f"Divergence from the dense model. {wording.DIVERGES}",
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
        blocks.append("How each variant is made. Provenance has the complete settings.")
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
            "The verdict compares each variant with the thresholds of the section `verdict`, on every"
            " evaluation text and every measured task. The table lists the thresholds that are exceeded; if"
            " none is, it lists all comparisons. The unit of an accuracy drop is its standard error."
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
        return "No tasks were run, because no variant has a preset in its key `tasks`."
    said = []
    for name, (task, *_) in results.tasks.items():
        chance = "unknown" if task["chance"] is None else f"{100 * task['chance']:.0f}%"
        said.append(
            f"`{name}`: {'all' if task['items'] == task['of'] else task['items']} of {task['of']} items,"
            f" accuracy by chance {chance}"
        )
    return f"Results of tasks: value ± standard error. {'; '.join(said)}."


# Costs


def _costs(_results: Results) -> Blocks:
    """No measured cost: equal runs must write equal reports. ``measured_costs`` completes the section."""
    said = (
        "Costs differ from run to run, so the cached report does not contain them. `make run` and `sparseline"
        " run` write the costs on this machine to `costs.js` beside this page, which then shows them here."
    )
    return [said, Block("script", "costs.js")]


def measured_costs(results: Results, measured: costs.Costs) -> Blocks:
    """The section Costs on the machine where the stages ran."""
    names = words("variant", [variant.name for variant in results.variants])
    columns = costs.by_variant(results, measured)
    gpu = any(column.head == "peak GPU GB" for column in columns)
    said = (
        "`seconds` is the wall time of all stages that the variant needs; `peak GB` is the largest resident"
        " memory of any of them"
        + (", and `peak GPU GB` the largest memory of tensors on the GPU" if gpu else "")
        + ". A dash means that a stage's result came from the cache."
    )
    return [Block("table", [names, *columns]), said]


# Sizes


def _sizes(results: Results) -> Blocks:
    if not any(variant.sizes for variant in results.pruned):
        return ["No variant is exported, so no file sizes are known."]
    said = (
        "`pruned matrices` counts everything that a format stores for them, including masks and scales."
        " `all weights` is the size of the files, including embeddings and head. `theory` is H(p) + (1 − p)·b"
        " bits per weight, where p is the share of zeros in a parameter (0 in the dense row) and b the bits"
        " of a stored weight. No lossless code for independently placed zeros is shorter; scales are extra."
        " Perplexity is the same in every format. `dense` stores zeros like other weights."
    )
    written = {name for variant in results.pruned if variant.sizes for name in variant.sizes["formats"]}
    for name in ("compressed-tensors", "gguf"):
        if name in written:
            said += f" So does `{name}`: it is no smaller than the same quantisation without pruning."
    if left := [variant.name for variant in results.pruned if not variant.sizes]:
        said += f" Not exported: {table.quoted(left)}."
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
        blocks.append(f"Every matrix has the same sparsity, to one percentage point: {table.quoted(even)}.")
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
        return ["No variant uses sensitivities."]
    made, found = results.estimate, table.sensitivities(measured.facts)
    order = sorted(found, key=lambda name: -found[name]["sensitivity"])
    quantity = {"hutchinson": "Hessian", "fisher": "Fisher information"}[made["estimator"]]
    asked = "requested" if made["reached"] else "requested, but the maximal number of probes was reached"
    floored = sum(one["trace"] < one["stderr"] for one in found.values())
    said = (
        f"Sensitivity is what changing a weight costs: the mean diagonal of the loss's {quantity} over a"
        f" matrix's weights. It was measured on the original model (`{made['estimator']}`) with"
        f" {made['probes']} probes of {made['rows_per_probe']} calibration samples each. The rankings by the"
        f" even and by the odd probes agree to Kendall's τ = {made['agreement']:.2f} ({made['wanted']:g}"
        f" {asked}). The median standard error is {100 * made['relative_error']:.0f}% of the estimate."
        f" {floored} of {len(found)} estimates are below their standard error and are replaced by it. Most"
        f" sensitive: {table.quoted(order[:3])}; least: {table.quoted(order[-3:])}."
    )
    return [said, *_drawn(plots.sensitivity(measured, quantity))]


# Gates and fits, block by block


def _induction(results: Results) -> Blocks:
    induced = {variant.name: found for variant in results.pruned if (found := table.induction(variant.facts))}
    if not induced:
        return ["No variant learns factors."]
    blocks: Blocks = [
        "Induction learns scaling factors, which do not change the dense model's function, and selection"
        " weights, which change the scores. A gate then prunes each block three times: without factors"
        " (`none`), with the initial factors (`start`), and with the learned ones (`learned`). It keeps the"
        " candidate whose output on the held-out split is closest to the dense model's."
    ]
    for name, facts in induced.items():
        kept, changed = ([one[key] for one in facts.values()] for key in ("choice", "mask_changed"))
        before, after = (
            mean(one["judged"][choice or one["choice"]] for one in facts.values())
            for choice in ("none", None)
        )
        blocks.append(
            f"`{name}`: of {len(facts)} blocks, the gate kept `learned` in {kept.count('learned')}, `start`"
            f" in {kept.count('start')} and `none` in {kept.count('none')}. The mean error of a block's"
            f" output falls from {_percent(before)} to {_percent(after)}. Induction changed"
            f" {_percent(mean(changed))} of the mask entries on average ({_percent(min(changed))} to"
            f" {_percent(max(changed))} per block)."
        )
        columns = []
        for candidate in ("none", "start", "learned"):
            best = frozenset(row for row, one in enumerate(kept) if one == candidate)
            cells = tuple(_percent(one["judged"][candidate]) for one in facts.values())
            columns.append(Column("block error, kept one marked", candidate, cells, best))
        columns.append(Column("", "mask changed", tuple(map(_percent, changed))))
        errors = ((one["held_out"]["none"], one["held_out"][one["choice"]]) for one in facts.values())
        columns.append(Column("none → kept", "layer error", tuple(_change(*error) for error in errors)))
        blocks.append(_block_table(name, facts, columns))
    return blocks


def _reconstruction(results: Results) -> Blocks:
    if not results.pruned:
        return ["There is no pruned variant."]
    blocks: Blocks = [
        (
            "Layer error is the relative error of a single matrix's outputs after pruning, on the inputs that"
            " the pruned blocks before it give. It depends on the mask, the OBS sweep and least squares."
            " Fine-tuning then trains the whole block towards the dense model's hidden states."
        ),
        *_drawn(plots.layer_error(results)),
    ]
    fitted = [
        (variant.name, step, found)
        for variant in results.pruned
        for step, found in table.fits(variant.facts).items()
    ]
    for name, step, found in fitted:
        kept = [
            one["epochs"] > 0 for one in found.values()
        ]  # otherwise the block before the fit was at least as good
        columns, said = [], []
        for side, rows in (("held_out", "held-out split"), ("fit", "training split")):
            pairs = [(one[f"{side}_before"], one[f"{side}_after"]) for one in found.values()]
            best = frozenset(row for row, one in enumerate(kept) if one and side == "held_out")
            columns.append(
                Column("block error, kept fits marked", rows, tuple(_change(*pair) for pair in pairs), best)
            )
            said.append(
                f"on the {rows} from {_percent(mean(before for before, _ in pairs))} to"
                f" {_percent(mean(after for _, after in pairs))}"
            )
        blocks.append(
            f"`{name}`: step `{step}` changes the mean error of a block {', '.join(said)}. The error is the"
            " squared distance to the dense model's output, divided by its variance. The result was kept in"
            f" {sum(kept)} of {len(found)} blocks."
        )
        blocks.append(
            _block_table(
                name,
                found,
                [*columns, Column("", "epochs", tuple(str(one["epochs"]) for one in found.values()))],
            )
        )
    return blocks if fitted else [*blocks, "No variant trains whole blocks."]


def _distillation(results: Results) -> Blocks:
    trained = {variant.name: variant.training for variant in results.pruned if variant.training}
    if not trained:
        return ["All variants are one-shot: none is trained as a whole after pruning."]
    blocks: Blocks = [
        "After pruning, the whole model is trained on the calibration samples towards the dense model's"
        " next-token distribution. Zeros stay zero. The result is kept if it lowers the mean KL divergence"
        " from the dense model (nats per token) on the held-out split."
    ]
    for name, facts in trained.items():
        before, after = facts["held_out_before"], facts["held_out_after"]
        changed = (
            "training diverged" if after is None else f"the divergence went from {before:.4f} to {after:.4f}"
        )
        kept = (
            "The result was kept."
            if facts["kept"]
            else "The result was not kept, so this variant is the pruned checkpoint."
        )
        blocks.append(f"`{name}`: {facts['steps']} steps over {facts['rows']} samples; {changed}. {kept}")
    return blocks


def _change(before: float, after: float) -> str:
    return f"{_percent(before)} → {_percent(after)}"


def _block_table(name: str, facts: Facts, columns: Sequence[Column]) -> Block:
    summary = f"All {len(facts)} blocks of {name}" if len(facts) > MOST_ROWS else ""
    return Block("table", [Column("", "block", tuple(facts)), *columns], summary)


# Samples


def _samples(results: Results) -> Blocks:
    if not results.dense.completions:
        return ["There are no completions, because `evaluate.completions.count` is 0."]
    blocks: Blocks = [
        "Greedy completions of the first samples of the text. The part that equals the dense model's"
        " completion is pale. A completion ends after `evaluate.completions.new_tokens` tokens, or where the"
        " model ends the text."
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
    """``text`` up to the first difference from ``dense``, and the rest."""
    same = next(
        (at for at, (a, b) in enumerate(zip(text, dense, strict=False)) if a != b), min(len(text), len(dense))
    )
    return text[:same], text[same:]


# Provenance

# keys of a text's hashes: its samples, and their source (files or a dataset of the hub)
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
            "The model, texts, parameters and versions below determine every figure above: the same inputs"
            " give the same artifacts on the same kind of machine. `dvc.lock` has the hashes of all"
            " intermediate artifacts."
        ),
        Block("table", [words("model", list(facts)), words("", list(facts.values()))]),
        Block("table", _texts(results.sources)),
        Block("code", _json(model["sha256"]), "SHA-256 of the model's files"),
        Block("code", _json(hashes), "SHA-256 of the texts: samples and source files"),
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
    facts = {"text": "name", "use": "use", "kind": "kind", "start token": "start"}
    counts = {
        "samples": "rows",
        "sequence length": "length",
        "documents": "documents",
        "their tokens": "tokens",
    }
    columns = [words(head, [source[key] for source in sources]) for head, key in facts.items()]
    columns += [
        Column("", head, tuple(f"{source[key]:,}" for source in sources)) for head, key in counts.items()
    ]
    seeds = tuple("none: in order" if source["seed"] is None else str(source["seed"]) for source in sources)
    return [*columns, Column("", "seed of the samples", seeds)]


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


# Model

# with fewer than d / RARE tokens, the statistics of all experts count more than the expert's own, see
# ``stats.moments.prior``
RARE = 4


def _model(results: Results) -> Blocks:
    """Couplings by kind of block, and the number of tokens that each expert processed."""
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
        words("couplings", [", ".join(names) or ABSENT for names in folded]),
        words(
            "inputs without a coupling",
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
            "Sparseline discovered this structure by running the model, and verified it on the model's own"
            " weights: scaling by random powers of two along a coupling does not change a block's outputs."
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
    """Tokens per expert while the first variant with statistics was pruned."""
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
            f"Tokens that the router sent to each expert while `{variant.name}` was pruned. The statistics of"
            " an expert are a weighted mean of its own and those of all experts of the layer. With n tokens"
            " and d channels, its own have the weight n / (n + d/4)."
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
