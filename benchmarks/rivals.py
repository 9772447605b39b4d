"""Our presets against other one-shot pruners, in one harness: ``python -m benchmarks.rivals cells|table|cost|block|verify``.

A cell prunes a testbed with one method in a process of its own. Its cost runs from model in memory to pruned (imports excluded; what a method
needs of sensitivity, calibration and curves included), its memory is the peak above what was there before. Perplexity is taken here, of all
methods alike. llm-compressor runs in an environment of its own (``make rivals-environment``) on the same token ids. `best` is
params.yaml's variant `sparseline`; `fast` and the baselines are the variants of those names. One file per finished cell.
"""

import functools
import json
import os
import statistics as stats
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from math import exp, log
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file

from benchmarks.induction import PATTERNS, Bench, Statistics, calibrate, gap
from benchmarks.records import Record, cell_file, commit, finish_cells, gather, recompute, recorded
from benchmarks.sparsity import Lab
from benchmarks.testbed import NAMES, Testbed, inputs
from pipeline_lib import params
from pipeline_lib.artifacts import write_json
from pipeline_lib.pruning.prune import PruneParams

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "rivals.json"
COST = HERE / "results" / "rivals_cost.json"
TEXTS = ("validation", "test", "wikitext2")
JUDGED = ("50%", "60%", "70%", "2:4")
VARIANTS = {"magnitude": "magnitude", "wanda": "wanda", "sparsegpt": "sparsegpt", "fast": "fast", "best": "sparseline"}
LLMCOMPRESSOR = {f"llm-compressor {name}": name for name in ("sparsegpt", "wanda")}
METHODS = (*VARIANTS, *LLMCOMPRESSOR)
REFERENCES: dict[str, dict[str, Any]] = {  # one seed: SparseGPT under others' cheap allocations
    "owl": {"allocation": {"method": "owl", "alpha": 0.08}},
    "dlp": {"allocation": {"method": "dlp", "alpha": 0.15}},
}
PYTHON = os.environ.get("SPARSELINE_RIVALS", str(HERE.parent / ".rivals" / "bin" / "python"))


@dataclass(frozen=True)
class Cell:
    testbed: str
    pattern: str
    method: str
    seed: int

    def prune(self) -> PruneParams:
        """Our own methods' parameters; where N:M is asked for, every matrix is N:M, as hardware wants it."""
        sparsity, pattern = PATTERNS[self.pattern]
        variant = params.merged("prune", f"variants.{VARIANTS.get(self.method, 'sparsegpt')}")
        changed = params.merge(variant, REFERENCES.get(self.method, {}))
        changed = params.merge(changed, {"selection": {"sparsity": sparsity, "pattern": pattern}})
        uniform = {"allocation": {"method": "uniform"}} if pattern != "unstructured" else {}
        return PruneParams.model_validate(
            {key: value for key, value in params.merge(changed, uniform).items() if key not in ("factors", "sensitivity")}
        )

    def file(self) -> Path:
        how: Any = LLMCOMPRESSOR.get(self.method)
        if how is None:
            how = [params.section(name) for name in ("calibrate", "sensitivity", "curves")] + [self.prune().model_dump(mode="json")]
        return cell_file("rivals-" + "-".join(map(str, astuple(self))).replace(" ", "_"), how, inputs(self.testbed, TEXTS))


def cells() -> Iterator[Cell]:
    """Seed by seed; then what has one seed."""
    for seed in range(3):
        for testbed in NAMES:
            yield from (Cell(testbed, pattern, method, seed) for pattern in JUDGED for method in METHODS)
    for testbed in NAMES:
        yield from (Cell(testbed, pattern, method, 0) for pattern in ("50%", "60%", "70%") for method in REFERENCES)


def resident(name: str) -> int:
    """VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


class Fresh(Lab):
    """A testbed whose statistics are taken when they are asked for, so that a method pays for what it needs alone."""

    def at(self, seed: int) -> None:
        self.seed, self.rows, self.known, self.calibrate_s = seed, self.bed.calibration(seed), {}, 0.0

    @functools.cached_property
    def statistics(self) -> Statistics:  # type: ignore[override]
        return calibrate(self.bed, self.rows)


def one(cell: Cell, out: Path) -> dict[str, Any]:
    """Prune as the cell says, in this process: its cost; the blocks go to a file."""
    lab, settings = Fresh(Testbed(cell.testbed)), cell.prune()
    lab.at(cell.seed)
    lab.bed.stream()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts anew
    cpu, started = time.process_time(), time.perf_counter()
    blocks, _ = lab.prune(settings)
    cost = {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu, "peak_rss_bytes": resident("VmHWM") - before}
    save_file({f"{index}/{name}": tensor.contiguous() for index, block in blocks.items() for name, tensor in block.tensors.items()}, out)
    return cost | {"threads": torch.get_num_threads()}


def called(*command: str | Path) -> dict[str, Any]:
    """What another process tells in the last line of JSON that it prints."""
    done = subprocess.run([str(word) for word in command], cwd=HERE.parent, capture_output=True, text=True, check=False)
    told = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not told:
        raise click.ClickException(f"{' '.join(map(str, command))} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(told[-1])
    return found


def pruned(bed: Testbed, cell: Cell) -> tuple[dict[int, dict[str, torch.Tensor]], dict[str, Any]]:
    """The blocks that a cell's method leaves, and its cost, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pruned.safetensors"
        if cell.method in LLMCOMPRESSOR:
            if not Path(PYTHON).exists():
                raise click.ClickException(
                    f"no llm-compressor at {PYTHON}; run `make rivals-environment`, or set SPARSELINE_RIVALS to its Python."
                )
            rows, (sparsity, pattern) = Path(folder) / "rows.safetensors", PATTERNS[cell.pattern]
            save_file({"rows": torch.cat(list(bed.calibration(cell.seed).values()))}, rows)
            script = HERE / "llm_compressor.py"
            cost = called(PYTHON, script, bed.root / bed.name, rows, LLMCOMPRESSOR[cell.method], str(sparsity), pattern, out)
            prefixes = {bed.checkpoint.block_prefix(index): index for index in range(bed.checkpoint.architecture.depth)}
            named = {(p, name.removeprefix(p)): tensor for name, tensor in load_file(out).items() for p in prefixes if name.startswith(p)}
            blocks = {i: bed.checkpoint.block(i) | {name: t for (q, name), t in named.items() if q == p} for p, i in prefixes.items()}
        else:
            cost = called(sys.executable, "-m", "benchmarks.rivals", "one", *map(str, astuple(cell)), out)
            blocks = {}
            for name, tensor in load_file(out).items():
                index, _, inner = name.partition("/")
                blocks.setdefault(int(index), {})[inner] = tensor
    return blocks, {key: round(value, 3) if isinstance(value, float) else value for key, value in cost.items()}


class Harness(Bench):
    """A testbed that evaluates what other processes prune."""

    def run_cell(self, cell: Cell) -> list[Record]:
        blocks, cost = pruned(self.bed, cell)
        ppl = self.perplexities(blocks, TEXTS)
        return [{**asdict(cell), "text": text, "ppl": ppl[text], "dense": self.dense[text], **cost, "commit": commit()} for text in TEXTS]


def closes(known: dict[Any, Record], cell: Cell, text: str) -> float | None:
    """Percent of the gap between our SparseGPT and dense; None where something is missing."""
    base, new = (known.get((cell.testbed, cell.pattern, method, cell.seed, text)) for method in ("sparsegpt", cell.method))
    return None if base is None or new is None else 100 * gap(base["ppl"], new["ppl"], new["dense"])


def index(records: list[Record]) -> dict[Any, Record]:
    return {(r["testbed"], r["pattern"], r["method"], r["seed"], r["text"]): r for r in records}


def table(records: list[Record], text: str) -> str:
    """Markdown: perplexity, geometric mean of the seeds, and in brackets percent of the gap between SparseGPT and dense (paired by seed, mean; least)."""
    known = index(records)
    columns = [(testbed, pattern) for testbed in NAMES for pattern in JUDGED]
    lines = [f"| {text} | {' | '.join(f'{t} {p}' for t, p in columns)} | mean |", "|---" * (len(columns) + 2) + "|"]
    for method in (*METHODS, *REFERENCES):
        line, means = [], []
        for testbed, pattern in columns:
            found = [known[key] for seed in range(3) if (key := (testbed, pattern, method, seed, text)) in known]
            shares = [share for r in found if (share := closes(known, Cell(testbed, pattern, method, r["seed"]), text)) is not None]
            shown = f"{exp(stats.mean(log(r['ppl']) for r in found)):.2f}" if found else ""
            if shares and method != "sparsegpt":
                means.append(stats.mean(shares))
                shown += f" ({means[-1]:.1f}%; {min(shares):.1f})"
            line.append(shown)
        lines.append(f"| {method} | {' | '.join(line)} | {f'{stats.mean(means):.1f}%' if means else ''} |")
    return "\n".join(lines)


def agreement(records: list[Record]) -> str:
    """Markdown: log-perplexity of llm-compressor's against that of ours, mean of the seeds, in percent."""
    known = index(records)
    lines = [f"| ln ppl, theirs against ours, test | {' | '.join(f'{t} {p}' for t in NAMES for p in JUDGED)} |", "|---" * 9 + "|"]
    for method, own in LLMCOMPRESSOR.items():
        line = []
        for testbed, pattern in ((t, p) for t in NAMES for p in JUDGED):
            pairs = [(known.get((testbed, pattern, name, seed, "test")) for name in (method, own)) for seed in range(3)]
            apart = [100 * (log(a["ppl"]) / log(b["ppl"]) - 1) for a, b in pairs if a and b]
            line.append(f"{stats.mean(apart):+.2f}%" if apart else "")
        lines.append(f"| {method} | {' | '.join(line)} |")
    return "\n".join(lines)


def costs(records: list[Record], key: str = "median") -> str:
    """Markdown: wall seconds, CPU seconds and peak of each method over llm-compressor's SparseGPT on the same testbed, pattern and seed; medians, and the largest."""
    lines = ["| over llm-compressor's SparseGPT | wall, median (largest) | CPU | peak memory |", "|---|---|---|---|"]
    known = {(r["testbed"], r["pattern"], r["method"], r["seed"]): r for r in records if r["text"] in ("test", None)}
    for method in METHODS:
        line = []
        for field in ("wall_s", "cpu_s", "peak_rss_bytes"):
            ratios = [
                r[field] / known[base][field]
                for (t, p, m, s), r in known.items()
                if m == method and (base := (t, p, "llm-compressor sparsegpt", s)) in known
            ]
            line.append(f"{stats.median(ratios):.2f} ({max(ratios):.2f})" if ratios else "")
        lines.append(f"| {method} | {' | '.join(line)} |")
    return "\n".join(lines)


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("one", hidden=True)
@click.argument("testbed")
@click.argument("pattern")
@click.argument("method")
@click.argument("seed", type=int)
@click.argument("out", type=click.Path(path_type=Path))
def run_one(testbed: str, pattern: str, method: str, seed: int, out: Path) -> None:
    """One of our methods in this process; prints its cost."""
    click.echo(json.dumps(one(Cell(testbed, pattern, method, seed), out)))


@main.command("cells")
@click.option("--testbed", type=click.Choice(NAMES), help="Only this one.")
@click.option("--method", type=click.Choice((*METHODS, *REFERENCES)), help="Only this one.")
def run_cells(testbed: str | None, method: str | None) -> None:
    """Every cell that is not there yet; then the tables."""
    harness = {name: Harness(Testbed(name)) for name in NAMES}
    asked = (cell for cell in cells() if testbed in (None, cell.testbed) and method in (None, cell.method))
    finish_cells(
        asked, lambda cell: harness[cell.testbed].run_cell(cell), lambda found: ", ".join(f"{r['text']} {r['ppl']:.3f}" for r in found)
    )
    write_json(RESULTS, gather(RESULTS, list(cells())))
    show_tables()


def show_tables() -> None:
    records = recorded(RESULTS)
    for text in TEXTS:
        click.echo(table(records, text) + "\n")
    click.echo(agreement(records) + "\n")
    click.echo(costs(records) + "\n")
    if repeated := recorded(COST):
        click.echo("quiet machine:\n" + costs(repeated))


@main.command("table")
def show() -> None:
    """The tables of the recorded results."""
    show_tables()


@main.command()
@click.option("--repeats", default=3, show_default=True)
def cost(repeats: int) -> None:
    """Cost again, on a quiet machine with all threads: 60% and 2:4, seed 0, several times, methods in turn."""
    results = recorded(COST)
    for repeat in range(repeats):
        for cell in (Cell(testbed, pattern, method, 0) for testbed in NAMES for pattern in ("60%", "2:4") for method in METHODS):
            key = asdict(cell) | {"seed": repeat, "text": None}
            if not any(all(r[name] == value for name, value in key.items()) for r in results):
                results.append(key | pruned(Testbed(cell.testbed), cell)[1] | {"commit": commit()})
                click.echo(results[-1])
                write_json(COST, results)
    click.echo(costs(results))


@main.command()
@click.option("--count", default=3, show_default=True)
@click.option("--seed", type=int, help="Which cells; random without.")
def verify(count: int, seed: int | None) -> None:
    """Recompute random cells of the recorded results."""
    recompute(RESULTS, Cell, lambda cell: Harness(Testbed(cell.testbed)).run_cell(cell), ("dense", "ppl"), count, seed)


if __name__ == "__main__":
    main()
