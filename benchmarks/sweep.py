"""The OBS sweep of one matrix against its products alone, on one CPU thread: ``python -m
benchmarks.sweep ROWS COLUMNS``.

Prints one line of JSON: CPU seconds of the sweep as the variant ``sparsegpt`` runs it, those of one
product [R, C] × [C, C/2], and the ratio. The product has the multiply-adds that every sweep needs
(R·C²/2). Each time is the best of three.
"""

import json
import time
from collections.abc import Callable

import click
import torch

from pipeline_lib.core import products
from pipeline_lib.core.random import generator
from pipeline_lib.masks.rule import Rule
from pipeline_lib.masks.settings import SelectionParams
from pipeline_lib.recipe.variants import read
from pipeline_lib.solve.factor import Factorisation, factorise
from pipeline_lib.solve.sweep import sweep

TIMES = 3


def best(work: Callable[[], object]) -> float:
    """CPU seconds of the fastest of ``TIMES`` calls."""
    taken = []
    for _ in range(TIMES):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return min(taken)


def factorisation(columns: int, selection: SelectionParams) -> Factorisation:
    """The factorisation of a random second moment [C, C] with eigenvalues between 1 and about 15:
    the identity and a part of rank C/8.
    """
    rank = -(-columns // 8)
    part = torch.randn(columns, rank, generator=generator(0, "second moment"))
    gram = torch.addmm(torch.eye(columns), part, part.T, alpha=1 / rank)
    return factorise(gram, selection.damping, selection.damping_of, "a random matrix")


@click.command(help=__doc__)
@click.argument("rows", type=click.IntRange(1))
@click.argument("columns", type=click.IntRange(2))
@click.option(
    "--sparsity", default=0.6, show_default=True, help="Share that becomes zero; of N:M 1 - N/M is taken."
)
@click.option("--pattern", default="unstructured", show_default=True, help="Or N:M.")
def main(rows: int, columns: int, sparsity: float, pattern: str) -> None:
    torch.set_num_threads(1)
    products.enable_onednn()
    shipped = read("sparsegpt").recipe.selection
    shape = shipped.model_copy(update={"pattern": pattern}).shape
    share = 1 - shape.n / shape.m if shape.m else sparsity
    selection = SelectionParams.model_validate(shipped.model_dump() | {"pattern": pattern, "sparsity": share})
    quantum = shape.quantum("the matrix", (rows, columns))
    kept = round((1 - share) * rows * columns / quantum) * quantum
    known, rule = factorisation(columns, selection), Rule.of(selection)
    weight = torch.randn(rows, columns, generator=generator(0, "weight"))
    half = torch.randn(columns, columns // 2, generator=generator(0, "factor"))
    found = {
        "rows": rows,
        "columns": columns,
        "sweep_s": best(lambda: sweep(weight, known, kept, rule)),
        "products_s": best(lambda: torch.mm(weight, half)),
    }
    click.echo(json.dumps(found | {"ratio": found["sweep_s"] / max(found["products_s"], 1e-9)}))


if __name__ == "__main__":
    main()
