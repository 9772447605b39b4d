"""Our presets against other one-shot pruners, in one harness: ``python -m benchmarks.rivals cells|table|rows|cost|block|profile|verify``.

A cell prunes a testbed with one method in a process of its own. Its cost runs from model in memory to pruned (imports excluded; what a method
needs of sensitivity, calibration and curves included), its memory is the peak above what was there before. Perplexity is taken here, of all
methods alike. llm-compressor runs in an environment of its own (``make rivals-environment``) on the same token ids. `best` is
params.yaml's variant `sparseline`; `fast` and the baselines are the variants of those names. One file per finished cell.
"""

import functools
import json
import os
import shutil
import statistics as stats
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, field, replace
from math import exp, log
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import dsnot
from benchmarks.induction import PATTERNS, Bench, Statistics, calibrate, gap
from benchmarks.reconstruction import large_block
from benchmarks.records import Record, cell_file, commit, finish_cells, gather, recompute, recorded
from benchmarks.sparsity import Lab
from benchmarks.testbed import CODE, LENGTH, NAMES, ROOT, Testbed, inputs
from pipeline_lib.core import params
from pipeline_lib.core.artifacts import write_json
from pipeline_lib.core.runtime import generator
from pipeline_lib.planning.estimate import measure_speed
from pipeline_lib.prune.prune import PruneParams
from pipeline_lib.texts.rows import split

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "rivals.json"
BY_ROWS = HERE / "results" / "rivals_rows.json"
BLOCK = HERE / "results" / "rivals_block.json"
COST = HERE / "results" / "rivals_cost.json"
TEXTS = ("validation", "test", "wikitext2")
ROW_TEXTS = ("validation", "test")  # how many rows is chosen on validation text
TEXTS_OF = {"mix.calib": "calibration", CODE: "code"}
JUDGED = ("50%", "60%", "70%", "2:4")
LLMCOMPRESSOR = {f"llm-compressor {name}": name for name in ("sparsegpt", "wanda")}


@dataclass(frozen=True)
class Method:
    """A variant of params.yaml (none for llm-compressor's), what is laid over it, and on how much of which text."""

    variant: str
    changes: dict[str, Any] = field(default_factory=dict)
    rows: int = 128
    source: str = "mix.calib"


MAIN = {name: Method({"best": "sparseline"}.get(name, name)) for name in ("magnitude", "wanda", "sparsegpt", "fast", "best")}
UNIFORM = {"allocation": {"method": "uniform"}}
REFERENCES = {  # SparseGPT under others' cheap allocations; Wanda with others' swaps (benchmarks/dsnot.py)
    "dsnot": Method("wanda"),
    "owl": Method("sparsegpt", {"allocation": {"method": "owl", "alpha": 0.08}}),
    "dlp": Method("sparsegpt", {"allocation": {"method": "dlp", "alpha": 0.15}}),
}
PARTS = {  # what each part adds: one taken away from `best`, or another in its place
    "best, uniform": Method("sparseline", UNIFORM),
    "best, sweep's mask and weights": Method(
        "sparseline", {"reconstruction": {"steps": ["obs", "block"], "collect": "block", "towards_dense": 0.0}}
    ),
    "best, sweep's mask": Method("sparseline", {"reconstruction": {"lsq": {"mask_iterations": 0}}}),
    "best, pruned stream": Method("sparseline", {"reconstruction": {"collect": "block", "towards_dense": 0.0}}),
    "best, dense stream": Method("sparseline", {"reconstruction": {"towards_dense": 1.0}}),
    "best, masks not refreshed": Method("sparseline", {"reconstruction": {"block": {"refresh_epochs": 0}}}),
    "best, no gradients": Method("sparseline", {"reconstruction": {"steps": ["obs", "lsq"]}}),
    "best, channel instead of block": Method("sparseline", {"reconstruction": {"steps": ["obs", "lsq", "channel"]}}),
    "best, ISC": Method("sparseline", {"selection": {"score": "isc"}}),
    "best, 2 epochs": Method("sparseline", {"reconstruction": {"block": {"epochs": 2, "refresh_epochs": 1}}}),
    "best, 4 epochs": Method("sparseline", {"reconstruction": {"block": {"epochs": 4}}}),
    "best, 16 epochs": Method("sparseline", {"reconstruction": {"block": {"epochs": 16}}}),
    "best, windows of 2": Method("sparseline", {"reconstruction": {"block": {"window": 2}}}),
    "fast, uniform": Method("fast", UNIFORM),
    "fast, sweep's mask": Method("fast", {"reconstruction": {"lsq": {"mask_iterations": 0}}}),
}
GROWING = ("sparsegpt", "fast", "best")  # what more text does, or another one
COUNTS = (16, 32, 64, 128, 256, 512)
ROWS = {f"{name}, {rows} rows": replace(MAIN[name], rows=rows) for rows in COUNTS for name in GROWING}
TEXT = {f"{name}, {source}": replace(MAIN[name], source=source) for source in (CODE, "random tokens") for name in GROWING}
METHODS = (*MAIN, *LLMCOMPRESSOR)
OTHERS = REFERENCES | PARTS | TEXT  # one seed
LARGE = "llama-7b-block"  # one random block of that shape, in place of a testbed
PYTHON = os.environ.get("SPARSELINE_RIVALS", str(HERE.parent / ".rivals" / "bin" / "python"))


@dataclass(frozen=True)
class Cell:
    testbed: str
    pattern: str
    method: str
    seed: int

    @property
    def how(self) -> Method:
        return (MAIN | OTHERS | ROWS).get(self.method, Method(""))

    def prune(self) -> PruneParams:
        """Our own methods' parameters; where N:M is asked for, every matrix is N:M, as hardware wants it."""
        sparsity, pattern = PATTERNS[self.pattern]
        changed = params.merge(params.merged("prune", f"variants.{self.how.variant}"), self.how.changes)
        changed = params.merge(changed, {"selection": {"sparsity": sparsity, "pattern": pattern}})
        changed = params.merge(changed, UNIFORM if pattern != "unstructured" else {})
        return PruneParams.model_validate({key: changed[key] for key in PruneParams.model_fields})

    def calibration(self, bed: Testbed) -> dict[str, torch.Tensor]:
        """``fit`` and ``held_out`` rows."""
        if self.testbed == LARGE:
            return split(torch.randint(bed.checkpoint.config.vocab_size, (32, 256), generator=generator(self.seed, LARGE)), 0.25)
        if self.how.source in TEXTS_OF:
            return split(bed.rows(TEXTS_OF[self.how.source], self.seed, self.how.rows), 0.25)
        random = generator(self.seed, "random tokens")
        return split(torch.randint(bed.checkpoint.config.vocab_size, (self.how.rows, LENGTH), generator=random), 0.25)

    def file(self) -> Path:
        if self.method in LLMCOMPRESSOR:
            how: Any = LLMCOMPRESSOR[self.method]
        else:
            how = [params.section(name) for name in ("calibrate", "sensitivity", "curves")] + [self.prune().model_dump(mode="json")]
            how += [] if self.method in MAIN else [self.how.rows, self.how.source]
        name = "-".join(map(str, astuple(self))).replace(", ", "-").replace(" ", "_").replace("'", "")
        kind, judging = ("rows", ROW_TEXTS) if self.method in ROWS else ("rivals", TEXTS)
        return cell_file(f"{kind}-{name}", how, inputs(self.testbed, judging))


def cells() -> Iterator[Cell]:
    """Seed by seed; then what has one seed."""
    for seed in range(3):
        for testbed in NAMES:
            yield from (Cell(testbed, pattern, method, seed) for pattern in JUDGED for method in METHODS)
    for testbed in NAMES:
        yield from (Cell(testbed, pattern, method, 0) for pattern in ("50%", "60%", "70%") for method in REFERENCES)
        yield from (Cell(testbed, "60%", method, 0) for method in (*PARTS, *TEXT))


def resident(name: str) -> int:
    """VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


class Fresh(Lab):
    """A testbed whose statistics are taken when they are asked for, so that a method pays for what it needs alone."""

    def calibrated(self, rows: dict[str, torch.Tensor]) -> "Fresh":
        self.rows, self.known, self.calibrate_s = rows, {}, 0.0
        return self

    def forget(self) -> None:
        """What allocation alone needed, as stage prune never has it."""
        self.known = {}
        self.__dict__.pop("statistics", None)

    @functools.cached_property
    def statistics(self) -> Statistics:  # type: ignore[override]
        return calibrate(self.bed, self.rows)


def one(bed: Testbed, cell: Cell, out: Path) -> dict[str, Any]:
    """Prune as the cell says, in this process: its cost; the blocks go to a directory."""
    settings = cell.prune()
    lab = Fresh(bed).calibrated(cell.calibration(bed))
    bed.stream()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts anew
    cpu, started = time.process_time(), time.perf_counter()
    if cell.method == "dsnot":
        blocks = dsnot.prune(bed, torch.cat(list(lab.rows.values())), bed.uniform(settings.selection.sparsity))
    else:
        kept, _ = lab.allocated(settings)
        lab.forget()
        blocks = ((index, block.tensors) for index, block in lab.blocks(settings, kept))
    for index, tensors in blocks:  # each is written as it comes, as stage prune does
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / f"{index}.safetensors")
    cost = {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu, "peak_rss_bytes": resident("VmHWM") - before}
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
        out = Path(folder) / "pruned"
        out.mkdir()
        if cell.method in LLMCOMPRESSOR:
            if not Path(PYTHON).exists():
                raise click.ClickException(
                    f"no llm-compressor at {PYTHON}; run `make rivals-environment`, or set SPARSELINE_RIVALS to its Python."
                )
            rows, (sparsity, pattern) = Path(folder) / "rows.safetensors", PATTERNS[cell.pattern]
            save_file({"rows": torch.cat(list(cell.calibration(bed).values()))}, rows)
            script = HERE / "llm_compressor.py"
            cost = called(
                PYTHON, script, bed.root / bed.name, rows, LLMCOMPRESSOR[cell.method], str(sparsity), pattern, out / "all.safetensors"
            )
            prefixes = {bed.checkpoint.block_prefix(index): index for index in range(bed.checkpoint.architecture.depth)}
            named = {
                (p, name.removeprefix(p)): tensor
                for name, tensor in load_file(out / "all.safetensors").items()
                for p in prefixes
                if name.startswith(p)
            }
            blocks = {i: bed.checkpoint.block(i) | {name: t for (q, name), t in named.items() if q == p} for p, i in prefixes.items()}
        else:
            cost = called(sys.executable, "-m", "benchmarks.rivals", "one", *map(str, astuple(cell)), bed.root, out)
            blocks = {int(file.stem): load_file(file) for file in out.iterdir()}
    return blocks, {key: round(value, 3) if isinstance(value, float) else value for key, value in cost.items()}


class Harness(Bench):
    """A testbed that evaluates what other processes prune."""

    def run_cell(self, cell: Cell, texts: tuple[str, ...] = TEXTS) -> list[Record]:
        blocks, cost = pruned(self.bed, cell)
        ppl = self.perplexities(blocks, texts)
        told = {"rows": cell.how.rows, **cost, "commit": commit()}
        return [{**asdict(cell), "text": text, "ppl": ppl[text], "dense": self.dense[text], **told} for text in texts]


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


def parts(records: list[Record]) -> str:
    """Markdown: presets with parts taken away or changed, 60%, one seed: test perplexity, percent of the gap closed on test and WikiText-2, CPU seconds."""
    known = index(records)
    heads = [f"{testbed}, test | closed: test, wikitext2 | CPU s" for testbed in NAMES]
    lines = [f"| 60%, seed 0 | {' | '.join(heads)} |", "|---" * (1 + 3 * len(NAMES)) + "|"]
    for preset in ("best", "fast"):
        for method in (preset, *(name for name in PARTS if name.startswith(preset))):
            line = []
            for testbed in NAMES:
                found = known.get((testbed, "60%", method, 0, "test"))
                shares = [closes(known, Cell(testbed, "60%", method, 0), text) for text in ("test", "wikitext2")]
                shown = ", ".join(f"{share:.1f}%" for share in shares if share is not None)
                line += [f"{found['ppl']:.2f}", shown, f"{found['cpu_s']:.0f}"] if found else [""] * 3
            lines.append(f"| {method} | {' | '.join(line)} |")
    return "\n".join(lines)


def texts(records: list[Record]) -> str:
    """Markdown: test perplexity at 60% by calibration text, one seed; in brackets the gap closed against SparseGPT on the same text; CPU seconds."""
    suffixes = {"128 rows of mix.calib": ""} | {f"128 rows of {source}": f", {source}" for source in (CODE, "random tokens")}
    return _by_text(index(records), suffixes, "test", (0,))


def by_rows(records: list[Record], text: str, seeds: tuple[int, ...]) -> str:
    """Markdown: the same by how many rows of it, on one text; geometric means of the seeds, and the mean of the gaps that they close."""
    return _by_text(index(records), {f"{count} rows of mix.calib": f", {count} rows" for count in COUNTS}, text, seeds)


def _by_text(known: dict[Any, Record], suffixes: dict[str, str], text: str, seeds: tuple[int, ...]) -> str:
    columns = [(testbed, name) for testbed in NAMES for name in GROWING]
    head = f"60%, {text}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    lines = [f"| {head} | {' | '.join(f'{t}, {name}' for t, name in columns)} |", "|---" * (1 + len(columns)) + "|"]
    for called, suffix in suffixes.items():
        line = []
        for testbed, name in columns:
            pairs = [[known.get((testbed, "60%", method + suffix, seed, text)) for method in ("sparsegpt", name)] for seed in seeds]
            found = [new for _, new in pairs if new]
            shares = [100 * gap(base["ppl"], new["ppl"], new["dense"]) for base, new in pairs if base and new]
            closed = f" ({stats.mean(shares):.1f}%)" if shares and name != "sparsegpt" else ""
            ppl = f"{exp(stats.mean(log(r['ppl']) for r in found)):.2f}" if found else ""
            line.append(f"{ppl}{closed}, {stats.median(r['cpu_s'] for r in found):.0f} s" if found else "")
        if any(line):
            lines.append(f"| {called} | {' | '.join(line)} |")
    return "\n".join(lines)


def agreement(records: list[Record]) -> str:
    """Markdown: log-perplexity of llm-compressor's against that of ours, mean of the seeds, in percent."""
    known = index(records)
    lines = [f"| ln ppl, theirs against ours, test | {' | '.join(f'{t} {p}' for t in NAMES for p in JUDGED)} |", "|---" * 9 + "|"]
    for method, own in LLMCOMPRESSOR.items():
        line = []
        for testbed, pattern in ((t, p) for t in NAMES for p in JUDGED):
            pairs = [tuple(known.get((testbed, pattern, name, seed, "test")) for name in (method, own)) for seed in range(3)]
            apart = [100 * (log(a["ppl"]) / log(b["ppl"]) - 1) for a, b in pairs if a and b]
            line.append(f"{stats.mean(apart):+.2f}%" if apart else "")
        lines.append(f"| {method} | {' | '.join(line)} |")
    return "\n".join(lines)


def costs(records: list[Record]) -> str:
    """Markdown: wall seconds, CPU seconds and peak of each method over llm-compressor's SparseGPT on the same testbed, pattern and seed; medians, and the largest."""
    lines = ["| over llm-compressor's SparseGPT | wall, median (largest) | CPU | peak memory |", "|---|---|---|---|"]
    known = {(r["testbed"], r["pattern"], r["method"], r["seed"]): r for r in records if r["text"] in ("test", None)}
    for method in METHODS:
        line = []
        for key in ("wall_s", "cpu_s", "peak_rss_bytes"):
            ratios = [
                r[key] / known[base][key]
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
@click.argument("root", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def run_one(testbed: str, pattern: str, method: str, seed: int, root: Path, out: Path) -> None:
    """One of our methods in this process; prints its cost."""
    computed = torch.bfloat16 if testbed == LARGE else torch.float32  # as llm-compressor does: in the checkpoint's own
    click.echo(json.dumps(one(Testbed(testbed, root, computed), Cell(testbed, pattern, method, seed), out)))


@main.command("cells")
@click.option("--testbed", type=click.Choice(NAMES), help="Only this one.")
@click.option("--method", type=click.Choice((*METHODS, *OTHERS)), help="Only this one.")
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
    for made in (agreement, parts, texts):
        click.echo(made(records) + "\n")
    click.echo(costs(records) + "\n")
    if repeated := recorded(COST):
        click.echo("quiet machine:\n" + costs(repeated))


@main.command("table")
def show() -> None:
    """The tables of the recorded results."""
    show_tables()


@main.command("rows")
@click.option("--seed", "seeds", type=click.IntRange(0, 2), multiple=True, default=(0,), show_default=True)
@click.option("--count", "counts", type=click.Choice(tuple(map(str, COUNTS))), multiple=True, help="Only so many rows.")
def run_rows(seeds: tuple[int, ...], counts: tuple[str, ...]) -> None:
    """SparseGPT, `fast` and `best` on 16 to 512 calibration rows, 60%: every cell that is not there yet; then the tables."""
    harness = {name: Harness(Testbed(name)) for name in NAMES}
    every = [Cell(testbed, "60%", method, seed) for seed in range(3) for method in ROWS for testbed in NAMES]
    asked = (cell for cell in every if cell.seed in seeds and str(cell.how.rows) in (counts or map(str, COUNTS)))
    finish_cells(
        asked,
        lambda cell: harness[cell.testbed].run_cell(cell, ROW_TEXTS),
        lambda found: ", ".join(f"{r['text']} {r['ppl']:.3f}" for r in found),
    )
    records = gather(BY_ROWS, every)
    write_json(BY_ROWS, records)
    for text in ROW_TEXTS:
        click.echo("\n" + by_rows(records, text, seeds))


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
@click.option("--width", default=4096, show_default=True)
@click.option("--inner", default=11008, show_default=True)
@click.option("--held", is_flag=True, help="Freed memory goes back to the system at once: the peak is what is held, and time suffers.")
@click.option("--method", "methods", multiple=True, default=["llm-compressor sparsegpt", "sparsegpt", "fast", "best"], show_default=True)
def block(width: int, inner: int, held: bool, methods: tuple[str, ...]) -> None:
    """Cost on one random LLaMA-7B-shaped block, forward passes in its own bfloat16, 32 rows of 256 tokens, 60%."""
    allocator = "at once" if held else "default"
    if held:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "1048576"
    results = recorded(BLOCK)
    with tempfile.TemporaryDirectory() as folder:
        large_block(Path(folder) / LARGE, width, inner)
        for file in (ROOT / "llama").glob("tokenizer*"):  # llm-compressor wants one, though it is given token ids
            shutil.copy(file, Path(folder) / LARGE)
        for method in methods:
            if all((r["method"], r["frees"]) != (method, allocator) for r in results):
                cell = Cell(LARGE, "60%", method, 0)
                taken = pruned(Testbed(LARGE, Path(folder)), cell)[1]
                results.append(asdict(cell) | {"text": None, "frees": allocator} | taken | {"commit": commit()})
                click.echo(results[-1])
                write_json(BLOCK, results)
    for frees in ("default", "at once"):
        click.echo(f"\nfreed memory: {frees}\n{costs([r for r in results if r['frees'] == frees])}")


class Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products and attention (torch's own mode hooks into autograd, which refuses leaves)."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        counts = flop_registry.get(getattr(torch.ops.aten, func._opname.removesuffix("_"), None))
        self.flops += counts(*args, **(kwargs or {}), out_val=out) if counts else 0
        return out


@main.command()
@click.argument("testbed", type=click.Choice(NAMES))
@click.argument("method", type=click.Choice((*MAIN, *OTHERS, *ROWS)))
@click.option("--pattern", type=click.Choice(JUDGED), default="60%", show_default=True)
@click.option("--lines", default=12, show_default=True)
def profile(testbed: str, method: str, pattern: str, lines: int) -> None:
    """What a cell's time goes to: operators by their own CPU seconds, and the floor that its products set on this machine."""
    bed, cell = Testbed(testbed), Cell(testbed, pattern, method, 0)
    with tempfile.TemporaryDirectory() as folder:
        taken = one(bed, cell, Path(folder))
        with Products() as counted:
            one(bed, cell, Path(folder))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            one(bed, cell, Path(folder))
    speed, flops = measure_speed(torch.device("cpu")), counted.flops
    click.echo(f"{taken['wall_s']:.1f} s on {taken['threads']} threads, {taken['cpu_s']:.1f} CPU s, {taken['peak_rss_bytes'] / 1e6:.0f} MB")
    click.echo(f"{flops / 1e12:.2f} TFLOP of products at {speed / 1e9:.0f} GFLOP/s: at least {flops / speed:.1f} s")
    operators = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in operators)
    for event in operators[:lines]:
        click.echo(f"{event.self_cpu_time_total / whole:7.1%} {event.count:8d} times  {event.key}")


@main.command()
@click.option("--count", default=3, show_default=True)
@click.option("--seed", type=int, help="Which cells; random without.")
def verify(count: int, seed: int | None) -> None:
    """Recompute random cells of the recorded results."""
    recompute(RESULTS, Cell, lambda cell: Harness(Testbed(cell.testbed)).run_cell(cell), ("dense", "ppl"), count, seed)


if __name__ == "__main__":
    main()
