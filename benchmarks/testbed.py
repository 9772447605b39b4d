"""The testbeds: small trained models and texts outside the repository, and the protocol that all
records share.

Tokens: the start token before each document; documents are joined and cut into rows of 256.
Calibration: 128 rows drawn with the seed, a quarter of them held out. Validation: the first 128
rows; test: the first 256 rows of the mixture's test text and of WikiText-2's.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path

import click
import torch
from transformers import PreTrainedModel

from pipeline_lib.core import params, runtime
from pipeline_lib.core.random import generator
from pipeline_lib.evaluation.perplexity import perplexity
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint
from pipeline_lib.models.start import start
from pipeline_lib.models.stream import BlockModel
from pipeline_lib.models.tokenizer import load_tokenizer
from pipeline_lib.models.whole import load_model
from pipeline_lib.texts.rows import encode, rows_of, split
from pipeline_lib.texts.texts import TextParams, read_texts

ROOT = Path(os.environ.get("SPARSELINE_TESTBED", Path(__file__).parent.parent.parent / "shared" / "testbed"))
NAMES = ("llama", "opt")
# sources of calibration rows; the first is the shipped text
CODE, RANDOM, MIXTURE = "python code", "random tokens", "mix.calib"
# source, rows
TEXTS = {"validation": ("mix.valid", 128), "test": ("mix.test", 256), "wikitext2": ("wikitext2.test", 256)}
LENGTH = 256
HELD_OUT = 0.25
# block -> parameter, named relative to the block -> tensor
Tensors = Mapping[int, Mapping[str, torch.Tensor]]


class Bed:
    """A checkpoint, and random rows for it. Weights are read on demand. Device and threads are
    those of the settings.
    """

    def __init__(self, path: Path, length: int) -> None:
        self.path, self.length, self.device = path, length, runtime.compute()
        self.known: dict[str, float] = {}  # the dense model's perplexities

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.path)

    @functools.cached_property
    def whole(self) -> PreTrainedModel:
        """The model that evaluations put pruned blocks into."""
        return load_model(self.path, "float32", torch.device("cpu"))

    def stream(self) -> BlockModel:
        return BlockModel(self.checkpoint, torch.float32, self.device)

    def rows(self, source: str, count: int, seed: int | None = None) -> torch.Tensor:
        """Token rows [count, length], drawn with the seed.

        Raises:
            ValueError: there are no rows of this source.
        """
        if source != RANDOM:
            raise ValueError(f"{self.path} has no rows of {source}")
        return torch.randint(
            self.checkpoint.config.vocab_size, (count, self.length), generator=generator(seed or 0, RANDOM)
        )

    def calibration(self, source: str, count: int, seed: int, training: int = 0) -> dict[str, torch.Tensor]:
        """``fit``, ``held_out`` and ``training`` rows, the last ones in addition; of a single row none
        is held out.
        """
        rows = self.rows(source, count + training, seed)
        return split(rows, HELD_OUT if count > 1 else 0, training)

    @torch.no_grad()
    def perplexity(self, blocks: Tensors, text: str) -> float:
        """Perplexity of the model with these tensors in the place of its own."""
        base = self.whole.base_model.get_submodule(self.checkpoint.architecture.blocks)
        for index in range(self.checkpoint.architecture.depth):
            base.get_submodule(str(index)).load_state_dict(
                blocks.get(index) or self.checkpoint.block(index), strict=False
            )
        return perplexity(self.whole, self.rows(*TEXTS[text]), 16)

    def dense(self, text: str) -> float:
        """Perplexity of the dense model."""
        if text not in self.known:
            self.known[text] = self.perplexity({}, text)
        return self.known[text]


class Testbed(Bed):
    """One of the trained models, and its texts."""

    def __init__(self, name: str) -> None:
        if not ROOT.exists():
            raise click.ClickException(
                f"no testbeds at {ROOT}; set SPARSELINE_TESTBED to a directory with llama, opt and texts."
            )
        super().__init__(ROOT / name, LENGTH)

    def rows(self, source: str, count: int, seed: int | None = None) -> torch.Tensor:
        """Token rows [count, 256], drawn with the seed; without a seed, the first ones."""
        if source == RANDOM:
            return super().rows(source, count, seed)
        asked = {
            "packing": "concatenate",
            "rows": count,
            "training": 0,
            "length": LENGTH,
            "seed": seed,
            "chat_template": False,
            "distinct": 1,
        }
        cut = TextParams.model_construct(None, path=Path(source), **asked)
        tokenizer = load_tokenizer(self.path, self.checkpoint.config.vocab_size)
        return rows_of(
            encode(tokenizer, _documents(source)),
            cut,
            start("document", self.checkpoint.config.model_type, tokenizer),
        )


def inputs(name: str, texts: tuple[str, ...], source: str) -> list[Path]:
    """The files that a cell on these texts depends on."""
    files = [source, *(TEXTS[text][0] for text in texts)]
    return [
        ROOT / name / "model.safetensors",
        *(ROOT / "texts" / f"{file}.txt" for file in files if file not in (CODE, RANDOM)),
    ]


@functools.cache
def _documents(source: str) -> list[str]:
    if source == CODE:
        return read_texts(params.load(TextParams, "texts.calibration")).documents
    text = (ROOT / "texts" / f"{source}.txt").read_text(encoding="utf-8")
    return [document.strip("\n") for document in text.split("<|doc|>\n") if document.strip()]
