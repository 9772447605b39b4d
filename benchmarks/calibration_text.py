"""What calibration text is worth: ``python -m benchmarks.calibration_text run|table|verify``, record
``results/calibration_text.json``.

Model and protocol are those of ``benchmarks/real.py``, at 50%, seed 0. SparseGPT and ``fast`` are
each calibrated on 128 rows of 512 tokens: of C4, of WikiText-2's train part, of the model's own
text (``Real.written``: its continuations of C4 pages), and of random tokens. Each pruned model, and
the dense one, has perplexity on three texts, KL(dense ‖ pruned), agreement, and the nine tasks.

A cell is recorded (with ``--commit`` also in git) as soon as it is done, and a new run continues
where the last one ended. The model's own text is written once, by the first cell that needs it.
Pruning runs in a process of its own. Evaluation holds one whole model, and tasks a second one.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import torch

from benchmarks.alone import alone
from benchmarks.harness import Cell, Record, Study, commands, selection
from benchmarks.real import BATCH_ROWS, C4, GENERATED, Real, inputs, loaded, prune, real, task_mean, tasks
from benchmarks.testbed import RANDOM, Tensors
from pipeline_lib.evaluation.divergence import Dense, Divergence

SOURCES = {"C4": C4, "WikiText-2": "wikitext2.train-part", "generated": GENERATED, "random tokens": RANDOM}
METHODS = ("sparsegpt", "fast")
TEXTS = ("wikitext2.test", "c4.valid", "mix.test")
DENSE = {"source": "none", "method": "dense"}


def cells() -> Iterator[Cell]:
    yield Cell(DENSE, {})
    for method in METHODS:
        for source, rows_of in SOURCES.items():
            yield Cell(
                {"source": source, "method": method}, {"ppl": selection("50%")}, method, source=rows_of
            )


def measure(asked: Cell) -> list[Record]:
    """Measure a cell: a record per text."""
    blocks: Tensors = {}
    if asked.key != DENSE:
        with tempfile.TemporaryDirectory() as folder:
            alone(prune, asked, Path(folder))
            blocks = loaded(Path(folder))
    found = {text: judged(real(), blocks, text) for text in TEXTS}
    answered = tasks(real(), blocks)
    return [{**asked.key, "text": text, **one, "tasks": answered} for text, one in found.items()]


def judged(bed: Real, blocks: Tensors, text: str) -> Record:
    """Perplexity, and divergence from the dense model on the same rows. The dense model is read
    block by block.
    """
    dense = Dense(bed.checkpoint, torch.float32, bed.device)
    compared = Divergence(dense.logits(bed.evaluated(text), BATCH_ROWS), reverse=False)
    ppl = bed.perplexity(blocks, text, compared.add)
    apart = compared.summary()
    return {"ppl": ppl, "kl": apart["kl"], "agreement": apart["agreement"]}


STUDY = Study("calibration_text", cells, measure, values=("agreement", "ppl"), texts=TEXTS, files=inputs)


def show(records: Sequence[Record]) -> None:
    """Print a Markdown table with a line per model, and the cells that have not run yet."""
    columns = [f"{text}: {part}" for text in TEXTS for part in ("ppl", "KL", "agreement")]
    click.echo(f"| method, calibrated on | {' | '.join(columns)} | task mean, % |")
    click.echo("|---" * (len(columns) + 2) + "|")
    missing = []
    for name, cell in STUDY.every.items():
        own = {r["text"]: r for r in records if all(r[part] == value for part, value in cell.key.items())}
        if not own:
            missing.append(name)
            continue
        shown = [
            f"{own[text]['ppl']:.2f} | {own[text]['kl']:.3f} | {100 * own[text]['agreement']:.1f}%"
            for text in TEXTS
        ]
        label = "dense" if cell.key == DENSE else f"{cell.key['method']}, {cell.key['source']}"
        click.echo(f"| {label} | {' | '.join(shown)} | {task_mean(own[TEXTS[0]]['tasks'])} |")
    if missing:
        click.echo(f"\nnot run yet: {'; '.join(missing)}")


main = commands(lambda: STUDY, show, __doc__)

if __name__ == "__main__":
    main()
