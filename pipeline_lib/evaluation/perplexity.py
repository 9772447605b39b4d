"""Perplexity of samples of token ids."""

import math
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

from pipeline_lib.core import ranks
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import Watched


def perplexity(
    model: PreTrainedModel,
    rows: torch.Tensor,
    batch_rows: int,
    watched: Watched = iter,
    see: Callable[[torch.Tensor], None] | None = None,
) -> float:
    """exp of the mean negative log-likelihood, in nats per token, over the T - 1 predicted tokens of
    every sample of ``rows`` [N, T].

    Samples are independent: no overlap, no context from the sample before. ``batch_rows`` samples
    pass through the blocks at a time. Losses come from float32 logits and are summed in float64,
    sample by sample. So the batch size changes only the model's own rounding, and only the logits
    of one sample are in memory.

    ``watched`` counts the batches; ``see`` gets the logits [T - 1, V] of each sample. If several
    processes run the stage, each takes consecutive batches (``own_rows``), and all get the result.

    Raises:
        SparselineError: there is nothing to predict, or the loss is not finite.
    """
    count, length = rows.shape
    if count < 1 or length < 2:
        raise SparselineError(
            f"Perplexity needs at least one sample of two tokens, not {count} samples of {length}; give"
            " more text."
        )
    sums: list[torch.Tensor] = []
    with torch.inference_mode():
        for start in watched(_own_starts(count, batch_rows)):
            batch = rows[start : start + batch_rows].to(model.device)
            for row, predicted in zip(batch, row_logits(model, batch), strict=True):
                losses = torch.nn.functional.cross_entropy(predicted[:-1].float(), row[1:], reduction="none")
                sums.append(losses.double().sum().cpu())
                if see is not None:
                    see(predicted[:-1])
    total = torch.zeros((), dtype=torch.float64)
    for one in ranks.joined(sums):
        total += one
    mean = float(total) / (count * (length - 1))
    if not math.isfinite(mean) or mean > 700:  # exp(709) is the last double
        raise SparselineError(
            f"The model's mean loss is {mean:.4g}: its weights contain NaN or infinite values, or it"
            f" overflows in {model.dtype}; prune less, or evaluate in float32."
        )
    return math.exp(mean)


def _own_starts(count: int, batch_rows: int) -> range:
    """The first row of each batch of this process."""
    starts = range(0, count, batch_rows)
    own = ranks.part(len(starts))
    return starts[own.start : own.stop]


def own_rows(rows: torch.Tensor, batch_rows: int) -> torch.Tensor:
    """The rows of ``rows`` [N, T] that this process evaluates."""
    starts = _own_starts(len(rows), batch_rows)
    return rows[starts.start : starts.stop]


def row_logits(model: PreTrainedModel, batch: torch.Tensor) -> Iterator[torch.Tensor]:
    """The logits [T, V] of each sample of ``batch`` [B, T], one after another, because the logits of a
    batch can be larger than the model.

    The blocks run once, on the whole batch. Then the model's own forward code computes the logits
    of each sample (head, scaling, capping), with a decoder that returns the sample's hidden states.
    """
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):  # some models call their head a decoder
        decoder = model.base_model
    states = None if decoder is model else decoder(input_ids=batch, use_cache=False)
    # the model has no separate module before the head
    if states is None or getattr(states, "last_hidden_state", None) is None:
        for row in batch.split(1):
            yield model(input_ids=row, use_cache=False).logits[0]
        return
    rows = states.last_hidden_state.split(1)
    decoder.forward = lambda *_args, **_kwargs: states
    try:
        for hidden in rows:
            states["last_hidden_state"] = hidden
            yield model(input_ids=batch[:1], use_cache=False).logits[0]
    finally:
        del decoder.forward
