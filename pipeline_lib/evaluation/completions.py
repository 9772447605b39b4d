"""What a model writes: greedy completions of the evaluation text's first rows, to look at."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import Watched
from pipeline_lib.evaluation.settings import CompletionsParams


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: torch.Tensor, params: CompletionsParams, watched: Watched = iter
) -> list[dict[str, str]]:
    """The most likely token, again and again, after the first ``prompt_tokens`` of the first ``count`` rows [N, T].

    A completion ends before the end-of-text token, or after ``new_tokens``. The loop is ours, because ``generate`` adds whatever the
    checkpoint's generation config asks for (repetition penalties, sampling). ``watched`` sees every token pass.

    Raises:
        SparselineError: rows or the model's window are too short.
    """
    if params.count == 0:
        return []
    if len(rows) < params.count or rows.shape[1] < params.prompt_tokens:
        raise SparselineError(
            f"Completions want {params.count} rows of {params.prompt_tokens} tokens, but the text {params.text!r} has {len(rows)} of "
            f"{rows.shape[1]}; lower count or prompt_tokens."
        )
    window = getattr(model.config, "max_position_embeddings", None)
    if window is not None and params.prompt_tokens + params.new_tokens > window:
        raise SparselineError(
            f"Completions of {params.prompt_tokens} + {params.new_tokens} tokens do not fit the model's {window} positions; "
            "lower prompt_tokens or new_tokens."
        )
    prompts = rows[: params.count, : params.prompt_tokens]
    token, cache, written = prompts.to(model.device), None, []
    with torch.inference_mode():
        for _ in watched(range(params.new_tokens)):
            output = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            written.append(token)
    pairs = zip(prompts.tolist(), torch.cat(written, dim=1).tolist(), strict=True)
    return [{"prompt": _text(tokenizer, p), "completion": _text(tokenizer, _until_end(tokenizer, c))} for p, c in pairs]


def _until_end(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[int]:
    end: Any = tokenizer.eos_token_id
    return tokens[: tokens.index(end)] if end in tokens else tokens


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
