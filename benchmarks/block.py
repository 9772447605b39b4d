"""Measure the pruning of one decoder block of real shape, beside its floor and llm-compressor:
``python -m benchmarks.block [SHAPE,METHOD,TOKENS ...]``.

The block has random weights; its rows are random tokens, whose embeddings have a few outlier
channels. It is pruned to 60%, uniformly, by variants of params.yaml through the library's own
functions. Everything is float32, in memory at the start, and in a process of its own.

The *floor* is the work that SparseGPT cannot avoid (``benchmarks.floor``). ``rival_s`` is
llm-compressor's SparseGPT on the same files (``make rivals-environment``). ``planned_bytes`` is the
peak that `make plan` predicts. Floor and rival are measured once per run for all methods of a shape
and number of tokens.

Without names, every row runs that ``results/block.json`` lacks for this device (SPARSELINE_DEVICE).
Named rows are measured again.
"""

import functools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.alone import alone, cost
from benchmarks.floor import least
from benchmarks.harness import RESULTS, ROOT, UNIFORM, Cell, Record, Study, selection
from benchmarks.lab import Lab
from benchmarks.rivals import PYTHON, called
from benchmarks.testbed import RANDOM, Bed
from pipeline_lib.core import runtime
from pipeline_lib.core.params import merge
from pipeline_lib.core.random import generator
from pipeline_lib.models.checkpoint import open_checkpoint
from pipeline_lib.planning.estimate import LIBRARIES, pruning
from pipeline_lib.prune.plan import plan
from pipeline_lib.prune.shapes import Shapes
from pipeline_lib.recipe.settings import Recipe

LENGTH = 2048  # tokens in a row
OUTLIERS, LARGER = 8, 20.0  # channels of the embeddings, and how much larger these are
METHODS = ("sparsegpt", "fast", "best")
TOKENS = {"cpu": (8192,), "cuda": (8192, 262144)}
KEY = ("shape", "method", "tokens", "device")
PATTERN = "60%"


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model."""

    width: int
    inner: int
    heads: int
    kv_heads: int
    blocks: int = 1
    vocabulary: int = 2048


SHAPES = {"llama-7b": Shape(4096, 11008, 32, 32), "llama-70b": Shape(8192, 28672, 64, 8)}


@dataclass(frozen=True)
class Files:
    """A model on disk, and the random token rows that it is pruned with."""

    path: Path
    rows: int
    length: int

    def lab(self) -> Lab:
        return Lab(Bed(self.path, self.length)).at(RANDOM, self.rows, 0)


def save(shape: Shape, folder: Path) -> None:
    """Save a model with random weights of standard deviation 0.02, and larger embeddings."""
    torch.manual_seed(0)
    sizes = {"hidden_size": shape.width, "intermediate_size": shape.inner}
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    counts = {"num_hidden_layers": shape.blocks, "vocab_size": shape.vocabulary}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, **heads, **counts, tie_word_embeddings=True, initializer_range=0.02)
    )
    embeddings = model.model.embed_tokens.weight.data.normal_()
    embeddings[:, torch.randperm(shape.width, generator=generator(0, "outliers"))[:OUTLIERS]] *= LARGER
    model.save_pretrained(folder)
    # llm-compressor requires a tokenizer, though it reads no text
    for file in (ROOT / "data" / "tiny-llama").glob("tokenizer*"):
        shutil.copy(file, folder)


def prune(files: Files, asked: Recipe) -> Record:
    """The cost of pruning a model by a recipe, in this process. The recipe's allocation must need
    no measurement.
    """
    here = files.lab()
    here.bed.stream()  # imports are not part of the cost
    kept, _ = here.allocated(asked)

    def work() -> None:
        for _ in here.blocks(asked, kept):
            pass

    return cost(work, here.bed.device) | {"threads": torch.get_num_threads()}


def floor(files: Files) -> Record:
    """The cost of SparseGPT's floor, in this process."""
    return least(files.lab())


def rival(files: Files, sparsity: float, limit: float | None = None) -> Record | None:
    """The cost of llm-compressor's SparseGPT on the same model and rows, with wall seconds as
    ``s``. None if it is not installed.

    Raises:
        TimeoutError: it took longer than ``limit`` seconds, its start included.
        click.ClickException: it failed.
    """
    if not Path(PYTHON).exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.safetensors"
        save_file({"rows": torch.cat(list(files.lab().rows.values()))}, rows)
        script, out = ROOT / "benchmarks" / "llm_compressor.py", Path(folder) / "pruned.safetensors"
        told = called(
            PYTHON, script, files.path, rows, "sparsegpt", str(sparsity), "unstructured", out, limit=limit
        )
    seconds = {"s": round(told["wall_s"], 3), "cpu_s": round(told["cpu_s"], 3)}
    return seconds | {"peak_bytes": told["peak_rss_bytes"], "peak_gpu_bytes": told.get("peak_gpu_bytes")}


def place(device: torch.device) -> str:
    """The name of a device in records: ``cpu``, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@functools.cache
def _saved(shape: str) -> tempfile.TemporaryDirectory[str]:
    """The directory of a shape's model, which is deleted when this process ends."""
    folder = tempfile.TemporaryDirectory()
    save(SHAPES[shape], Path(folder.name))
    return folder


def _files(shape: str, tokens: int) -> Files:
    length = min(LENGTH, tokens)
    return Files(Path(_saved(shape).name), tokens // length, length)


@functools.cache
def beside(shape: str, tokens: int) -> Record:
    """The costs of floor and rival."""
    files = _files(shape, tokens)
    least, other = alone(floor, files), rival(files, selection(PATTERN)["selection"]["sparsity"])
    if other is None:
        click.echo(f"no llm-compressor at {PYTHON} (`make rivals-environment`): rival_s is null")
    found = {"floor_s": least["wall_s"], "floor_cpu_s": least["cpu_s"], "floor_parts": least["parts"]}
    return found | {
        f"rival_{key}": other and other[key] for key in ("s", "cpu_s", "peak_bytes", "peak_gpu_bytes")
    }


def measure(asked: Cell) -> list[Record]:
    """Measure a row, and return its record."""
    how = asked.recipe("wall_s")
    assert how is not None
    shape, tokens = asked.key["shape"], asked.key["tokens"]
    files = _files(shape, tokens)
    own = alone(prune, files, how)
    return [{**asked.key, **own, "planned_bytes": planned(files, how), **beside(shape, tokens)}]


def planned(files: Files, how: Recipe) -> int:
    """The peak memory that `make plan` predicts, without the libraries, which are loaded before."""
    steps, checkpoint = plan(how, torch.float32), open_checkpoint(files.path)
    shapes = Shapes(checkpoint, files.rows, files.length, how.batch_rows, steps.window)
    return round(pruning("", steps, shapes).memory_bytes - LIBRARIES)


def cell(shape: str, method: str, tokens: int, device: str) -> Cell:
    changes = merge(selection(PATTERN), UNIFORM)
    return Cell(
        dict(zip(KEY, (shape, method, tokens, device), strict=True)),
        {"wall_s": changes},
        method,
        source=RANDOM,
    )


def study(named: Sequence[str], device: torch.device, home: Path = RESULTS) -> Study:
    """The study of the recorded rows, this device's rows, and the named ones.

    Raises:
        click.ClickException: a name is not that of a row.
    """
    here = place(device)

    def cells() -> Iterator[Cell]:
        yield from (cell(*(record[part] for part in KEY)) for record in found.recorded())
        yield from (
            cell(s, m, tokens, here) for s in SHAPES for tokens in TOKENS[device.type] for m in METHODS
        )
        for name in named:
            shape, method, tokens = _parsed(name)
            yield cell(shape, method, tokens, here)

    found = Study(
        "block",
        cells,
        measure,
        columns=("shape",),
        values=("wall_s", "cpu_s", "floor_s", "rival_s"),
        home=home,
        files=lambda _: [],
    )
    return found


def _parsed(name: str) -> tuple[str, str, int]:
    parts = name.replace(" ", "").split(",")
    if (
        len(parts) != 3
        or parts[0] not in SHAPES
        or parts[1] not in METHODS
        or not parts[2].isdigit()
        or int(parts[2]) < 1
    ):
        example = f"{next(iter(SHAPES))},{METHODS[0]},{TOKENS['cpu'][0]}"
        raise click.ClickException(
            f"no row is called {name!r}; a name is shape,method,tokens, for example {example}."
        )
    return parts[0], parts[1], int(parts[2])


def table(records: Sequence[Record]) -> str:
    """Markdown table: seconds, and the ratios of wall and CPU seconds to those of the floor and of
    llm-compressor. On a busy machine the CPU ratios say more.
    """
    lines = [
        (
            "| shape, method, tokens | device | seconds | CPU s | over the floor (CPU) | over llm-compressor"
            " (CPU) | peak GB | on the GPU |"
        ),
        "|---" * 8 + "|",
    ]
    for r in records:
        names = (("floor_s", "floor_cpu_s"), ("rival_s", "rival_cpu_s"))
        over = [
            f"{r['wall_s'] / r[wall]:.2f} ({r['cpu_s'] / r[cpu]:.2f})" if r[wall] else ""
            for wall, cpu in names
        ]
        peaks = [
            f"{r[key] / 1e9:.2f}" if r[key] is not None else "" for key in ("peak_bytes", "peak_gpu_bytes")
        ]
        line = [
            f"{r['shape']}, {r['method']}, {r['tokens']:,}",
            r["device"],
            f"{r['wall_s']:.1f}",
            f"{r['cpu_s']:.1f}",
            *over,
            *peaks,
        ]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    device = runtime.compute()
    rows = study(names, device)
    known = {tuple(record[part] for part in KEY) for record in rows.recorded()}
    here = [name for name, one in rows.every.items() if tuple(one.key.values()) not in known]
    for name in [",".join((*map(str, _parsed(name)), place(device))) for name in names] or here:
        rows.renew(name)  # each is in the record as soon as it is done
    click.echo(table(rows.recorded()))


if __name__ == "__main__":
    main()
