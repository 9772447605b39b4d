"""Generate text with a model.

Shape letters: ``B`` prompts in a batch, ``V`` tokens of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline_lib.core.random import generator


@dataclass(frozen=True)
class Drawing:
    """Parameters of the sampling."""

    new_tokens: int  # at most
    temperature: float  # 0: always the most likely token
    seed: int


def ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end-of-text tokens: those of the model's generation config, else the tokenizer's; possibly
    none.
    """
    found = getattr(model.generation_config, "eos_token_id", None)
    found = tokenizer.eos_token_id if found is None else found
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def continued(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    numbers: Sequence[int],
    how: Drawing,
    ends: Sequence[int],
) -> list[list[int]]:
    """The tokens that follow each prompt, up to and including the first of ``ends``.

    Tokens are drawn from softmax(logits / temperature) by Gumbel's trick: take the token with the
    largest logits / temperature + noise. The noise depends only on the seed and the prompt's number,
    so the split into batches changes nothing but the model's rounding. The checkpoint's generation
    config (repetition penalties, top-k) is not used.
    """
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    kept, model.generation_config = model.generation_config, GenerationConfig()
    config = GenerationConfig(
        do_sample=False, max_new_tokens=how.new_tokens, eos_token_id=list(ends) or None, pad_token_id=0
    )
    noise = LogitsProcessorList([_Noise(how, numbers)] if how.temperature else [])
    try:
        with torch.inference_mode():
            given = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
            written = model.generate(**given, generation_config=config, logits_processor=noise)
    finally:
        model.generation_config = kept
    return [_until_end(row, ends) for row in written[:, longest:].tolist()]


class _Noise(LogitsProcessor):  # type: ignore[misc]
    """Gumbel noise on logits [B, V], drawn on the CPU, prompt by prompt."""

    def __init__(self, how: Drawing, numbers: Sequence[int]) -> None:
        self.temperature = how.temperature
        self.generators = [generator(how.seed, f"prompt {number}") for number in numbers]

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = torch.stack(
            [torch.empty(scores.shape[-1]).exponential_(generator=one) for one in self.generators]
        )
        return scores.float() / self.temperature - drawn.log().to(scores.device)


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    last = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]
