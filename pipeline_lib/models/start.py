"""The start-of-sequence token of a model, and its position in its family's usual evaluation."""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from pipeline_lib.core.errors import SparselineError

Place = Literal["document", "row", "none"]

# Model types whose usual evaluation gives every row a start token. For other types, every document
# has one. Gemma's perplexity on WikiText-2 is about 650 without the token and 21 with it; lm-eval
# forces it for this family (EleutherAI/lm-evaluation-harness#1465, huggingface/transformers#29250).
# The scripts of GPTQ, SparseGPT and Wanda tokenise the joined text once, so only its beginning has the
# token. This is `document` for a text of one document.
ROW = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text"})


@dataclass(frozen=True)
class Start:
    """The position of the start token in the samples of a text."""

    place: Place
    token: int | None  # None: the tokenizer has none, and place is "none"


def usual(model_type: str) -> Place:
    """The position of the start token in the family's usual evaluation."""
    return "row" if model_type in ROW else "document"


def start(place: Place | None, model_type: str, tokenizer: PreTrainedTokenizerBase) -> Start:
    """The requested position, or for None the family's usual one. The token is the tokenizer's BOS
    token, else its EOS token.

    Raises:
        SparselineError: a start token is requested, but the tokenizer has none.
    """
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is not None:
        return Start(place or usual(model_type), token)
    if place in (None, "none"):
        return Start("none", None)
    raise SparselineError(
        f"params.yaml: a text has start: {place}, but the model's tokenizer has no start token; set start:"
        " none."
    )
