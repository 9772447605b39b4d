"""Prompts: the beginnings of documents and chats, which a model continues."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.texts.chat import ask
from pipeline_lib.texts.rows import encode
from pipeline_lib.texts.texts import GeneratedParams, TextParams, Texts

# characters of a document that the tokenizer is given per token of a prompt: more than tokens have
# on average
CHARACTERS = 40


def prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Texts, params: TextParams, how: GeneratedParams, most: int
) -> list[list[int]]:
    """Prompts as tokens, in the order of the source: the first ``prompt_tokens`` of a document; of
    a chat everything before its last answer, in the model's template.

    Shorter documents are skipped, and so are chats of more than ``most`` tokens.

    Raises:
        SparselineError: none is left.
    """
    if params.chat_template:
        found = [
            ids for ids in encode(tokenizer, ask(tokenizer, texts.chats, texts.places)) if len(ids) <= most
        ]
        left = (
            f"no chat with at most {most} tokens before its last answer; lower new_tokens, or give shorter"
            " chats"
        )
    else:
        openings = [document[: CHARACTERS * how.prompt_tokens] for document in texts.documents]
        found = _openings(encode(tokenizer, openings), how.prompt_tokens)
        left = f"no document of {how.prompt_tokens} tokens; lower prompt_tokens, or give longer documents"
    if not found:
        raise SparselineError(f"The text at {params.path} has {left}.")
    return found


def _openings(documents: Sequence[list[int]], length: int) -> list[list[int]]:
    return [ids[:length] for ids in documents if len(ids) >= length]
