"""Sparsity Induction on the testbeds, cell by cell and resumable: ``python -m benchmarks.induction cells|verify|timing``.

A cell prunes a testbed with one base method, without and with induction (start, learning, gate) and channel compensation, under the
parameters that params.yaml ships, and measures both on the test texts. One file per finished cell, named after all that it depends on.
"""

import statistics as stats
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, field, replace
from math import log
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.records import Record, cell_file, commit, finish_cells, gather, recompute
from benchmarks.testbed import NAMES, Testbed, inputs
from pipeline_lib.core import params
from pipeline_lib.core.artifacts import write_json
from pipeline_lib.induce.gate import Gate
from pipeline_lib.induce.induce import InduceParams, Outcome, induce_block
from pipeline_lib.induce.scale import ScaleParams, shifts, starting_factors
from pipeline_lib.models.transform import Transform
from pipeline_lib.prune.layerwise import PrunedBlock
from pipeline_lib.prune.prune import PruneParams, prune
from pipeline_lib.stats.moments import SiteStatistics
from pipeline_lib.stats.walk import CalibrateParams, walk

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "induction.json"
BASES: dict[str, dict[str, Any]] = {
    "magnitude": {"selection": {"score": "magnitude", "group": "matrix"}, "reconstruction": {"steps": []}},
    "wanda": {"selection": {"score": "wanda", "group": "row"}, "reconstruction": {"steps": []}},
    "sparsegpt": {"selection": {"score": "obs", "group": "block"}, "reconstruction": {"steps": ["obs"]}},
}
PATTERNS = {
    "50%": (0.5, "unstructured"),
    "60%": (0.6, "unstructured"),
    "70%": (0.7, "unstructured"),
    "2:4": (0.5, "2:4"),
    "4:8": (0.5, "4:8"),
}
SEEDS = {"50%": 3, "60%": 3, "70%": 3, "2:4": 3, "4:8": 1}
JUDGED = ("60%", "70%", "2:4")  # over which the mean gap closed is taken
TEXTS = ("test", "wikitext2")


@dataclass(frozen=True)
class Recipe:
    """What one run does, and what is laid over params.yaml for it."""

    base: str
    pattern: str
    channel: bool = False
    induce: bool = False
    ungated: bool = False  # take the start as it is
    couplings: tuple[str, ...] = ("norm", "pair", "q_k")  # which factors there are
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)  # section -> overrides

    def section(self, name: str) -> dict[str, Any]:
        return params.merge(params.section(name), self.changes.get(name, {}))

    def prune(self) -> PruneParams:
        sparsity, pattern = PATTERNS[self.pattern]
        steps = [*BASES[self.base]["reconstruction"]["steps"], *(["channel"] if self.channel else [])]
        overrides = {
            "selection": {**BASES[self.base]["selection"], "sparsity": sparsity, "pattern": pattern},
            "reconstruction": {"steps": steps},
        }
        shipped = params.merge(params.section("prune"), overrides)
        return PruneParams.model_validate(params.merge(shipped, self.changes.get("prune", {})))


@dataclass
class Run:
    blocks: dict[int, PrunedBlock]
    outcomes: list[Outcome]
    induce_s: float
    prune_s: float

    def tensors(self) -> dict[int, dict[str, torch.Tensor]]:
        return {index: block.tensors for index, block in self.blocks.items()}


Statistics = list[dict[str, SiteStatistics]]


def calibrate(bed: Testbed, rows: dict[str, torch.Tensor]) -> Statistics:
    """What stage calibrate gives."""
    settings = params.load(CalibrateParams, "calibrate")
    return [sites for _, sites in walk(bed.stream(), rows["fit"], rows["held_out"], settings, grams=True)]


def execute(bed: Testbed, rows: dict[str, torch.Tensor], statistics: Statistics, recipe: Recipe) -> Run:
    """Stages scale, induce and prune, in memory."""
    entry, settings = bed.checkpoint.architecture, recipe.prune()
    kept = bed.uniform(settings.selection.sparsity)
    transforms, outcomes = [Transform()] * entry.depth, []
    started = time.perf_counter()
    if recipe.induce:
        model = bed.stream()
        scale, induce = ScaleParams.model_validate(recipe.section("scale")), InduceParams.model_validate(recipe.section("induce"))
        gate = Gate(model, rows["held_out"], settings.batch_rows, settings.selection, "obs" in settings.reconstruction.steps)
        entry = replace(entry, couplings=tuple(c for c in entry.couplings if _kind(c.name) in recipe.couplings))
        starts = []
        for index in range(entry.depth):
            tensors, sites = bed.checkpoint.block(index), statistics[index]
            start = Transform(starting_factors(entry, tensors, sites, scale), shifts(entry, sites, scale))
            starts.append(start)
            if recipe.ungated:
                continue
            counts = {m: kept[index, m] for m in entry.matrices}
            judge = gate.enter(index, tensors, sites, counts)
            outcomes.append(induce_block(entry, tensors, set(counts), sites, start, settings.selection, induce, str(index), judge))
        transforms = starts if recipe.ungated else [outcome.transform for outcome in outcomes]
    middle = time.perf_counter()
    blocks = dict(prune(bed.stream(), rows["fit"], rows["held_out"], kept, transforms, settings, lambda _: None))
    return Run(blocks, outcomes, middle - started, time.perf_counter() - middle)


def _kind(coupling: str) -> str:
    """norm (a norm's output channels), pair (rows of one matrix, columns of another) or q_k."""
    return coupling if coupling == "q_k" else "norm" if coupling.endswith("norm") else "pair"


def gap(without: float, new: float, dense: float) -> float:
    """Share of the gap that is closed: (ln ppl_without − ln ppl_new) / (ln ppl_without − ln ppl_dense)."""
    return (log(without) - log(new)) / (log(without) - log(dense))


@dataclass(frozen=True)
class Cell:
    testbed: str
    base: str
    pattern: str
    seed: int

    def file(self) -> Path:
        parameters = [params.section(name) for name in ("calibrate", "scale", "induce", "prune")]
        return cell_file("induction-" + "-".join(map(str, astuple(self))), parameters, inputs(self.testbed, TEXTS))


def cells() -> Iterator[Cell]:
    for seed in range(3):
        for pattern, seeds in SEEDS.items():
            for base in BASES if seed < seeds else ():
                for testbed in NAMES:
                    yield Cell(testbed, base, pattern, seed)


class Bench:
    """One testbed with what its runs share: rows and statistics of the current seed, dense perplexities."""

    def __init__(self, bed: Testbed) -> None:
        self.bed = bed
        self.seed: int | None = None
        self.dense: dict[str, float] = {}

    def at(self, seed: int) -> None:
        if seed != self.seed:
            self.seed, self.rows = seed, self.bed.calibration(seed)
            self.statistics = calibrate(self.bed, self.rows)

    def run(self, recipe: Recipe, texts: tuple[str, ...] = TEXTS) -> tuple[Run, dict[str, float]]:
        run = execute(self.bed, self.rows, self.statistics, recipe)
        return run, self.perplexities(run.tensors(), texts)

    def perplexities(self, blocks: dict[int, dict[str, torch.Tensor]], texts: tuple[str, ...]) -> dict[str, float]:
        """Per text; the dense model's on the way, if it is not known yet."""
        for text in texts:
            if text not in self.dense:
                self.dense[text] = self.bed.perplexity({}, text)
        return {text: self.bed.perplexity(blocks, text) for text in texts}

    def cell(self, cell: Cell) -> dict[str, Any]:
        """Flat records and, beside them, how many blocks kept what."""
        self.at(cell.seed)
        _, without = self.run(Recipe(cell.base, cell.pattern))
        run, new = self.run(Recipe(cell.base, cell.pattern, channel=True, induce=True))
        records = [
            {**asdict(cell), "text": text, "dense": self.dense[text], "without": without[text], "with": new[text]}
            | {"wall_s": round(run.induce_s + run.prune_s, 2), "commit": commit()}
            for text in TEXTS
        ]
        choices = [outcome.choice for outcome in run.outcomes]
        kept = {choice: choices.count(choice) for choice in ("none", "start", "learned")}
        compensated = sum(block.facts["channel"]["epochs"] > 0 for block in run.blocks.values())
        return {"records": records, "blocks": {**kept, "compensated": compensated}}


def table(records: list[Record], text: str) -> str:
    """Markdown: gap closed in percent, mean of the seeds (their number where it is not the full one), per testbed, base and pattern."""
    lines = [f"| {text} | {' | '.join(PATTERNS)} | mean of {', '.join(JUDGED)} |", "|---" * (len(PATTERNS) + 2) + "|"]
    for base in BASES:
        means = []
        for testbed in NAMES:
            cells, judged = [], []
            for pattern in PATTERNS:
                found = [r for r in records if (r["testbed"], r["base"], r["pattern"], r["text"]) == (testbed, base, pattern, text)]
                gaps = [100 * gap(r["without"], r["with"], r["dense"]) for r in found]
                partial = f" ({len(gaps)} of {SEEDS[pattern]})" if len(gaps) < SEEDS[pattern] else ""
                cells.append(f"{stats.mean(gaps):.1f}{partial}" if gaps else "")
                judged += [stats.mean(gaps)] if gaps and pattern in JUDGED else []
            means += judged
            lines.append(f"| {base}, {testbed} | {' | '.join(cells)} | {f'{stats.mean(judged):.1f}' if judged else ''} |")
        lines.append(f"| **{base}** |{' |' * len(PATTERNS)} **{stats.mean(means):.1f}** |" if means else f"| **{base}** |")
    return "\n".join(lines)


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("cells")
@click.option("--testbed", type=click.Choice(NAMES), help="Only this one.")
@click.option("--again", is_flag=True, help="Also those that are there, after a change of code.")
def run_cells(testbed: str | None, again: bool) -> None:
    """Every cell that is not there yet; then the table."""
    benches = {name: Bench(Testbed(name)) for name in NAMES}

    def tell(found: dict[str, Any]) -> str:
        closed = ", ".join(f"{r['text']} {gap(r['without'], r['with'], r['dense']):.1%}" for r in found["records"])
        return f"gap closed {closed}; blocks {found['blocks']}"

    asked = [cell for cell in cells() if testbed in (None, cell.testbed)]
    finish_cells(asked, lambda cell: benches[cell.testbed].cell(cell), tell, again)
    records = gather(RESULTS, list(cells()))
    write_json(RESULTS, records)
    for text in TEXTS:
        click.echo("\n" + table(records, text))
    worst = min(records, key=lambda r: gap(r["without"], r["with"], r["dense"]))
    click.echo(f"\nworst: {gap(worst['without'], worst['with'], worst['dense']):.1%} {worst}")


@main.command()
@click.option("--count", default=3, show_default=True)
@click.option("--seed", type=int, help="Which cells; random without.")
def verify(count: int, seed: int | None) -> None:
    """Recompute random cells of the recorded results; they must agree within 1% of perplexity (other threads, other rounding)."""
    recompute(RESULTS, Cell, lambda cell: Bench(Testbed(cell.testbed)).cell(cell), ("dense", "without", "with"), count, seed)


@main.command()
@click.option("--repeats", default=3, show_default=True)
def timing(repeats: int) -> None:
    """Wall time of induction and channel compensation over that of a SparseGPT sweep, in the same run."""
    results = []
    for name in NAMES:
        bench = Bench(Testbed(name))
        bench.at(0)
        for base in BASES:
            ratios = []
            for _ in range(repeats):
                sweep, plain = (execute(bench.bed, bench.rows, bench.statistics, Recipe(b, "60%")) for b in ("sparsegpt", base))
                full = execute(bench.bed, bench.rows, bench.statistics, Recipe(base, "60%", channel=True, induce=True))
                ratios.append((full.induce_s + full.prune_s - plain.prune_s) / sweep.prune_s)
            record = {"testbed": name, "base": base, "sweep_s": round(sweep.prune_s, 2), "induce_s": round(full.induce_s, 2)}
            record |= {"channel_s": round(full.prune_s - plain.prune_s, 2), "ratio": round(stats.median(ratios), 3)}
            results.append(record | {"threads": torch.get_num_threads(), "commit": commit()})
            click.echo(results[-1])
    write_json(HERE / "results" / "induction_timing.json", results)


if __name__ == "__main__":
    main()
