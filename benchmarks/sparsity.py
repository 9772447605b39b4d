"""Allocations and scores on the testbeds, cell by cell and resumable: ``python -m benchmarks.sparsity cells|unsquared|verify``.

A cell allocates a budget, prunes with the OBS sweep (column blocks of 128, damping 1%) and measures perplexity. Combinations are chosen on
validation text; test and WikiText-2 are only reported. One file per finished cell, named after all that it depends on.
"""

import statistics as stats
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields
from math import exp, log
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

from benchmarks.induction import Bench, gap
from benchmarks.records import Record, cell_file, commit, finish_cells, gather, recompute, recorded
from benchmarks.testbed import NAMES, Testbed, inputs
from benchmarks.twins import differing
from pipeline_lib.allocate.budget import Unit
from pipeline_lib.allocate.methods import NEEDS, plan
from pipeline_lib.core import params
from pipeline_lib.core.artifacts import block_file, read_tensors, write_json
from pipeline_lib.masks.scores import Curvature
from pipeline_lib.masks.settings import Score
from pipeline_lib.measure import fisher
from pipeline_lib.measure.backward import Subject
from pipeline_lib.measure.curves import CurvesParams, measure
from pipeline_lib.measure.estimate import estimates
from pipeline_lib.measure.fisher import OutputMoments
from pipeline_lib.measure.settings import SensitivityParams
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.transform import Transform
from pipeline_lib.prune.layerwise import PrunedBlock
from pipeline_lib.prune.prune import PruneParams, prune
from pipeline_lib.solve import sweep as obs

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sparsity.json"
UNSQUARED = HERE / "results" / "unsquared.json"
TEXTS = ("validation", "test", "wikitext2")
ALLOCATIONS: dict[str, dict[str, Any]] = {
    "uniform": {"method": "uniform"},
    "layer": {"method": "layer", "alpha": 0.15},
    "weight": {"method": "weight", "alpha": 0.15},
    "predicted": {"method": "predicted", "weighting": "kronecker", "temper": 0.75, "alpha": 0.2},
}
OTHERS = {  # one seed
    **{f"{method}-{alpha:g}": {"method": method, "alpha": alpha} for method in ("layer", "weight") for alpha in (0.1, 0.2)},
    **{
        f"predicted-{weighting}-{temper:g}-{alpha:g}": {"method": "predicted", "weighting": weighting, "temper": temper, "alpha": alpha}
        for weighting, temper, alpha in [
            ("trace", 1, 1),
            ("kronecker", 1, 1),
            ("kronecker", 0.75, 1),
        ]
    },
    "owl": {"method": "owl", "alpha": 0.08},  # its authors' lambda
    "dlp": {"method": "dlp", "alpha": 0.15},  # its authors' alpha
    "depth": {"method": "depth", "alpha": 0.15},
}
FREE = ("predicted-kronecker-1-1", "predicted-kronecker-0.75-1")  # N:M has no other density within 0.2 of 2:4
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    testbed: str
    pattern: str
    sparsity: float
    allocation: str
    score: Score
    seed: int

    def prune(self) -> PruneParams:
        overrides = {
            "selection": {"score": self.score, "group": "block", "sparsity": self.sparsity, "pattern": self.pattern},
            "allocation": (ALLOCATIONS | OTHERS)[self.allocation],
            "reconstruction": {"steps": ["obs"]},
        }
        return PruneParams.model_validate(params.merge(params.section("prune"), overrides))

    def file(self) -> Path:
        parameters = [params.section(name) for name in ("calibrate", "sensitivity", "curves")] + [self.prune().model_dump(mode="json")]
        return cell_file("sparsity-" + "-".join(map(str, astuple(self))), parameters, inputs(self.testbed, TEXTS))


KEY = tuple(one.name for one in fields(Cell))


def cells() -> Iterator[Cell]:
    """In the order of the questions: the main table seed by seed, then what has one seed."""
    for seed in range(3):
        for sparsity in SPARSITIES:
            for testbed in NAMES:
                for score in ("obs", "isc"):
                    for allocation in ALLOCATIONS:
                        yield Cell(testbed, "unstructured", sparsity, allocation, score, seed)
    for testbed in NAMES:
        for sparsity in SPARSITIES:
            yield from (Cell(testbed, "unstructured", sparsity, allocation, "obs", 0) for allocation in OTHERS)
            yield from (Cell(testbed, "unstructured", sparsity, allocation, "obd", 0) for allocation in ALLOCATIONS)
        for pattern in ("2:4", "4:8"):
            for score in ("obs", "isc", "obd"):
                yield from (Cell(testbed, pattern, 0.5, allocation, score, 0) for allocation in ("uniform", "weight", *FREE))


def sensitivities(bed: Testbed, rows: torch.Tensor, with_moments: bool = True) -> tuple[Entries, list[dict[str, torch.Tensor]]]:
    """What stage sensitivity gives: per matrix name its entry; per block the output moments by label, if asked for."""
    entry, settings = bed.checkpoint.architecture, params.load(SensitivityParams, "sensitivity")
    matrices = {index: {entry.matrix_name(index, matrix): matrix for matrix in entry.matrices} for index in range(entry.depth)}
    subject = Subject(bed.stream(), rows, matrices)
    with tempfile.TemporaryDirectory() as folder:
        moments = OutputMoments(Path(folder), full=True) if with_moments else None
        groups = estimates(
            lambda probes: fisher.samples(subject, settings, probes, moments), settings.probes, settings.probes_per_pass, settings.agreement
        )
        summary = list(groups)[-1].summary()
        if moments is not None:
            moments.finish(entry.depth)
        found = [read_tensors(block_file(Path(folder), index))[0] for index in range(entry.depth)] if with_moments else []
    places = {name: {"block": index, "kind": m.kind} for index, named in matrices.items() for name, m in named.items()}
    return {name: {**values, **places[name]} for name, values in summary.items()}, found


class Lab(Bench):
    """A testbed with what the cells of a seed share: sensitivities, and the curves of a score and pattern."""

    def at(self, seed: int) -> None:
        if seed != self.seed:
            self.known: dict[Any, tuple[Any, float]] = {}
            started = time.perf_counter()
            super().at(seed)
            self.calibrate_s = time.perf_counter() - started

    def once(self, key: Any, compute: Any) -> tuple[Any, float]:
        """A shared result and the seconds it took."""
        if key not in self.known:
            started = time.perf_counter()
            value = compute()
            self.known[key] = value, time.perf_counter() - started
        return self.known[key]

    def measured(self, settings: PruneParams) -> tuple[Entries, float]:
        """What the allocation reads, and the seconds that it took."""
        if settings.allocation.method not in NEEDS:
            return {}, 0.0
        plain = NEEDS[settings.allocation.method][0] == "sensitivity"
        (entries, moments), seconds = self.once(("sensitivities", plain), lambda: sensitivities(self.bed, self.rows["fit"], not plain))
        if plain:
            return entries, seconds
        selection = settings.selection
        curves, more = self.once((selection.score, selection.pattern), lambda: self.curves(settings, entries, moments))
        return curves, seconds + more + self.calibrate_s

    def curves(self, settings: PruneParams, entries: Entries, moments: list[dict[str, torch.Tensor]]) -> Entries:
        """What stage curves gives."""
        entry, given = self.bed.checkpoint.architecture, params.load(CurvesParams, "curves")
        found: Entries = {}
        for index, sites in enumerate(self.statistics):
            tensors = self.bed.checkpoint.block(index)
            where = f"{entry.blocks}.{index}"
            block = measure(entry, tensors, sites, entry.matrices, moments[index], settings.selection, True, given, where)
            found |= {f"{where}.{label}": entries[f"{where}.{label}"] | facts for label, facts in block.items()}
        return found

    def allocated(self, settings: PruneParams) -> tuple[dict[tuple[int, Matrix], int], float]:
        """Kept counts, and the wall seconds of all that they took."""
        entries, seconds = self.measured(settings)
        entry, pattern = self.bed.checkpoint.architecture, settings.selection.shape
        places = [(index, matrix) for index in range(entry.depth) for matrix in entry.matrices]
        units = []
        for index, matrix in places:
            name, shape = entry.matrix_name(index, matrix), self.bed.checkpoint.matrix_shape(index, matrix)
            units.append(Unit(name, index, shape[0] * shape[1], pattern.quantum(name, shape)))
        return dict(zip(places, plan(units, settings.selection.sparsity, settings.allocation, entries), strict=True)), seconds

    def blocks(self, settings: PruneParams, kept: dict[tuple[int, Matrix], int]) -> Iterator[tuple[int, PrunedBlock]]:
        """The pruned blocks, one after the other."""
        transforms = [Transform()] * self.bed.checkpoint.architecture.depth
        return prune(self.bed.stream(), self.rows["fit"], self.rows["held_out"], kept, transforms, settings, lambda _: None)

    def prune(self, settings: PruneParams) -> tuple[dict[int, PrunedBlock], float]:
        """The pruned blocks, and the wall seconds of all that they took."""
        kept, seconds = self.allocated(settings)
        started = time.perf_counter()
        return dict(self.blocks(settings, kept)), seconds + time.perf_counter() - started

    def cell(self, cell: Cell) -> list[dict[str, Any]]:
        self.at(cell.seed)
        blocks, seconds = self.prune(cell.prune())
        ppl = self.perplexities({index: block.tensors for index, block in blocks.items()}, TEXTS)
        told = {"wall_s": round(seconds, 2), "commit": commit()}
        return [{**asdict(cell), "text": text, "ppl": ppl[text], "dense": self.dense[text], "selected": False, **told} for text in TEXTS]


def select(records: list[Record]) -> None:
    """Mark, per testbed, pattern and sparsity, the combination with the least mean log perplexity on validation text, of those with most seeds."""
    combined: dict[tuple[Any, ...], dict[tuple[Any, ...], list[float]]] = {}
    for r in records:
        r["selected"] = False
        if r["text"] == "validation":
            place = combined.setdefault((r["testbed"], r["pattern"], r["sparsity"]), {})
            place.setdefault((r["allocation"], r["score"]), []).append(log(r["ppl"]))
    for place, found in combined.items():
        seeds = max(map(len, found.values()))
        best = min((key for key, values in found.items() if len(values) == seeds), key=lambda key: stats.mean(found[key]))
        for r in records:
            r["selected"] |= (r["testbed"], r["pattern"], r["sparsity"], r["allocation"], r["score"]) == (*place, *best)


def table(records: list[Record], text: str) -> str:
    """Markdown: perplexity, geometric mean ± spread (largest distance of a seed from it), and in brackets the share of the gap between uniform
    OBS and dense that is closed (paired by seed, mean); ``*`` marks what validation text named."""
    known = {tuple(r[key] for key in KEY): r for r in records if r["text"] == text}
    columns = [(t, p, s) for t in NAMES for p, s in [("unstructured", s) for s in SPARSITIES] + [("2:4", 0.5), ("4:8", 0.5)]]
    rows = list(dict.fromkeys((cell.allocation, cell.score) for cell in cells()))
    heads = [f"{t} {f'{s:.0%}' if p == 'unstructured' else p}" for t, p, s in columns]
    lines = [f"| {text} | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    for allocation, score in rows:
        line = []
        for column in columns:
            found = [known[key] for seed in range(3) if (key := (*column, allocation, score, seed)) in known]
            if not found:
                line.append("")
                continue
            middle = exp(stats.mean(log(r["ppl"]) for r in found))
            spread = f" ± {max(abs(r['ppl'] - middle) for r in found):.2f}" if len(found) > 1 else ""
            bases = [known.get((*column, "uniform", "obs", r["seed"])) for r in found]
            gaps = [gap(base["ppl"], r["ppl"], r["dense"]) for base, r in zip(bases, found, strict=True) if base]
            closed = f" ({100 * stats.mean(gaps):.1f}%)" if gaps and (allocation, score) != ("uniform", "obs") else ""
            line.append(f"{middle:.2f}{spread}{closed}{'*' if found[0]['selected'] else ''}")
        if any(line):
            lines.append(f"| {allocation}, {score} | {' | '.join(line)} |")
    return "\n".join(lines)


def named(records: list[Record]) -> str:
    """Markdown: the combinations that validation text named, and the share of the gap between uniform OBS and dense that they close, seed by seed."""
    known = {(*(r[key] for key in KEY), r["text"]): r for r in records if r["pattern"] == "unstructured"}
    lines = ["| testbed, sparsity | allocation, score | test | wikitext2 |", "|---|---|---|---|"]
    high = []
    for testbed, sparsity in ((testbed, sparsity) for testbed in NAMES for sparsity in SPARSITIES):
        chosen = [r for r in known.values() if r["selected"] and (r["testbed"], r["sparsity"]) == (testbed, sparsity)]
        gaps: dict[str, list[float]] = {text: [] for text in ("test", "wikitext2")}
        for r in chosen:
            base = known.get((testbed, "unstructured", sparsity, "uniform", "obs", r["seed"], r["text"]))
            if base and r["text"] in gaps:
                gaps[r["text"]].append(100 * gap(base["ppl"], r["ppl"], r["dense"]))
        if chosen:
            shown = (", ".join(f"{value:.1f}" for value in values) for values in gaps.values())
            lines.append(f"| {testbed} {sparsity:.0%} | {chosen[0]['allocation']}, {chosen[0]['score']} | {' | '.join(shown)} |")
            high += [gaps["test"]] if sparsity >= 0.6 and gaps["test"] else []
    if high:
        lines.append(f"\nFrom 60% on, test: mean {stats.mean(map(stats.mean, high)):.1f}, least {min(map(min, high)):.1f}.")
    return "\n".join(lines)


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("cells")
@click.option("--testbed", type=click.Choice(NAMES), help="Only this one.")
@click.option("--seed", type=int, help="Only this one.")
@click.option("--sparsity", type=float, help="Only this one.")
def run_cells(testbed: str | None, seed: int | None, sparsity: float | None) -> None:
    """Every cell that is not there yet; then the tables."""
    labs = {name: Lab(Testbed(name)) for name in NAMES}
    asked = [
        cell for cell in cells() if testbed in (None, cell.testbed) and seed in (None, cell.seed) and sparsity in (None, cell.sparsity)
    ]
    finish_cells(asked, lambda cell: labs[cell.testbed].cell(cell), lambda found: ", ".join(f"{r['text']} {r['ppl']:.3f}" for r in found))
    records = gather(RESULTS, list(cells()))
    select(records)
    write_json(RESULTS, records)
    show_tables(records)


def show_tables(records: list[Record]) -> None:
    for text in TEXTS:
        click.echo("\n" + table(records, text))
    click.echo("\n" + named(records))


@main.command("table")
def show() -> None:
    """The tables of the recorded results."""
    show_tables(recorded(RESULTS))


@main.command()
@click.option("--count", default=3, show_default=True)
@click.option("--seed", type=int, help="Which cells; random without.")
def verify(count: int, seed: int | None) -> None:
    """Recompute random cells of the recorded results; they must agree within 1% of perplexity (other threads, other rounding)."""
    recompute(RESULTS, Cell, lambda cell: Lab(Testbed(cell.testbed)).cell(cell), ("dense", "ppl"), count, seed)


def _unsquared(score: Score, weight: torch.Tensor, curvature: Curvature) -> torch.Tensor:
    """ISC as its authors' released code has it: w²·(H_mm + 1/U_mm), with the Cholesky factor's diagonal not squared."""
    return weight.square() * (curvature.diagonal + curvature.inverse_diagonal.rsqrt())


@main.command()
@click.option("--testbed", type=click.Choice(NAMES), help="Only this one.")
def unsquared(testbed: str | None) -> None:
    """What the authors' code, which does not square U_mm, changes of ISC: share of mask entries and perplexity, uniform, seed 0."""
    results = []
    for name in (testbed,) if testbed else NAMES:
        lab = Lab(Testbed(name))
        lab.at(0)
        for sparsity in SPARSITIES:
            settings = Cell(name, "unstructured", sparsity, "uniform", "isc", 0).prune()
            squared, _ = lab.prune(settings)
            with mock.patch.object(obs, "saliency", _unsquared):
                plain, _ = lab.prune(settings)
            runs = {"squared": squared, "unsquared": plain}
            ppl = {
                key: lab.perplexities({i: block.tensors for i, block in blocks.items()}, ("validation", "test"))
                for key, blocks in runs.items()
            }
            changed = differing(squared, plain)
            results.append({"testbed": name, "sparsity": sparsity, "seed": 0, "masks_differ": changed, **ppl, "commit": commit()})
            click.echo(results[-1])
    write_json(UNSQUARED, results)


if __name__ == "__main__":
    main()
