"""Check that llama.cpp reads the GGUF files that the pipeline writes, and continues prompts as
transformers does: ``python -m benchmarks.gguf_files [DIRECTORY...]``, after ``make
llama-environment``.

A directory holds a ``model.gguf``. Without directories, one file of each kind is made: the pipeline
prunes the embedded model to 50% in fresh clones, and quantises it as in ``KINDS``. F16 is made from
a copy of the model in float16.

The tokens of prompts and greedy continuations are compared. llama.cpp rounds activations
differently from transformers in float32 (to 8 bits beside quantised weights). So two continuations
part where two tokens are about equally likely; the gap between their logits in transformers is
printed.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness import ROOT
from pipeline_lib.core.params import merge
from pipeline_lib.export.gguf import FILE

PYTHON = os.environ.get("SPARSELINE_LLAMA", str(ROOT / ".llama" / "bin" / "python"))
PROMPTS = (
    "def main(",
    "import os\nimport sys\n\n",
    "class Reader:\n    def __init__(self,",
    "# Returns the ",
)
GRID = {"group": 32, "scales": "gguf"}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "F16": {},
    "BF16": {},
    "Q8_0": {"quantization": {"bits": 8, **GRID}},
    "Q4_0": {"quantization": {"bits": 4, **GRID}},
    "Q4_1": {"quantization": {"bits": 4, "symmetric": False, **GRID}},
}


def made(home: Path) -> Iterator[Path]:
    """Make one file of each kind by the pipeline, and yield their directories."""
    for dtype, kinds in (("bfloat16", [kind for kind in KINDS if kind != "F16"]), ("float16", ["F16"])):
        clone = home / dtype
        subprocess.run(("git", "clone", "--quiet", str(ROOT), str(clone)), check=True)
        if dtype == "float16":
            model = AutoModelForCausalLM.from_pretrained(clone / "data/tiny-llama", dtype=torch.float16)
            model.save_pretrained(clone / "data/tiny-llama")
        described, reader = clone / "params.yaml", YAML(typ="safe")
        values = reader.load(described)
        base = {**values["variants"]["sparsegpt"], "export": ["gguf"], "candidate": False}
        values["variants"] = {kind: merge(base, KINDS[kind]) for kind in kinds}
        values["report"]["baseline"] = kinds[0]
        reader.dump(values, described)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "SPARSELINE_SCRATCH": str(clone / "scratch")}
        for command in (
            (sys.executable, "-m", "stages.environment"),
            (sys.executable, "-m", "stages.preload", "dvc", "repro", *(f"export@{kind}" for kind in kinds)),
        ):
            subprocess.run(command, cwd=clone, env=environment, check=True, stdout=subprocess.DEVNULL)
        yield from (clone / "build" / "export" / kind / "gguf" for kind in kinds)


def kinds(file: Path) -> str:
    """The kinds of the matrices of the blocks."""
    from gguf import GGUFReader

    tensors = GGUFReader(file).tensors
    return ", ".join(
        sorted(
            {one.tensor_type.name for one in tensors if one.name.startswith("blk.") and len(one.shape) > 1}
        )
    )


@torch.no_grad()
def compared(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, theirs: Mapping[str, list[int]]
) -> tuple[bool, int, float]:
    """Whether the prompt's tokens agree; how many tokens of the continuation agree, from the first
    one on; and the gap between transformers' logits of the first two tokens that differ.
    """
    tokens = tokenizer(prompt)["input_ids"]
    if tokens != theirs["tokens"]:
        return False, 0, float("nan")
    for number, other in enumerate(theirs["new"]):
        logits = model(input_ids=torch.tensor([[*tokens, *theirs["new"][:number]]])).logits[0, -1]
        own = int(logits.argmax())
        if own != other:
            return True, number, float(logits[own] - logits[other])
    return True, len(theirs["new"]), 0.0


def told(directory: Path, prompts: tuple[str, ...], count: int) -> tuple[str, bool]:
    """A sentence on one file, and whether all tokens of the prompts and half of the others agree."""
    command = [PYTHON, str(ROOT / "benchmarks" / "llama_continue.py"), str(directory / FILE), str(count)]
    ran = subprocess.run([*command, *prompts], capture_output=True, text=True, check=False)
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"{directory}: llama.cpp does not read it ({reason})", False
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=FILE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=FILE)
    found = [
        compared(model, tokenizer, prompt, theirs)
        for prompt, theirs in zip(prompts, json.loads(ran.stdout), strict=True)
    ]
    same = sum(number for _, number, _ in found)
    gaps = [f"{gap:.3f}" for _, number, gap in found if number < count]
    parted = f"; they part where two logits are {', '.join(gaps)} apart" if gaps else ""
    return (
        f"{kinds(directory / FILE)}: the tokens of {sum(own for own, _, _ in found)} of {len(found)} prompts"
        f" agree, and of their greedy continuations {same} of {count * len(found)} tokens{parted}",
        all(own for own, _, _ in found) and 2 * same >= count * len(found),
    )


@click.command(help=__doc__)
@click.argument("directories", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--prompt", "prompts", multiple=True, default=PROMPTS, help="May be given several times.")
@click.option("--count", default=32, show_default=True, help="Tokens that follow each prompt.")
def main(directories: tuple[Path, ...], prompts: tuple[str, ...], count: int) -> None:
    if not Path(PYTHON).exists():
        raise click.ClickException(f"there is no {PYTHON}; run `make llama-environment`.")
    failed = 0
    with tempfile.TemporaryDirectory() as home:
        for directory in directories or made(Path(home)):
            said, fine = told(directory, prompts, count)
            failed += not fine
            click.echo(said)
    if failed:
        raise click.ClickException(f"{failed} files are not read as transformers reads them.")


if __name__ == "__main__":
    main()
