"""Perplexity over rows of token ids."""

import math

import torch
from transformers import PreTrainedModel

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import Watched


def perplexity(model: PreTrainedModel, rows: torch.Tensor, batch_rows: int, watched: Watched = iter) -> float:
    """exp of the mean negative log-likelihood, in nats per token, over the T - 1 predicted tokens of every row of ``rows`` [N, T].

    Rows are independent: no overlap, no context from the row before. ``batch_rows`` rows go through the model at a time; losses are
    taken from float32 logits and summed in float64, row by row, so that the batch size leaves only the model's own rounding.

    ``watched`` sees every batch pass.

    Raises:
        SparselineError: there is nothing to predict, or the loss is not finite.
    """
    count, length = rows.shape
    if count < 1 or length < 2:
        raise SparselineError(f"Perplexity needs at least one row of two tokens, not {count} rows of {length}; give more text.")
    total = torch.zeros((), dtype=torch.float64)
    with torch.inference_mode():
        for start in watched(range(0, count, batch_rows)):
            batch = rows[start : start + batch_rows].to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits
            for row, predicted in zip(batch, logits, strict=True):  # one row's float32 logits at a time: vocabularies are large
                losses = torch.nn.functional.cross_entropy(predicted[:-1].float(), row[1:], reduction="none")
                total += losses.double().sum().cpu()
    mean = float(total) / (count * (length - 1))
    if not math.isfinite(mean) or mean > 700:  # exp(709) is the last double
        raise SparselineError(
            f"The model's mean loss is {mean:.4g}: its weights hold NaN or infinite values, or it overflows in {model.dtype}; "
            "prune less, or evaluate in float32."
        )
    return math.exp(mean)
