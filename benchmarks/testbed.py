"""The testbeds, in memory: small trained models and texts outside the repository, and the protocol that all records share.

Tokens: per document the start token, then its tokens; documents joined, cut into rows of 256. Calibration: 128 rows drawn with the
seed, a quarter held out. Validation: the first 128 rows; test: the first 256 rows of the mixture's test text and of WikiText-2's.
"""

import functools
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pipeline_lib.core import params, products
from pipeline_lib.core.counts import target
from pipeline_lib.core.runtime import generator
from pipeline_lib.evaluation.perplexity import perplexity
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint
from pipeline_lib.models.folding import fold
from pipeline_lib.models.start import start
from pipeline_lib.models.stream import BlockModel
from pipeline_lib.models.tokenizer import load_tokenizer
from pipeline_lib.models.whole import load_model
from pipeline_lib.texts.rows import encode, rows_of, split
from pipeline_lib.texts.texts import TextParams, read_texts

ROOT = Path(os.environ.get("SPARSELINE_TESTBED", Path(__file__).parent.parent.parent / "shared" / "testbed"))
NAMES = ("llama", "opt")
CODE = "python code"  # the shipped calibration text: modules of the standard library
TEXTS = {"code": CODE, "calibration": "mix.calib", "validation": "mix.valid", "test": "mix.test", "wikitext2": "wikitext2.test"}
ROWS = {"code": 128, "calibration": 128, "validation": 128, "test": 256, "wikitext2": 256}
LENGTH = 256


@dataclass
class Testbed:
    """One of the two models, opened; weights are read when asked for."""

    name: str
    root: Path = ROOT  # another one for a twin
    compute_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not ROOT.exists():
            raise click.ClickException(f"no testbeds at {ROOT}; set SPARSELINE_TESTBED to a directory with llama, opt and texts.")
        products.choose()  # as every stage does

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.root / self.name)

    @functools.cached_property
    def whole(self) -> PreTrainedModel:
        """The model that evaluations put their weights into."""
        return load_model(self.root / self.name, "float32", torch.device("cpu"))

    def stream(self) -> BlockModel:
        return BlockModel(self.checkpoint, self.compute_dtype, torch.device("cpu"))

    def rows(self, text: str, seed: int | None = None, count: int | None = None) -> torch.Tensor:
        """Token rows [N, 256]; as many as the protocol says, or ``count``."""
        documents = _documents(TEXTS[text])
        asked = {"path": TEXTS[text], "packing": "concatenate", "rows": count or ROWS[text], "length": LENGTH, "seed": seed}
        cut = TextParams.model_construct(**asked, chat_template=False, distinct=1)
        tokenizer = load_tokenizer(ROOT / self.name, self.checkpoint.config.vocab_size)
        return rows_of(encode(tokenizer, documents), cut, start("document", self.checkpoint.config.model_type, tokenizer))

    def calibration(self, seed: int) -> dict[str, torch.Tensor]:
        """``fit`` and ``held_out`` rows."""
        return split(self.rows("calibration", seed), 0.25)

    def uniform(self, sparsity: float) -> dict[tuple[int, Matrix], int]:
        """Kept counts with every matrix at the same sparsity, by block and matrix."""
        entry = self.checkpoint.architecture
        places = [(index, matrix) for index in range(entry.depth) for matrix in entry.matrices]
        return {place: target(sparsity, math.prod(self.checkpoint.matrix_shape(*place))) for place in places}

    @torch.no_grad()
    def loaded(self, blocks: dict[int, dict[str, torch.Tensor]]) -> PreTrainedModel:
        """The whole model with the given blocks' tensors (named relative to the block) in the place of its own."""
        base = self.whole.base_model.get_submodule(self.checkpoint.architecture.blocks)
        for index in range(self.checkpoint.architecture.depth):
            tensors = blocks.get(index) or self.checkpoint.block(index)
            base.get_submodule(str(index)).load_state_dict(tensors, strict=False)
        return self.whole

    @torch.no_grad()
    def perplexity(self, blocks: dict[int, dict[str, torch.Tensor]], text: str) -> float:
        return perplexity(self.loaded(blocks), self.rows(text), 16)


def inputs(name: str, texts: tuple[str, ...]) -> list[Path]:
    """The files that a cell on these texts depends on."""
    return [ROOT / name / "model.safetensors", *(ROOT / "texts" / f"{TEXTS[text]}.txt" for text in ("calibration", *texts))]


def scrambled(bed: Testbed, root: Path, seed: int, spread: float = 1.0) -> Testbed:
    """A twin that computes the same function: random factors, log-normal of this spread, folded exactly into every block."""
    source = bed.checkpoint
    tensors = dict(source.read(source.outside_blocks()))
    for index in range(source.architecture.depth):
        factors = {
            c.name: torch.exp(spread * torch.randn(c.size, generator=generator(seed, f"{index}.{c.name}")))
            for c in source.architecture.couplings
        }
        folded = fold(source.block(index), source.architecture, factors)
        tensors |= {source.block_prefix(index) + name: tensor for name, tensor in folded.items()}
    directory = root / bed.name
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(bed.root / bed.name / "config.json", directory / "config.json")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors", metadata={"format": "pt"})
    return Testbed(bed.name, root)


@functools.cache
def _documents(name: str) -> list[str]:
    if name == CODE:
        return read_texts(params.load(TextParams, "texts.calibration")).documents
    text = (ROOT / "texts" / f"{name}.txt").read_text(encoding="utf-8")
    return [document.strip("\n") for document in text.split("<|doc|>\n") if document.strip()]
