"""Print what `make plan` predicts for a model that is not here: ``python -m benchmarks.planned
[SHAPE ...]``.

The model is a configuration and the header of a safetensors file, which has no data: a plan reads
no weight. It is pruned by variants of params.yaml with both papers' 128 rows of 2,048 tokens, in
bfloat16, with 8 probes in a pass. There are 1, 4 and 8 GPUs of 80 GB, one for each process. Bold:
more than a GPU has.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import click
import torch
from ruamel.yaml import YAML
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.block import SHAPES, Shape
from benchmarks.harness import ROOT
from pipeline_lib.command import layout
from pipeline_lib.core import environment
from pipeline_lib.jobs.plan import Machine, Planned, counted
from pipeline_lib.planning.device import CONTEXT

BLOCKS, VOCABULARY = {"llama-7b": 32, "llama-70b": 80}, 32000
VARIANTS = ("sparsegpt", "fast", "best")
GPUS, MEMORY = (1, 4, 8), 80e9
PROBES = 8  # of `sensitivity` in one pass: the inputs of 80 blocks are kept for each


def save(shape: Shape, folder: Path) -> None:
    """Write a configuration, a tokenizer, and files of bfloat16 weights whose data are holes."""
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.blocks,
        vocab_size=shape.vocabulary,
        dtype=torch.bfloat16,
    )
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    shards: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        block = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{block}.safetensors", {})[name] = tensor
    folder.mkdir(parents=True)
    for file, own in shards.items():
        _write(folder / file, own)
    places = {name: file for file, own in shards.items() for name in own}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)
    for path in (ROOT / "data" / "tiny-llama").glob("tokenizer*"):
        shutil.copy(path, folder)


def _write(path: Path, tensors: dict[str, Any]) -> None:
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)


def lay_out(shape: Shape, home: Path) -> None:
    """Write a project that prunes the model."""
    layout.lay_out(home, layout.shipped())
    save(shape, home / "data" / "model")
    environment.write(home / environment.FILE)
    yaml = YAML()
    params = yaml.load(home / layout.PARAMS)
    params["model"] |= {"path": "data/model", "compute_dtype": "bfloat16"}
    params["sensitivity"] |= {"probes_per_pass": PROBES}
    params["evaluate"] |= {"compute_dtype": "bfloat16"}
    for text in params["texts"].values():
        text |= {"rows": 128, "length": 2048}
    for name in set(params["variants"]) - set(VARIANTS):
        del params["variants"][name]
    yaml.dump(params, home / layout.PARAMS)


def plans(shape: Shape) -> Iterator[Planned]:
    """The plan for each number of GPUs."""
    with tempfile.TemporaryDirectory() as place:
        lay_out(shape, Path(place) / "project")
        with chdir(Path(place) / "project"):
            for count in GPUS:
                yield counted(Machine("cuda", MEMORY, count))


def table(found: Sequence[Planned]) -> str:
    """Markdown table: GB on a GPU and in the host's memory, of one process, and time relative to
    one process.
    """
    columns = [f"{count} GPU{'s' * (count > 1)}" for count in GPUS]
    lines = [f"| stage | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for alike in zip(*(one.steps for one in found), strict=True):
        steps = [step for step, _ in alike]
        cells = []
        for step in steps:
            host = step.memory_bytes if step.host_bytes is None else step.host_bytes
            fits = step.gpu_bytes + CONTEXT <= MEMORY
            time = f", {step.flops / steps[0].flops:.2f} of the time" if step.flops else ""
            bold = "" if fits else "**"
            cells.append(f"{bold}{step.gpu_bytes / 1e9:.1f}{bold} + {host / 1e9:.1f}{time}")
        lines.append(f"| {steps[0].stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument("shapes", nargs=-1, type=click.Choice(sorted(BLOCKS)))
def main(shapes: tuple[str, ...]) -> None:
    for name in shapes or ("llama-70b",):
        shape = dataclasses.replace(SHAPES[name], blocks=BLOCKS[name], vocabulary=VOCABULARY)
        click.echo(
            f"{name}: GB on the GPU + in the host's memory, for each process\n\n{table(list(plans(shape)))}"
        )


if __name__ == "__main__":
    main()
