"""Load a whole checkpoint for evaluation and for gradients of its loss."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline_lib.models import attention
from pipeline_lib.models.checkpoint import read_config


def load_model(path: Path, dtype: str, device: torch.device) -> PreTrainedModel:
    """The model in one copy, in evaluation mode, without gradients."""
    attention.register()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, config=read_config(path), dtype=getattr(torch, dtype))
    return model.to(device).eval().requires_grad_(False)
