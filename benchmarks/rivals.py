"""Our presets against other one-shot pruners, and what they cost: ``python -m benchmarks.studies
run rivals|rivals_rows|rivals_cost``.

A cell prunes a testbed with one method in a process of its own. Its cost runs from model in memory
to pruned. Imports are excluded; the sensitivities, statistics and curves that a method needs are
included. Its memory is the peak above the level before. Perplexity is measured here, in the same
way for all methods. llm-compressor runs in an environment of its own (``make rivals-environment``)
on the same token ids.
"""

import json
import os
import statistics as stats
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file

from benchmarks.alone import resident
from benchmarks.floor import least
from benchmarks.harness import (
    EIGHT_EPOCHS,
    PATTERNS,
    ROOT,
    TEXTS,
    UNIFORM,
    Cell,
    Record,
    Study,
    lab,
    selection,
)
from benchmarks.lab import Changes, Kept, Lab
from benchmarks.testbed import CODE, MIXTURE, NAMES, RANDOM, Bed, Tensors, Testbed
from pipeline_lib.core import settings
from pipeline_lib.core.params import merge
from pipeline_lib.masks.select import select
from pipeline_lib.prune.collect import collect
from pipeline_lib.stats.lanes import deal
from pipeline_lib.stats.moments import Moments

PYTHON = os.environ.get("SPARSELINE_RIVALS", str(ROOT / ".rivals" / "bin" / "python"))
JUDGED = ("50%", "60%", "70%", "2:4")
LLMCOMPRESSOR = {f"llm-compressor {name}": name for name in ("sparsegpt", "wanda")}
CYCLES = 50  # DSnoT: swaps per row at most, the authors' default


@dataclass(frozen=True)
class Method:
    """A variant of params.yaml (none for llm-compressor's), the changes to it, and its calibration
    text.
    """

    variant: str | None
    changes: Changes = field(default_factory=dict)
    rows: int = 128
    source: str = MIXTURE


BLOCKWISE = {"statistics": "per_block", "dense_target": 0.0}
# The `fast` of these records is version 1's preset. Today's is "best, no gradients".
VERSION_1 = {"allocation": {"method": "weight", "alpha": 0.15}, "reconstruction": BLOCKWISE}
MAIN = {
    name: Method(name, {"fast": VERSION_1, "best": EIGHT_EPOCHS}.get(name, {}))
    for name in ("magnitude", "wanda", "sparsegpt", "fast", "best")
}
THEIRS = {name: Method(None) for name in LLMCOMPRESSOR}
REFERENCES = {  # Wanda with others' swaps; SparseGPT with others' cheap allocations
    "dsnot": Method("wanda"),
    "owl": Method("sparsegpt", {"allocation": {"method": "owl", "alpha": 0.08}}),
    "dlp": Method("sparsegpt", {"allocation": {"method": "dlp", "alpha": 0.15}}),
}


def _best(name: str, changes: Changes) -> dict[str, Method]:
    return {f"best, {name}": Method("best", merge(EIGHT_EPOCHS, changes))}


PARTS = {  # what each part adds: a preset without it, or with another in its place
    **_best("uniform", UNIFORM),
    **_best("sweep's mask and weights", {"reconstruction": {"steps": ["obs", "finetune"], **BLOCKWISE}}),
    **_best("sweep's mask", {"reconstruction": {"lsq": {"mask_iterations": 0}}}),
    **_best("pruned stream", {"reconstruction": BLOCKWISE}),
    **_best("dense stream", {"reconstruction": {"dense_target": 1.0}}),
    **_best("masks not refreshed", {"reconstruction": {"finetune": {"refresh_epochs": 0}}}),
    **_best("no gradients", {"reconstruction": {"steps": ["obs", "lsq"]}}),
    **_best("channel instead of block", {"reconstruction": {"steps": ["obs", "lsq", "finetune_channels"]}}),
    **_best("ISC", {"selection": {"score": "isc"}}),
    **_best("2 epochs", {"reconstruction": {"finetune": {"epochs": 2, "refresh_epochs": 1}}}),
    **_best("4 epochs", {"reconstruction": {"finetune": {"epochs": 4}}}),
    **_best("16 epochs", {"reconstruction": {"finetune": {"epochs": 16}}}),
    **_best("windows of 2", {"reconstruction": {"finetune": {"window": 2}}}),
    "fast, uniform": Method("fast", merge(VERSION_1, UNIFORM)),
    "fast, search in float32": Method(
        "fast", merge(VERSION_1, {"reconstruction": {"lsq": {"mask_dtype": "float32"}}})
    ),
    "fast, sweep's mask": Method(
        "fast", merge(VERSION_1, {"reconstruction": {"lsq": {"mask_iterations": 0}}})
    ),
}
GROWING = ("sparsegpt", "fast", "best")  # the methods for which the amount or the kind of text changes
TEXT = {
    f"{name}, {source}": replace(MAIN[name], source=source) for source in (CODE, RANDOM) for name in GROWING
}
COUNTS = (16, 32, 64, 128, 256, 512)
ROWS = {f"{name}, {rows} rows": replace(MAIN[name], rows=rows) for rows in COUNTS for name in GROWING}
FLOOR = {"floor": Method("sparsegpt")}  # prunes nothing: `benchmarks.floor`
COSTS = FLOOR | MAIN | THEIRS
METHODS = COSTS | REFERENCES | PARTS | TEXT | ROWS


def cell(testbed: str, pattern: str, method: str, seed: int) -> Cell:
    """The cell of a method. N:M is N:M in every matrix, as hardware needs it."""
    how, key = METHODS[method], {"testbed": testbed, "pattern": pattern, "method": method, "seed": seed}
    if how.variant is None:
        return Cell(key, {}, rows=how.rows, source=how.source)
    changes = merge(
        merge(how.changes, selection(pattern)), UNIFORM if PATTERNS[pattern][1] != "unstructured" else {}
    )
    return Cell(key, {"ppl": changes}, how.variant, how.rows, how.source)


def cells() -> Iterator[Cell]:
    for seed in range(3):
        for testbed in NAMES:
            yield from (
                cell(testbed, pattern, method, seed) for pattern in JUDGED for method in MAIN | THEIRS
            )
    for testbed in NAMES:
        yield from (
            cell(testbed, pattern, method, 0) for pattern in ("50%", "60%", "70%") for method in REFERENCES
        )
        yield from (cell(testbed, "60%", method, 0) for method in (*PARTS, *TEXT))


def cells_by_rows() -> Iterator[Cell]:
    for seed in range(3):
        yield from (cell(testbed, "60%", method, seed) for method in ROWS for testbed in NAMES)


def cells_of_cost() -> Iterator[Cell]:
    """The seed counts the repeats; the calibration rows are always seed 0's."""
    for repeat in range(3):
        for testbed in NAMES:
            yield from (
                cell(testbed, pattern, method, repeat) for pattern in ("60%", "2:4") for method in COSTS
            )


def dsnot(here: Lab, kept: Kept) -> Iterator[tuple[int, Mapping[str, torch.Tensor]]]:
    """A reference like DSnoT (2310.08915), from the paper's formulas: Wanda's mask, then weights
    swapped within rows; block by block.
    """
    model, entry = here.bed.stream(), here.bed.checkpoint.architecture
    rows = torch.cat([here.rows["fit"], here.rows["held_out"]])
    dealt = deal(len(rows), 4)
    stream = model.embed(rows, dealt.sizes)
    for index in range(entry.depth):
        tensors = {name: tensor.float() for name, tensor in here.bed.checkpoint.block(index).items()}
        moments = collect(
            model,
            (index, model.block(index)),
            stream.hidden,
            dealt.lanes,
            [site.name for site in entry.layouts[index].sites],
        )
        for matrix in entry.layouts[index].matrices:
            weight, found = matrix.view(tensors[matrix.parameter]), moments[matrix.site]
            mask = select(weight.abs() * found.gram.diagonal().sqrt(), kept[index, matrix], "row", 0)
            weight.masked_fill_(~_swapped(weight, mask, found), 0)
        model.advance(model.block(index, tensors), index, stream)
        yield index, tensors


def _swapped(weight: torch.Tensor, mask: torch.Tensor, moments: Moments) -> torch.Tensor:
    """The mask after swaps within rows. Per row, ε = E[(W − W⊙M) x] = Σ_pruned w_i μ_i. A swap
    grows the pruned weight that lowers ε most relative to its input's variance, by sign(ε)·w_i μ_i
    / Var x_i. It prunes the kept weight with the least |w|·‖x‖ among those whose loss moves ε the
    other way. A row stops when no swap lowers |ε|.
    """
    diagonal, mask = moments.gram.diagonal(), mask.clone()
    variance = (diagonal - moments.mean.square()).clamp_min(1e-12)
    share, wanda = weight * moments.mean, weight.abs() * diagonal.sqrt()
    error = share.masked_fill(mask, 0).sum(1)
    rows, going = torch.arange(len(weight)), torch.ones(len(weight), dtype=torch.bool)
    for _ in range(CYCLES):
        towards = error.sign()[:, None] * share
        grown = (towards / variance).masked_fill(mask, -torch.inf).argmax(1)
        pruned = wanda.masked_fill(~mask | (towards >= 0), torch.inf).argmin(1)
        after = error - share[rows, grown] + share[rows, pruned]
        going &= (after.abs() < error.abs()) & ~mask[rows, grown] & mask[rows, pruned]
        if not going.any():
            break
        mask[rows[going], grown[going]] = True
        mask[rows[going], pruned[going]] = False
        error = torch.where(going, after, error)
    return mask


def one(asked: Cell, seed: int, out: Path) -> Record:
    """Prune by a cell's recipe in this process, write the blocks to a directory, and return the
    cost.
    """
    here = Lab(Testbed(asked.key["testbed"])).at(asked.source, asked.rows, seed, asked.training)
    how = asked.recipe("ppl")
    assert how is not None
    if asked.key["method"] in FLOOR:
        told = least(here)
        told["peak_rss_bytes"] = told.pop("peak_bytes")
        return told | {"threads": torch.get_num_threads()}
    here.bed.stream()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts anew
    cpu, started = time.process_time(), time.perf_counter()
    kept, _ = here.allocated(how)
    here.forget()  # stage prune does not hold the measurements of the allocation either
    swapped = asked.key["method"] == "dsnot"
    blocks = (
        dsnot(here, kept) if swapped else ((index, block.tensors) for index, block in here.blocks(how, kept))
    )
    for index, tensors in blocks:  # each is written at once, as in stage prune
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, out / f"{index}.safetensors"
        )
    cost = {
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu,
        "peak_rss_bytes": resident("VmHWM") - before,
    }
    return cost | {"threads": torch.get_num_threads()}


def called(*command: str | Path, limit: float | None = None) -> Record:
    """The last line of JSON that another process prints. The process has as many threads as this
    one, and no GPU if this one uses none.

    Raises:
        TimeoutError: it took longer than ``limit`` seconds, and was stopped.
        click.ClickException: it printed none.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    if settings.device_name() == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=limit
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"stopped after {limit:g} s") from error
    told = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not told:
        raise click.ClickException(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    found: Record = json.loads(told[-1])
    return found


def compressed(
    bed: Bed, rows: torch.Tensor, how: tuple[str, float, str], folder: Path
) -> tuple[Tensors, Record]:
    """The blocks that llm-compressor prunes in a process of its own, and the cost.

    Args:
        rows: calibration rows [N, T].
        how: its method, share pruned, and pattern.
        folder: for temporary files.
    """
    if not Path(PYTHON).exists():
        raise click.ClickException(
            f"no llm-compressor at {PYTHON}; run `make rivals-environment`, or set SPARSELINE_RIVALS to its"
            " Python."
        )
    given, whole = folder / "rows.safetensors", folder / "all.safetensors"
    save_file({"rows": rows}, given)
    method, sparsity, pattern = how
    cost = called(
        PYTHON,
        ROOT / "benchmarks" / "llm_compressor.py",
        bed.path,
        given,
        method,
        str(sparsity),
        pattern,
        whole,
    )
    linears, blocks = load_file(whole), {}
    for index in range(bed.checkpoint.architecture.depth):
        prefix = bed.checkpoint.block_prefix(index)
        own = {
            name.removeprefix(prefix): tensor for name, tensor in linears.items() if name.startswith(prefix)
        }
        blocks[index] = bed.checkpoint.block(index) | own
    return blocks, cost


def apart(asked: Cell, seed: int) -> tuple[Tensors, Record]:
    """The blocks that a cell's method prunes in a process of its own, and the cost."""
    bed, method = lab(asked.key["testbed"]).bed, asked.key["method"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pruned"
        out.mkdir()
        blocks: Tensors
        if method in LLMCOMPRESSOR:
            rows = torch.cat(list(bed.calibration(asked.source, asked.rows, seed).values()))
            blocks, cost = compressed(
                bed, rows, (LLMCOMPRESSOR[method], *PATTERNS[asked.key["pattern"]]), out
            )
        else:
            key = (str(asked.key[name]) for name in ("testbed", "pattern", "method"))
            cost = called(sys.executable, "-m", "benchmarks.rivals", *key, str(seed), out)
            blocks = {int(file.stem): load_file(file) for file in out.iterdir()}
    return blocks, {
        key: round(value, 3) if isinstance(value, float) else value for key, value in cost.items()
    }


def judged(asked: Cell, texts: tuple[str, ...]) -> list[Record]:
    """Measure a cell: a record per text, with perplexity and cost."""
    bed = lab(asked.key["testbed"]).bed
    blocks, cost = apart(asked, asked.key["seed"])
    ppl = {text: bed.perplexity(blocks, text) for text in texts}
    return [
        {**asked.key, "text": text, "ppl": ppl[text], "dense": bed.dense(text), "rows": asked.rows, **cost}
        for text in texts
    ]


def costs(records: list[Record]) -> str:
    """Markdown table: costs relative to those of llm-compressor's SparseGPT on the same testbed,
    pattern and seed; medians, and the largest.
    """
    lines = [
        "| over llm-compressor's SparseGPT | wall, median (largest) | CPU | peak memory |",
        "|---|---|---|---|",
    ]
    known = {(r["testbed"], r["pattern"], r["method"], r["seed"]): r for r in records}
    for method in COSTS:
        own = [
            (r, known.get((t, p, "llm-compressor sparsegpt", s)))
            for (t, p, name, s), r in known.items()
            if name == method
        ]
        line = []
        for key in ("wall_s", "cpu_s", "peak_rss_bytes"):
            ratios = [r[key] / base[key] for r, base in own if base]
            line.append(f"{stats.median(ratios):.2f} ({max(ratios):.2f})" if ratios else "")
        if own:
            lines.append(f"| {method} | {' | '.join(line)} |")
    return "\n".join(lines)


def same_text(record: Record) -> Record:
    """The baseline of a record: SparseGPT on the same calibration rows."""
    method = record["method"]
    return {
        "method": (
            method.replace(method.split(",")[0], "sparsegpt", 1) if method in TEXT | ROWS else "sparsegpt"
        )
    }


RIVALS = Study(
    "rivals",
    cells,
    lambda asked: judged(asked, TEXTS),
    columns=("testbed", "pattern"),
    base=same_text,
    beside=("cpu_s", "CPU s"),
)
BY_ROWS = Study(
    "rivals_rows",
    cells_by_rows,
    lambda asked: judged(asked, ("validation", "test")),  # the number of rows is chosen on validation text
    base=same_text,
    texts=("validation", "test"),
    beside=("cpu_s", "CPU s"),
)
COST = Study(  # on a quiet machine, with all threads
    "rivals_cost",
    cells_of_cost,
    lambda asked: [{**asked.key, "text": None, **apart(asked, 0)[1]}],
    values=("wall_s", "cpu_s", "peak_rss_bytes"),
    texts=(),
    judged=False,
    more=lambda records: [costs(records)],
)
STUDIES = {study.name: study for study in (RIVALS, BY_ROWS, COST)}


@click.command(help="One of our methods in this process: what a cell calls; prints its cost.")
@click.argument("testbed")
@click.argument("pattern")
@click.argument("method")
@click.argument("seed", type=int)
@click.argument("out", type=click.Path(path_type=Path))
def main(testbed: str, pattern: str, method: str, seed: int, out: Path) -> None:
    click.echo(json.dumps(one(cell(testbed, pattern, method, seed), seed, out)))


if __name__ == "__main__":
    main()
