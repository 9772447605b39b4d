"""How fast the pipeline is on this device (SPARSELINE_DEVICE): ``python -m benchmarks.gpu [--model
PATH] [--small] [ROW ...]``.

A model of SmolLM2-135M's shape (that of ``--model``, or random weights), 128 x 2,048 random tokens,
50%: pruning by every method, what ``calibrate``, ``scale`` and ``sensitivity`` compute, and
llm-compressor (``make rivals-environment``). One random LLaMA-7B block of ``benchmarks.block`` with
little and with much text, and its floor. 2:4 against dense matrices (``benchmarks.latency``).

Every row runs in a process of its own, from model in memory, and is stopped after ``--limit``
seconds, its start included. It is in the record, ``results/gpu.json``, as soon as it is done: with
its seconds, or with a note that says why there are none. Rows that are recorded for this device run
again only if they are named. Pruning is uniform, because the measurements for allocations have rows
of their own. ``--small`` runs the same rows with small shapes, anywhere, and records them
elsewhere.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click
import torch

from benchmarks import latency
from benchmarks.alone import alone, cost
from benchmarks.block import METHODS, SHAPES, Files, Shape, floor, place, prune, rival, save
from benchmarks.harness import RESULTS, UNIFORM, Cell, Record, Study, selection
from benchmarks.lab import recipe, settings
from benchmarks.rivals import MAIN, PYTHON
from pipeline_lib.core import runtime
from pipeline_lib.core.params import merge
from pipeline_lib.induce.scale import shifts, starting_factors

LIMIT, TOTAL = 45.0, 600.0  # seconds, of a row and of a run
FEW = 4  # rows behind the statistics that ``scale`` reads: its cost does not depend on them
REPETITIONS = 5
KEY = ("row", "model", "device")
SPARSITY = "50%"
Work = Callable[..., Record]  # ``limit`` -> a cost, or a note


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, of its text, and of the block, which is pruned with two numbers of tokens."""

    model: Shape
    rows: int
    length: int
    block: Shape
    tokens: tuple[int, int]


SMOLLM = Shape(576, 1536, 9, 3, blocks=30, vocabulary=49152)
FULL = Sizes(SMOLLM, 128, 2048, SHAPES["llama-7b"], (2048, 262144))
TINY = Shape(64, 128, 4, 2, blocks=2, vocabulary=128)
SMALL = Sizes(TINY, 8, 32, replace(TINY, blocks=1), (32, 256))


def calibrate(files: Files) -> Record:
    """The cost of the dense pass that collects statistics, Gram matrices included."""
    here = files.lab()
    return cost(here.statistics, here.bed.device)


def scale(files: Files) -> Record:
    """The cost of starting factors and shifts, from given statistics."""
    here = replace(files, rows=min(FEW, files.rows)).lab()
    blocks, how = list(here.dense()), settings("scale")

    def work() -> None:
        for block in blocks:
            starting_factors(block.layout, block.tensors, block.statistics, how)
            shifts(block.layout, block.statistics, how)

    return cost(work, here.bed.device)


def sensitivity(files: Files) -> Record:
    """The cost of Fisher sensitivities with full output moments."""
    here = files.lab()
    return cost(partial(here.sensitivities, moments=True), here.bed.device)


def other(files: Files, limit: float) -> Record:
    """The cost of llm-compressor's SparseGPT."""
    found = rival(files, selection(SPARSITY)["selection"]["sparsity"], limit)
    if found is None:
        return {"note": f"skipped: no llm-compressor at {PYTHON}; run `make rivals-environment`"}
    return {"wall_s": found.pop("s"), **found}


def two_of_four(part: str) -> Record:
    """Compare 2:4 with dense products. Returns the results, and the cost of the comparison."""
    device = runtime.compute()
    if device.type != "cuda":
        return {"note": "skipped: kernels for 2:4 run on CUDA alone"}
    torch.cuda.set_device(device)
    found: list[Record] = []
    measure = {"matrices": latency.matrices_on_gpu, "block": latency.block_on_gpu}[part]
    return cost(lambda: found.extend(measure(REPETITIONS)), device) | {"products": found}


def works(sizes: Sizes, model: Path, block: Path) -> dict[str, Work]:
    """Row -> its measurement. The models need not exist yet."""
    files, changes = Files(model, sizes.rows, sizes.length), merge(selection(SPARSITY), UNIFORM)
    found: dict[str, Work] = {
        f"prune {method}": partial(alone, prune, files, recipe(changes, method)) for method in MAIN
    }
    found |= {work.__name__: partial(alone, work, files) for work in (calibrate, scale, sensitivity)}
    found["llm-compressor sparsegpt"] = partial(other, files)
    for tokens in sizes.tokens:
        length = min(sizes.length, tokens)
        part = Files(block, tokens // length, length)
        found[f"block floor, {tokens} tokens"] = partial(alone, floor, part)
        found |= {
            f"block {method}, {tokens} tokens": partial(alone, prune, part, recipe(changes, method))
            for method in METHODS
        }
    return found | {f"2:4 {part}": partial(alone, two_of_four, part) for part in ("matrices", "block")}


def study(rows: Mapping[str, Work], where: Sequence[str], limit: float, record: Path) -> Study:
    """The study of these rows for a model on a device (``where``), and of the record's rows for
    others.
    """

    def cells() -> Iterator[Cell]:
        yield from (Cell({part: known[part] for part in KEY}, {}) for known in found.recorded())
        yield from (Cell(dict(zip(KEY, (row, *where), strict=True)), {}) for row in rows)

    def measure(asked: Cell) -> list[Record]:
        nothing = dict.fromkeys(("wall_s", "cpu_s", "peak_bytes", "peak_gpu_bytes", "note"))
        try:
            told = rows[asked.key["row"]](limit=limit)
        except TimeoutError as error:
            told = {"note": str(error)}
        except (RuntimeError, click.ClickException) as error:
            told = {"note": f"failed: {str(error).splitlines()[-1]}"}
        if note := told.get("note"):
            click.echo(f"{asked.key['row']}: {note}")
        return [{**asked.key, **nothing, **told}]

    found = Study(
        record.stem,
        cells,
        measure,
        columns=("model",),
        values=("wall_s",),
        home=record.parent,
        files=lambda _: [],
    )
    return found


def table(records: Sequence[Record]) -> str:
    """Markdown tables: seconds and memory of every row, then the speed-up of 2:4 (dense over
    sparse).
    """
    lines = ["| row | model | device | seconds | CPU s | peak GB | on the GPU | |", "|---" * 8 + "|"]
    for r in records:
        seconds = [f"{r[key]:.2f}" if r[key] is not None else "" for key in ("wall_s", "cpu_s")]
        peaks = [
            f"{r[key] / 1e9:.2f}" if r[key] is not None else "" for key in ("peak_bytes", "peak_gpu_bytes")
        ]
        lines.append(
            f"| {r['row']} | {r['model']} | {r['device']} | {' | '.join([*seconds, *peaks])} |"
            f" {r['note'] or ''} |"
        )
    products = [one for r in records for one in r.get("products", [])]
    if products:
        lines += ["", "| float16 | phase | tokens | arm | dense over it |", "|---" * 5 + "|"]
        for one in products:
            lines.append(
                f"| {one.get('matrices', one['part'])} | {one['phase']} | {one['tokens']} | {one['arm']} |"
                f" {one['ratio']:.2f} |"
            )
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument("rows", nargs=-1)
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A checkpoint in the place of random weights.",
)
@click.option("--small", is_flag=True, help="Small shapes: whether all rows run, not how fast.")
@click.option("--limit", default=LIMIT, show_default=True, help="Seconds of a row.")
@click.option(
    "--total", default=TOTAL, show_default=True, help="Seconds of the run: no row starts that may end later."
)
@click.option(
    "--record",
    type=click.Path(path_type=Path),
    help="Another file than results/gpu.json, or results/cells/gpu_small.json.",
)
def main(
    rows: tuple[str, ...], model: Path | None, small: bool, limit: float, total: float, record: Path | None
) -> None:
    started, sizes = time.monotonic(), SMALL if small else FULL
    record = record or (RESULTS / "cells" / "gpu_small.json" if small else RESULTS / "gpu.json")
    here = (model.name if model else "random", place(runtime.compute()))
    with tempfile.TemporaryDirectory() as folder:
        made, block = Path(folder) / "model", Path(folder) / "block"
        every = works(sizes, (model or made).resolve(), block)
        if unknown := [row for row in rows if row not in every]:
            raise click.ClickException(f"no row is called {unknown[0]!r}; rows: {'; '.join(every)}.")
        measured = study(every, here, limit, record)
        known = {tuple(r[part] for part in KEY) for r in measured.recorded()}
        asked = rows or [row for row in every if (row, *here) not in known]
        if asked and model is None:
            save(sizes.model, made)
        if any(row.startswith("block") for row in asked):
            save(sizes.block, block)
        for number, row in enumerate(asked):
            if total - (time.monotonic() - started) < limit:
                click.echo(
                    f"{len(asked) - number} rows are left, from {row!r} on: run the same command again"
                )
                break
            measured.renew(",".join((row, *here)))  # each is in the record as soon as it is done
    records = measured.recorded()
    click.echo(table(records))
    failed = [
        r["row"]
        for r in records
        if r["row"] in asked and (r["model"], r["device"]) == here and (r["note"] or "").startswith("failed")
    ]
    if failed:
        raise click.ClickException(f"{len(failed)} rows failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
