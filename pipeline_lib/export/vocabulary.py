"""A tokenizer in GGUF's terms: tokens with their types, and llama.cpp's name of the pre-tokenisation."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_lib.core import files
from pipeline_lib.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter, TokenType

BYTE_LEVEL, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
SPLITS = ("llama-bpe", "qwen2", "tekken", "gpt-4o")  # names whose patterns transformers knows


@dataclass(frozen=True)
class Vocabulary:
    """The parts of a tokenizer in a GGUF file, except merges and chat template, which its package
    reads from the directory.
    """

    directory: Path
    model: str  # gpt2: byte-level BPE; llama: SentencePiece
    split: str
    tokens: list[str] | list[bytes]
    types: list["TokenType"]
    scores: list[float] | None  # SentencePiece only
    special: dict[str, int]  # bos, eos, … -> token
    begins: bool  # a text begins with the start token
    spaced: bool | None  # a text begins with a space; SentencePiece only

    def add_to(self, writer: "GGUFWriter") -> None:
        """Write it into the metadata of a file."""
        from gguf import SpecialVocab

        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.spaced is not None:
            writer.add_add_space_prefix(self.spaced)
        special = SpecialVocab(self.directory, load_merges=self.scores is None, n_vocab=len(self.tokens))
        special.special_token_ids |= self.special  # otherwise the package would use those of config.json
        special.add_special_token["bos"] = self.begins
        special.add_to_gguf(writer, quiet=True)


def vocabulary(directory: Path, size: int) -> Vocabulary:
    """The tokenizer of a model directory, with as many tokens as the model has embeddings.

    Raises:
        SparselineError: there is none that transformers loads.
        ValueError: GGUF cannot describe it.
    """
    from gguf import TokenType

    tokenizer = load_tokenizer(directory, size)
    ids = tokenizer("a")["input_ids"]
    begins = bool(ids) and ids[0] == tokenizer.bos_token_id
    named = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in SPECIAL}
    special = {kind: number for kind, number in named.items() if number is not None and number < size}
    if (directory / SENTENCEPIECE).is_file():
        return _sentencepiece(directory, size, special, begins, tokenizer.tokenize("a")[:1] == ["▁a"])
    if not (directory / BYTE_LEVEL).is_file():
        raise ValueError(f"its tokenizer is neither {BYTE_LEVEL} nor {SENTENCEPIECE}")
    described = json.loads(files.text(directory / BYTE_LEVEL))
    model = described["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or (split := _split(described)) is None:
        raise ValueError(f"llama.cpp has no name for how its {BYTE_LEVEL} splits text")
    by_id = {number: token for token, number in model["vocab"].items()}
    added = {one["id"]: one for one in described.get("added_tokens") or []}
    tokens, types = [], []
    for number in range(size):
        if number in added:
            tokens.append(added[number]["content"])
            types.append(TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED)
        else:
            tokens.append(by_id.get(number, f"[PAD{number}]"))
            types.append(TokenType.NORMAL if number in by_id else TokenType.UNUSED)
    return Vocabulary(directory, "gpt2", split, tokens, types, None, special, begins, None)


def _sentencepiece(
    directory: Path, size: int, special: dict[str, int], begins: bool, spaced: bool
) -> Vocabulary:
    from gguf import SentencePieceVocab, TokenType

    found = list(SentencePieceVocab(directory).all_tokens())[:size]
    found += [(f"[PAD{number}]".encode(), -1000.0, TokenType.UNUSED) for number in range(len(found), size)]
    tokens, types, scores = [one[0] for one in found], [one[2] for one in found], [one[1] for one in found]
    return Vocabulary(directory, "llama", "default", tokens, types, scores, special, begins, spaced)


def _split(described: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the normalizer and the pre-tokenizer of a tokenizer.json; None where it
    has none.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if (described.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        return None
    before = described.get("pre_tokenizer") or {"type": None}
    *first, last = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        if not first:
            return "gpt-2"
        return "smollm" if first == [{"type": "Digits", "individual_digits": True}] else None
    patterns = [
        one["pattern"].get("Regex")
        for one in first
        if one["type"] == "Split" and one["behavior"] == "Isolated"
    ]
    if len(patterns) != 1 or len(first) != 1:
        return None
    return next((name for name in SPLITS if GGUF_PRE_TOKENIZER_SPLITS[name] == patterns[0]), None)
