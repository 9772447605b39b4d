"""Load a whole checkpoint for evaluation or for gradients of its loss."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from pipeline_lib.models import attention
from pipeline_lib.models.checkpoint import read_config
from pipeline_lib.models.files import find_files
from pipeline_lib.models.tokenizer import check_ids


def load_model(
    path: Path, dtype: str, device: torch.device, remote_code: bool = False, dequantize: bool = False
) -> PreTrainedModel:
    """The model in one copy, in evaluation mode, without gradients.

    Raises:
        SparselineError: there are two sets of weights, or none. Later, every call of the model raises
            it for a token id without an embedding.
    """
    find_files(path)  # refuses ambiguous weights
    attention.register()
    disable_progress_bar()  # stages report their own progress
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path,
        config=read_config(path, remote_code, dequantize),
        dtype=getattr(torch, dtype),
        trust_remote_code=remote_code,
        use_safetensors=True,
    )

    embedding = model.get_input_embeddings()
    vocabulary = len(embedding.weight)

    def check(_embedding: nn.Module, inputs: tuple[Any, ...]) -> None:
        check_ids(inputs[0], vocabulary)

    embedding.register_forward_pre_hook(check)
    # weights that transformers dequantised have the dtype of their scales
    return model.to(device, getattr(torch, dtype) if dequantize else None).eval().requires_grad_(False)
