"""Reconstruction on the testbeds, uniform 60%, SparseGPT's mask, cell by cell and resumable; and one LLaMA-7B-shaped block for time and memory.

``python -m benchmarks.reconstruction cells|table|verify|block``. Every cell prunes a testbed with one method, under the parameters that
params.yaml ships and what the method lays over them, and measures it on the test texts. One file per finished cell.
"""

import json
import resource
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
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.induction import PATTERNS, Bench, gap
from benchmarks.records import Record, cell_file, commit, finish_cells, gather, recompute, recorded
from benchmarks.testbed import NAMES, Testbed, inputs
from pipeline_lib.core import params
from pipeline_lib.core.artifacts import write_json
from pipeline_lib.core.counts import target
from pipeline_lib.models.checkpoint import open_checkpoint
from pipeline_lib.models.stream import BlockModel
from pipeline_lib.models.transform import Transform
from pipeline_lib.planning.estimate import LIBRARIES, measure_speed, pruning
from pipeline_lib.prune.prune import PruneParams, prune

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "reconstruction.json"
BLOCK = HERE / "results" / "reconstruction_block.json"
TEXTS = ("validation", "test", "wikitext2")
DENSE = {"collect": "site", "towards_dense": 1.0}
METHODS: dict[str, dict[str, Any]] = {  # three seeds; what is laid over prune.reconstruction
    "sparsegpt": {},
    "asymmetric": {"steps": ["obs"], **DENSE},
    "lsq": {"steps": ["obs", "lsq"], **DENSE},
    "block": {"steps": ["obs", "block"]},
}
OTHERS: dict[str, dict[str, Any]] = {  # one seed
    "obs, site by site": {"steps": ["obs"], "collect": "site"},
    "obs, reordered (ROSE)": {"steps": ["obs"], "reorder": 0.5},
    "obs, reordered always": {"steps": ["obs"], "reorder": 0.0},
    "lsq, pruned stream": {"steps": ["obs", "lsq"]},
    "lsq, pruned stream, ADMM mask": {"steps": ["obs", "lsq"], "lsq": {"mask_iterations": 300}},
    "lsq, half way": {"steps": ["obs", "lsq"], "collect": "site", "towards_dense": 0.5},
    "lsq, ADMM mask": {"steps": ["obs", "lsq"], **DENSE, "lsq": {"mask_iterations": 300}},
    "channel": {"steps": ["obs", "channel"]},
    "lsq, then channel": {"steps": ["obs", "lsq", "channel"], **DENSE},
    "lsq, then block": {"steps": ["obs", "lsq", "block"], **DENSE},
    "block, weights only": {"steps": ["obs", "block"], "block": {"parts": ["weights"]}},
    "block, with factors": {"steps": ["obs", "block"], "block": {"parts": ["weights", "biases", "norms", "factors"]}},
    "block, float32": {"steps": ["obs", "block"], "block": {"compute_dtype": "float32"}},
    "block, windows of 2": {"steps": ["obs", "block"], "block": {"window": 2}},
    "block, masks refreshed": {"steps": ["obs", "block"], "block": {"refresh_epochs": 2}},
    "block, 16 epochs": {"steps": ["obs", "block"], "block": {"epochs": 16}},
}


@dataclass(frozen=True)
class Cell:
    testbed: str
    pattern: str
    method: str
    seed: int

    def prune(self) -> PruneParams:
        sparsity, pattern = PATTERNS[self.pattern]
        selection = {"score": "obs", "group": "block", "sparsity": sparsity, "pattern": pattern}
        overrides = {"selection": selection, "allocation": {"method": "uniform"}, "reconstruction": (METHODS | OTHERS)[self.method]}
        return PruneParams.model_validate(params.merge(params.section("prune"), overrides))

    def file(self) -> Path:
        how = self.prune().model_dump(mode="json")
        steps = how["reconstruction"].pop("steps")
        if not how["reconstruction"]["lsq"]["mask_iterations"]:  # parameters of what is not done do not matter
            del how["reconstruction"]["lsq"]["mask_penalty"]
        for step in {"lsq", "channel", "block"} - set(steps):
            del how["reconstruction"][step]
        name = "-".join(map(str, astuple(self))).replace(", ", "-").replace(" ", "_")
        return cell_file(f"reconstruction-{name}", [steps, how], inputs(self.testbed, TEXTS))


def cells() -> Iterator[Cell]:
    """Three seeds of the methods, then one of the others."""
    for seed in range(3):
        for testbed in NAMES:
            yield from (Cell(testbed, "60%", method, seed) for method in METHODS)
    for testbed in NAMES:
        yield from (Cell(testbed, "60%", method, 0) for method in OTHERS)


class Lab(Bench):
    """A testbed; statistics of the dense model are not needed here."""

    def at(self, seed: int) -> None:
        if seed != self.seed:
            self.seed, self.rows = seed, self.bed.calibration(seed)

    def run(self, cell: Cell) -> dict[str, Any]:
        """The cell's records, and each block's errors."""
        self.at(cell.seed)
        settings, depth = cell.prune(), self.bed.checkpoint.architecture.depth
        kept = self.bed.uniform(settings.selection.sparsity)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            rows = self.rows["fit"], self.rows["held_out"]
            found = dict(prune(self.bed.stream(), *rows, kept, [Transform()] * depth, settings, lambda _: None, Path(scratch)))
        told = {"wall_s": round(time.perf_counter() - started, 2), "commit": commit()}
        ppl = self.perplexities({index: block.tensors for index, block in found.items()}, TEXTS)
        records = [{**asdict(cell), "text": text, "ppl": ppl[text], "dense": self.dense[text], **told} for text in TEXTS]
        return {"records": records, "blocks": {str(index): block.facts for index, block in found.items()}}


def table(records: list[Record]) -> str:
    """Markdown: perplexity on test, geometric mean ± spread (largest distance of a seed from it), and in brackets the share of the gap between
    SparseGPT and dense that is closed (paired by seed, mean; then WikiText-2's), with the wall seconds of pruning."""
    known = {(r["testbed"], r["method"], r["seed"], r["text"]): r for r in records}
    methods = list(dict.fromkeys(r["method"] for r in records))
    lines = [
        f"| 60% | {' | '.join(f'{name}, test | closed: test, wikitext2 | s' for name in NAMES)} |",
        "|---" * (1 + 3 * len(NAMES)) + "|",
    ]
    for method in methods:
        line = []
        for testbed in NAMES:
            seeds = [seed for seed in range(3) if (testbed, method, seed, "test") in known]
            if not seeds:
                line.append(" | | ")
                continue
            found = [known[testbed, method, seed, "test"] for seed in seeds]
            middle = exp(stats.mean(log(r["ppl"]) for r in found))
            spread = f" ± {max(abs(r['ppl'] - middle) for r in found):.2f}" if len(seeds) > 1 else ""
            closed = {text: [closes(known, testbed, method, seed, text) for seed in seeds] for text in ("test", "wikitext2")}
            shares = ", ".join(f"{stats.mean(values):.1f}%" for values in closed.values()) if method != "sparsegpt" else ""
            line.append(f"{middle:.2f}{spread} | {shares} | {stats.median(r['wall_s'] for r in found):.0f}")
        lines.append(f"| {method} | {' | '.join(line)} |")
    lines.append("")
    for method in (method for method in METHODS if method != "sparsegpt" and method in methods):
        each = []
        for name in NAMES:
            seeds = [seed for seed in range(3) if (name, method, seed, "test") in known]
            each.append(f"{name} " + ", ".join(f"{closes(known, name, method, seed, 'test'):.1f}%" for seed in seeds))
        lines.append(f"{method}, test, seed by seed: {'; '.join(each)}.")
    return "\n".join(lines)


def closes(known: dict[Any, Record], testbed: str, method: str, seed: int, text: str) -> float:
    """Percent of the gap between SparseGPT and dense."""
    base, new = known[testbed, "sparsegpt", seed, text], known[testbed, method, seed, text]
    return 100 * gap(base["ppl"], new["ppl"], new["dense"])


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("cells")
@click.option("--testbed", type=click.Choice(NAMES), help="Only this one.")
@click.option("--method", type=click.Choice(tuple(METHODS | OTHERS)), help="Only this one.")
def run_cells(testbed: str | None, method: str | None) -> None:
    """Every cell that is not there yet; then the table."""
    labs = {name: Lab(Testbed(name)) for name in NAMES}
    asked = (cell for cell in cells() if testbed in (None, cell.testbed) and method in (None, cell.method))
    finish_cells(
        asked, lambda cell: labs[cell.testbed].run(cell), lambda found: ", ".join(f"{r['text']} {r['ppl']:.3f}" for r in found["records"])
    )
    records = gather(RESULTS, list(cells()))
    write_json(RESULTS, records)
    click.echo("\n" + table(records))


@main.command("table")
def show() -> None:
    """The table of the recorded results."""
    click.echo(table(recorded(RESULTS)))


@main.command()
@click.option("--count", default=3, show_default=True)
@click.option("--seed", type=int, help="Which cells; random without.")
def verify(count: int, seed: int | None) -> None:
    """Recompute random cells of the recorded results."""
    recompute(RESULTS, Cell, lambda cell: Lab(Testbed(cell.testbed)).run(cell), ("dense", "ppl"), count, seed)


ROWS, LENGTH = 4, 2048  # 8,192 tokens, a quarter held out


def large(method: str) -> PruneParams:
    """A method's parameters for the large block: rows one by one, as long rows want."""
    changes = {
        "selection": {"sparsity": 0.6},
        "batch_rows": 1,
        "reconstruction": {"channel": {"batch_rows": 1}, "block": {"batch_rows": 1}},
    }
    merged = params.merge(params.merge(params.section("prune"), changes), {"reconstruction": (METHODS | OTHERS)[method]})
    return PruneParams.model_validate(merged)


@main.command()
@click.option("--width", default=4096, show_default=True)
@click.option("--inner", default=11008, show_default=True)
@click.option("--only", help="One method, in this process: what the command calls itself with.")
@click.option("--model", type=click.Path(path_type=Path), help="With --only: where the model is.")
def block(width: int, inner: int, only: str | None, model: Path | None) -> None:
    """One random LLaMA-7B-shaped block, 8,192 tokens, through each reconstruction: seconds and peak memory against the formula of ``make plan``."""
    if only and model:
        click.echo(json.dumps(_large_block(model, only)))
        return
    with tempfile.TemporaryDirectory() as folder:
        large_block(Path(folder), width, inner)
        results = recorded(BLOCK)
        for method in missing(results):
            call = [sys.executable, "-m", "benchmarks.reconstruction", "block", "--only", method, "--model", folder]
            told = subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]
            click.echo(told)
            results.append(json.loads(told))
            write_json(BLOCK, results)


def large_block(folder: Path, width: int, inner: int) -> None:
    """Save a random Llama of one block."""
    torch.manual_seed(0)
    heads = width // 128 or 1
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": heads}
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=512, max_position_embeddings=LENGTH, tie_word_embeddings=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def missing(results: list[Record]) -> list[str]:
    """The methods that are not there yet."""
    return [method for method in ("sparsegpt", "asymmetric", "lsq", "block") if method not in {r["method"] for r in results}]


def _large_block(model: Path, method: str) -> dict[str, Any]:
    checkpoint = open_checkpoint(model)
    settings = large(method)
    speed = measure_speed(torch.device("cpu"))
    needs = pruning(checkpoint, method, settings, ROWS, LENGTH, torch.float32)
    random = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 512, (ROWS, LENGTH), generator=random)
    shapes = {matrix: checkpoint.matrix_shape(0, matrix) for matrix in checkpoint.architecture.matrices}
    kept = {(0, matrix): target(settings.selection.sparsity, r * c) for matrix, (r, c) in shapes.items()}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        stream = BlockModel(checkpoint, torch.float32, torch.device("cpu"))
        found = dict(prune(stream, rows[: ROWS - 1], rows[ROWS - 1 :], kept, [Transform()], settings, lambda _: None, Path(scratch)))
    seconds = time.perf_counter() - started
    facts = found[0].facts
    errors = [m["layer_error"] for m in facts["matrices"].values()]
    record = {"method": method, "tokens": ROWS * LENGTH, "threads": torch.get_num_threads(), "wall_s": round(seconds, 1)}
    record |= {"predicted_s": round(needs.seconds(speed), 1), "gflops": round(speed / 1e9)}
    record |= {"peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)}
    record |= {"predicted_gb": round(needs.memory_bytes / 1e9, 2), "of_which_libraries_gb": LIBRARIES / 1e9}
    record |= {
        "mean_layer_error": round(stats.mean(errors), 4),
        "lsq_iterations": [m.get("lsq_iterations") for m in facts["matrices"].values()],
    }
    return record | {step: facts[step] for step in ("channel", "block") if step in facts} | {"commit": commit()}


if __name__ == "__main__":
    main()
