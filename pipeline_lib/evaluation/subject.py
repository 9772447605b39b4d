"""Which model an evaluation is about: the source itself (``dense``), or a variant's saved checkpoint."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline_lib.core import params, runtime
from pipeline_lib.models.source import ModelParams, open_source
from pipeline_lib.models.tokenizer import load_tokenizer
from pipeline_lib.models.whole import load_model


def open_subject(variant: str, compute_dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, on the device that the settings name, and its tokenizer."""
    pruned = Path(f"build/prune/{variant}/checkpoint")
    directory = open_source(params.load(ModelParams, "model")).path if variant == "dense" else pruned
    model = load_model(directory, compute_dtype, runtime.device())
    return model, load_tokenizer(directory, model.config.vocab_size)
