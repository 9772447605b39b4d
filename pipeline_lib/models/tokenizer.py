"""The model directory's tokenizer, checked against the model."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline_lib.core.errors import SparselineError


def load_tokenizer(path: Path, vocabulary: int) -> PreTrainedTokenizerBase:
    """The model directory's tokenizer.

    Raises:
        SparselineError: there is none, or it gives ids that the model has no embedding for.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SparselineError(f"{path} holds no tokenizer that transformers can load: {' '.join(str(error).split())}") from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # transformers makes an empty one where OPT's files are missing
        raise SparselineError(f"{path} holds no tokenizer files (tokenizer.json or vocabulary); copy the model's own there.")
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocabulary:
        raise SparselineError(
            f"{path}: the tokenizer does not match the model: its ids go up to {largest}, the model's vocabulary has {vocabulary}; "
            "put the model's own tokenizer there."
        )
    return tokenizer
