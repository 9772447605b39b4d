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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from benchmarks.harness import Cell, Record, Study, commands
from benchmarks.real import BATCH_ROWS, Real, cell, inputs, made, put, real
from benchmarks.testbed import Tensors
from pipeline_lib.evaluation.perplexity import perplexity

METHODS = ("dense", "sparsegpt", "fast", "best", "distilled")
TEXT, ROWS = "c4.valid", 16
PATTERN, SEED = "50%", 0
Seen = Callable[[int, torch.Tensor], None]  # a block's number, its outputs [B, T, D]


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
    kept: dict[int, list[torch.Tensor]] = {}
    sums = torch.zeros(bed.checkpoint.architecture.depth, 2, 2, dtype=torch.float64)

    def keep(index: int, out: torch.Tensor) -> None:
        kept.setdefault(index, []).append(out.cpu())

    def compare(index: int, out: torch.Tensor) -> None:
        wanted = kept[index].pop(0).double()
        parts = ((out.cpu().double() - wanted).square().sum(-1), wanted.square().sum(-1))
        for number, part in enumerate(parts):
            sums[index, number] += torch.stack([part[:, 0].sum(), part[:, 1:].sum()])

    run(bed, {}, rows, keep)
    run(bed, blocks, rows, compare)
    return [{"first": first, "others": others} for first, others in (sums[:, 0] / sums[:, 1]).tolist()]


def run(bed: Real, blocks: Tensors, rows: torch.Tensor, see: Seen) -> None:
    """Show ``see`` the outputs of every block, batch by batch."""
    put(bed.whole, bed, blocks)
    with ExitStack() as hooks, torch.no_grad():
        for index, block in enumerate(places(bed)):

            def outputs(_block: Any, _args: Any, out: Any, index: int = index) -> None:
                see(index, out[0] if isinstance(out, tuple) else out)

            hooks.enter_context(hooked(block.register_forward_hook(outputs)))
        for batch in rows.split(BATCH_ROWS):
            bed.whole.base_model(input_ids=batch.to(bed.device), use_cache=False)


def sites(bed: Real, rows: torch.Tensor) -> list[Record]:
    """Figures of every site of the dense model."""
    found: list[Record] = [{} for _ in range(bed.checkpoint.architecture.depth)]
    put(bed.whole, bed, {})
    sums: dict[tuple[int, str], list[torch.Tensor]] = {}
    with ExitStack() as hooks, torch.no_grad():
        for index, block in enumerate(places(bed)):
            layout = bed.checkpoint.architecture.layouts[index]
            for site in layout.sites:
                reader = layout.consumers(site.name)[0].parameter.removesuffix(".weight")

                def inputs_of(_module: Any, args: Any, key: tuple[int, str] = (index, site.name)) -> None:
                    squares = args[0].double().square()
                    sums.setdefault(key, []).append(torch.stack([squares[:, 0].sum(0), squares.sum((0, 1))]))

                hooks.enter_context(hooked(block.get_submodule(reader).register_forward_pre_hook(inputs_of)))
        for batch in rows.split(BATCH_ROWS):
            bed.whole.base_model(input_ids=batch.to(bed.device), use_cache=False)
    for (index, name), batches in sums.items():
        first, every = torch.stack(batches).sum(0)
        share, spread = first.sum() / every.sum(), every.mean() / every.median()
        found[index][name] = {"share": float(share), "spread": float(spread)}
    return found


def places(bed: Real) -> Sequence[nn.Module]:
    """The blocks of the whole model."""
    return list(bed.whole.base_model.get_submodule(bed.checkpoint.architecture.blocks).children())


@contextmanager
def hooked(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


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
