"""Where pruned models lose: ``python -m benchmarks.sources run|table|verify``, record
``results/sources.json``.

Models are those of the main table of ``benchmarks/real.py`` at 50%, seed 0, on rows of C4 that nothing
is calibrated on. A cell of a pruned model has one entry per block:

- ``restored``: the perplexity if the dense block takes the place of the pruned one. It says what this
  block costs.
- ``first`` and ``others``: ‖y − ŷ‖² / ‖y‖² of the block's outputs, with y from the dense model, summed
  over the first tokens of all rows, and over all other tokens. Blocks before it are pruned, too.

The cell of the dense model has one entry per block with two figures for each of its sites, the inputs
of its matrices:

- ``share``: the first tokens' share of the trace of the site's Gram matrix.
- ``spread``: the mean of the Gram matrix's diagonal over its median. Damping by a share of the mean
  is this much stronger for an ordinary input.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click
import torch

from benchmarks.harness import Cell, Record, Study, commands
from benchmarks.real import BATCH_ROWS, Real, cell, inputs, made, put, real
from benchmarks.testbed import Tensors
from pipeline_lib.evaluation.perplexity import perplexity
from pipeline_lib.models.architecture import Site
from pipeline_lib.models.stream import tapped

METHODS = ("dense", "sparsegpt", "fast", "best", "distilled")
TEXT, ROWS = "c4.valid", 16
PATTERN, SEED = "50%", 0


def cells() -> Iterator[Cell]:
    for method in METHODS:
        yield replace(cell("main", method, PATTERN, SEED), key={"method": method})


def measure(asked: Cell) -> list[Record]:
    """Measure a cell: one record."""
    bed, method = real(), asked.key["method"]
    rows = bed.evaluated(TEXT)[:ROWS]
    with tempfile.TemporaryDirectory() as folder:
        blocks, _ = made(cell("main", method, PATTERN, SEED), Path(folder))
    dense = judged(bed, {}, rows)
    if method == "dense":
        ppl, entries = dense, sites(bed, rows)
    else:
        ppl, entries = judged(bed, blocks, rows), errors(bed, blocks, rows)
        for index, entry in enumerate(entries):
            others = {number: block for number, block in blocks.items() if number != index}
            entry["restored"] = judged(bed, others, rows)
    return [{**asked.key, "text": TEXT, "ppl": ppl, "dense": dense, "blocks": entries}]


def judged(bed: Real, blocks: Tensors, rows: torch.Tensor) -> float:
    """Perplexity with these blocks in the place of the model's own."""
    put(bed.whole, bed, blocks)
    return perplexity(bed.whole, rows, BATCH_ROWS)


def errors(bed: Real, blocks: Tensors, rows: torch.Tensor) -> list[Record]:
    """Errors of all outputs, block by block."""
    model, found = bed.stream(), []
    dense = model.embed(rows, BATCH_ROWS, "dense")
    own = dense.copy("pruned")
    for index in range(bed.checkpoint.architecture.depth):
        model.advance(model.block(index), index, dense)
        model.advance(model.block(index, blocks[index]), index, own)
        sums = torch.zeros(2, 2, dtype=torch.float64)  # of squares: error and size, first and others
        for number in dense.hidden.own:
            wanted = dense.hidden[number].double()
            for part, values in enumerate((own.hidden[number].double() - wanted, wanted)):
                sums[part] += _parts(values)
        first, others = (sums[0] / sums[1]).tolist()
        found.append({"first": first, "others": others})
    return found


def sites(bed: Real, rows: torch.Tensor) -> list[Record]:
    """Figures of every site of the dense model."""
    model, found = bed.stream(), []
    dense = model.embed(rows, BATCH_ROWS, "dense")
    for index, layout in enumerate(bed.checkpoint.architecture.layouts):
        inputs_of: dict[str, list[torch.Tensor]] = {}

        def take(
            site: Site,
            x: torch.Tensor,
            _weights: torch.Tensor | None,
            inputs_of: dict[str, list[torch.Tensor]] = inputs_of,
        ) -> None:
            inputs_of.setdefault(site.name, []).append(x.clone())

        block = model.block(index)
        with tapped(block, layout.sites, take):
            model.advance(block, index, dense)
        found.append({name: _figures(torch.cat(batches)) for name, batches in inputs_of.items()})
    return found


def _figures(inputs: torch.Tensor) -> Record:
    """Those of a site with these inputs [N, T, d]."""
    first, others = _parts(inputs.double()).tolist()
    diagonal = inputs.double().square().mean((0, 1))
    return {"share": first / (first + others), "spread": float(diagonal.mean() / diagonal.median())}


def _parts(values: torch.Tensor) -> torch.Tensor:
    """Σ‖·‖² [2] of values [B, T, D]: of the first tokens, and of all others."""
    squares = values.square().sum((0, 2)).cpu()
    return torch.stack([squares[0], squares[1:].sum()])


STUDY = Study("sources", cells, measure, texts=(TEXT,), files=inputs)


def show(records: Sequence[Record]) -> None:
    """Print Markdown tables with a line per block: the sites, then what the pruned blocks cost."""
    known = {record["method"]: record for record in records}
    if "dense" in known:
        entries = known["dense"]["blocks"]
        names = list(entries[0])
        columns = [f"{name}: {part}" for name in names for part in ("share", "spread")]
        click.echo(f"| block | {' | '.join(columns)} |\n" + "|---" * (len(columns) + 1) + "|")
        for index, entry in enumerate(entries):
            shown = [f"{100 * entry[name]['share']:.1f}% | {entry[name]['spread']:.1f}" for name in names]
            click.echo(f"| {index} | {' | '.join(shown)} |")
    pruned = [record for method, record in known.items() if method != "dense"]
    if not pruned:
        return
    columns = [f"{r['method']}: {part}" for r in pruned for part in ("restored", "first", "others")]
    click.echo(f"\n| block | {' | '.join(columns)} |\n" + "|---" * (len(columns) + 1) + "|")
    for index in range(len(pruned[0]["blocks"])):
        own = [record["blocks"][index] for record in pruned]
        shown = [f"{one['restored']:.2f} | {one['first']:.2e} | {one['others']:.2e}" for one in own]
        click.echo(f"| {index} | {' | '.join(shown)} |")
    click.echo("\nall pruned: " + ", ".join(f"{r['method']} {r['ppl']:.2f}" for r in pruned))


main = commands(lambda: STUDY, show, __doc__)

if __name__ == "__main__":
    main()
