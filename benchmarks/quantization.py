"""Quantisation on the testbeds, alone and with pruning, cell by cell and resumable: ``python -m benchmarks.quantization cells|table|verify``.

Round to nearest, GPTQ, SparseGPT with GPTQ in its sweep, and the shipped preset, all on the same grid. A cell prunes and quantises a testbed and measures it
on the test texts; ``bytes`` are those of the prunable matrices: packed codes, scales and zero points, masks where something is pruned. One file per finished cell.
"""

import math
import statistics as stats
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from math import exp, log
from pathlib import Path
from typing import Any

import click

from benchmarks.records import Record, cell_file, commit, finish_cells, gather, recompute, recorded
from benchmarks.sparsity import Lab
from benchmarks.testbed import NAMES, Testbed, inputs
from pipeline_lib.core import params
from pipeline_lib.core.artifacts import write_json
from pipeline_lib.prune.prune import PruneParams
from pipeline_lib.prune.size import DENSE_BITS, packed_bits

RESULTS = Path(__file__).parent / "results" / "quantization.json"
TEXTS = ("validation", "test", "wikitext2")
PRESET = "sparseline"  # of params.yaml: what `ours` does before it quantises
GRID = {"group": 128, "symmetric": False}
PATTERNS: dict[str, dict[str, Any]] = {
    "none": {"sparsity": 0.0, "pattern": "unstructured"},
    "50%": {"sparsity": 0.5, "pattern": "unstructured"},
    "2:4": {"sparsity": 0.5, "pattern": "2:4"},
}
SWEEP = {"selection": {"score": "obs", "group": "block"}, "allocation": {"method": "uniform"}, "reconstruction": {"steps": ["obs"]}}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": params.merge(SWEEP, {"reconstruction": {"steps": []}}),
    "gptq": SWEEP,
    "sparsegpt": SWEEP,
    "ours": {name: params.section(f"variants.{PRESET}")[name] for name in ("selection", "allocation", "reconstruction")},
}
METHODS |= {f"{name}, symmetric": params.merge(METHODS[name], {"quantization": {"symmetric": True}}) for name in ("rtn", "gptq")}
METHODS["ours, no refit"] = params.merge(METHODS["ours"], {"quantization": {"refit": []}})
ROWS = (  # method, bits, pattern
    ("dense", 16, "none"),
    ("rtn", 4, "none"),
    ("gptq", 4, "none"),
    ("gptq", 3, "none"),
    ("sparsegpt", 4, "50%"),
    ("ours", 4, "50%"),
    ("sparsegpt", 4, "2:4"),
    ("ours", 4, "2:4"),
    ("rtn, symmetric", 4, "none"),  # what was chosen against
    ("gptq, symmetric", 4, "none"),
    ("ours, no refit", 4, "50%"),
)


@dataclass(frozen=True)
class Cell:
    testbed: str
    method: str
    bits: int
    pattern: str
    seed: int

    def prune(self) -> PruneParams | None:
        """None for the dense model."""
        if self.method == "dense":
            return None
        how = params.merge({"quantization": {"bits": self.bits, **GRID}}, METHODS[self.method])
        how = params.merge(how, {"selection": PATTERNS[self.pattern]})
        if self.pattern == "2:4":  # in every matrix
            how["allocation"] = {"method": "uniform"}
        return PruneParams.model_validate(params.merge(params.section("prune"), how))

    def file(self) -> Path:
        how = self.prune()
        parameters: list[Any] = [how and how.model_dump(mode="json")]
        if how is not None and how.allocation.method != "uniform":
            parameters += [params.section(name) for name in ("calibrate", "sensitivity", "curves")]
        return cell_file(
            "quantization-" + "-".join(map(str, astuple(self))).replace("%", "").replace(", ", "-").replace(" ", "_"),
            parameters,
            inputs(self.testbed, TEXTS),
        )


def cells() -> Iterator[Cell]:
    """In the order of the rows, seed by seed."""
    for seed in range(3):
        for testbed in NAMES:
            yield from (Cell(testbed, *row, seed) for row in ROWS)


class Bench(Lab):
    """A testbed; what allocations read is measured when one asks for it."""

    def run(self, cell: Cell) -> list[Record]:
        settings, bed = cell.prune(), self.bed
        entry = bed.checkpoint.architecture
        shapes = {(index, m): bed.checkpoint.matrix_shape(index, m) for index in range(entry.depth) for m in entry.matrices}
        if settings is None:
            ppl, bits, facts = self.perplexities({}, TEXTS), DENSE_BITS * sum(map(math.prod, shapes.values())), {}
        else:
            self.at(cell.seed)
            blocks, seconds = self.prune(settings)
            ppl = self.perplexities({index: block.tensors for index, block in blocks.items()}, TEXTS)
            found = {(index, m): blocks[index].facts["matrices"][m.label] for index, m in shapes}
            bits = sum(packed_bits(shape, found[place]["kept"], settings.quantization) for place, shape in shapes.items())
            error = stats.fmean([one["rounding_error"] for one in found.values()], [math.prod(shape) for shape in shapes.values()])
            facts = {"rounding_error": error, "wall_s": round(seconds, 2)}
        facts |= {"bytes": -(-bits // 8), "bits_per_weight": bits / sum(map(math.prod, shapes.values())), "commit": commit()}
        return [{**asdict(cell), "text": text, "ppl": ppl[text], "dense": self.dense[text], **facts} for text in TEXTS]


def table(records: list[Record]) -> str:
    """Markdown: per testbed bits a weight and perplexity per text, geometric mean over the seeds ± the largest distance of a seed from it."""
    known = {(r["testbed"], r["method"], r["bits"], r["pattern"], r["seed"], r["text"]): r for r in records}
    heads = " | ".join(TEXTS)
    lines = [
        f"| method, bits, pruned | {' | '.join(f'{name}: bits a weight | {heads}' for name in NAMES)} |",
        "|---" * (1 + len(NAMES) * (1 + len(TEXTS))) + "|",
    ]
    for row in ROWS:
        line = []
        for testbed in NAMES:
            for text in TEXTS:
                found = [known[key] for seed in range(3) if (key := (testbed, *row, seed, text)) in known]
                line += [f"{found[0]['bits_per_weight']:.2f}" if found else ""] if text == TEXTS[0] else []
                middle = exp(stats.mean(log(r["ppl"]) for r in found)) if found else 0
                spread = max((abs(r["ppl"] - middle) for r in found), default=0.0)
                line.append(f"{middle:.2f}{f' ± {spread:.2f}' if spread >= 0.005 else ''}" if found else "")
        if any(line):
            lines.append(f"| {', '.join(map(str, row))} | {' | '.join(line)} |")
    return "\n".join(lines)


def against(records: list[Record]) -> str:
    """The preset against SparseGPT at the same bits and pattern, seed by seed, in percent of perplexity."""
    known = {(r["testbed"], r["method"], r["bits"], r["pattern"], r["seed"], r["text"]): r["ppl"] for r in records}
    lines = []
    for testbed, pattern, text in ((t, p, x) for t in NAMES for p in ("50%", "2:4") for x in ("test", "wikitext2")):
        pairs = [[known.get((testbed, method, 4, pattern, seed, text)) for method in ("sparsegpt", "ours")] for seed in range(3)]
        found = [f"{100 * (ours / base - 1):+.2f}%" for base, ours in pairs if base and ours]
        if found:
            lines.append(f"ours against sparsegpt, {testbed}, {pattern} and 4 bits, {text}, seed by seed: {', '.join(found)}.")
    return "\n".join(lines)


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("cells")
@click.option("--testbed", type=click.Choice(NAMES), help="Only this one.")
@click.option("--seed", type=int, help="Only this one.")
@click.option("--method", type=click.Choice(["dense", *METHODS]), help="Only this one.")
def run_cells(testbed: str | None, seed: int | None, method: str | None) -> None:
    """Every cell that is not there yet; then the table."""
    labs = {name: Bench(Testbed(name)) for name in NAMES}
    asked = [c for c in cells() if testbed in (None, c.testbed) and seed in (None, c.seed) and method in (None, c.method)]
    finish_cells(asked, lambda cell: labs[cell.testbed].run(cell), lambda found: ", ".join(f"{r['text']} {r['ppl']:.3f}" for r in found))
    records = gather(RESULTS, list(cells()))
    write_json(RESULTS, records)
    show_tables(records)


def show_tables(records: list[Record]) -> None:
    click.echo("\n" + table(records) + "\n\n" + against(records))


@main.command("table")
def show() -> None:
    """The table of the recorded results."""
    show_tables(recorded(RESULTS))


@main.command()
@click.option("--count", default=3, show_default=True)
@click.option("--seed", type=int, help="Which cells; random without.")
def verify(count: int, seed: int | None) -> None:
    """Recompute random cells of the recorded results."""
    recompute(RESULTS, Cell, lambda cell: Bench(Testbed(cell.testbed)).run(cell), ("dense", "ppl"), count, seed)


if __name__ == "__main__":
    main()
