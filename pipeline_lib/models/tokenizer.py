"""The model directory's tokenizer, checked against the model."""

import string
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline_lib.core.errors import SparselineError

SENTENCEPIECE = ("sentencepiece", "protobuf")  # packages that read tokenizer.model


def load_tokenizer(path: Path, vocabulary: int, remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model directory's tokenizer.

    Tokens beyond the model's ``vocabulary`` are allowed: a padding token is often added without an
    embedding.

    Raises:
        SparselineError: there is no tokenizer, a package is missing, or plain text gives ids without
            an embedding.
    """
    if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        for package in SENTENCEPIECE:
            try:
                version(package)
            except PackageNotFoundError as error:
                raise SparselineError(
                    f"{path / 'tokenizer.model'} needs the package {package}, which is not installed; run"
                    " `make environment`."
                ) from error
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=remote_code
        )
        probe = tokenizer(string.printable)["input_ids"]
    except Exception as error:  # transformers checks little, and raises whatever it meets
        if "trust_remote_code" in str(error):
            raise SparselineError(
                f"{path / 'tokenizer_config.json'} names custom tokenizer code, which is never run; "
                "put a tokenizer.json there that transformers reads without it."
            ) from error
        raise SparselineError(
            f"{path} holds no tokenizer that transformers can load: {' '.join(str(error).split())}"
        ) from error
    if (
        not probe or not tokenizer("a", add_special_tokens=False)["input_ids"]
    ):  # transformers creates an empty tokenizer if OPT's files are missing
        raise SparselineError(
            f"{path} holds no tokenizer files (tokenizer.json or vocabulary); copy the model's own there."
        )
    if max(probe) >= vocabulary:
        raise SparselineError(
            f"{path}: the tokenizer does not match the model: plain text gives ids up to {max(probe)}, the"
            f" model's vocabulary has {vocabulary}; put the model's own tokenizer there."
        )
    return tokenizer


def ids_beyond(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> str:
    """A short description of the tokens without an embedding; empty if there are none."""
    found = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= vocabulary)
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{found[0][1]!r} = {found[0][0]}{more}" if found else ""


def check_ids(ids: torch.Tensor, vocabulary: int, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Refuse token ids without an embedding.

    Raises:
        SparselineError: an id has no embedding.
    """
    largest = int(ids.max()) if ids.numel() else -1
    if largest >= vocabulary:
        token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(largest)!r})"
        raise SparselineError(
            f"The text holds token {largest}{token}, but the model's vocabulary has {vocabulary}; remove"
            " such tokens from the text or the chat template, or put the model's own tokenizer there."
        )
