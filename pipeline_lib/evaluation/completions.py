"""Greedy completions of the first samples of the evaluation text."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import Watched
from pipeline_lib.evaluation.settings import CompletionsParams


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: torch.Tensor,
    params: CompletionsParams,
    watched: Watched = iter,
) -> list[dict[str, str]]:
    """Greedy completions of the first ``prompt_tokens`` of the first ``count`` samples [N, T].

    A completion ends before the end-of-text token, or after ``new_tokens``. The loop is our own,
    because ``generate`` follows the checkpoint's generation config (repetition penalties,
    sampling). ``watched`` counts the tokens.

    Raises:
        SparselineError: the samples or the model's context window are too short.
    """
    if params.count == 0:
        return []
    if len(rows) < params.count or rows.shape[1] < params.prompt_tokens:
        raise SparselineError(
            f"Completions need {params.count} rows of {params.prompt_tokens} tokens, but the text"
            f" {params.text!r} has {len(rows)} of {rows.shape[1]}; lower count or prompt_tokens."
        )
    window = getattr(model.config, "max_position_embeddings", None)
    if window is not None and params.prompt_tokens + params.new_tokens > window:
        raise SparselineError(
            f"Completions of {params.prompt_tokens} + {params.new_tokens} tokens do not fit into the"
            f" model's {window} positions; lower prompt_tokens or new_tokens."
        )
    prompts = rows[: params.count, : params.prompt_tokens]
    sequence = prompts.to(model.device)
    following = _Following(model)
    with torch.inference_mode():
        for _ in watched(range(params.new_tokens)):
            sequence = torch.cat([sequence, following(sequence)], dim=1)
    pairs = zip(prompts.tolist(), sequence[:, params.prompt_tokens :].tolist(), strict=True)
    return [
        {"prompt": _text(tokenizer, p), "completion": _text(tokenizer, _until_end(tokenizer, c))}
        for p, c in pairs
    ]


class _Following:
    """The most likely token after a sequence [B, T] that grows by a token each time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.cache = model, None
        known = inspect.signature(model.forward).parameters
        self.cached = "past_key_values" in known
        self.keep = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def __call__(self, sequence: torch.Tensor) -> torch.Tensor:
        """The tokens [B, 1]. Models without the usual cache, and those whose cache fails, read the
        whole sequence again.
        """
        if self.cached:
            try:
                new = sequence if self.cache is None else sequence[:, -1:]
                output = self.model(input_ids=new, past_key_values=self.cache, use_cache=True, **self.keep)
                self.cache = output.past_key_values
                return output.logits[:, -1:].argmax(-1)
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                # transformers' caches do not work for every model
                self.cached = False
        return self.model(input_ids=sequence, use_cache=False, **self.keep).logits[:, -1:].argmax(-1)


def _until_end(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[int]:
    end: Any = tokenizer.eos_token_id
    return tokens[: tokens.index(end)] if end in tokens else tokens


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
