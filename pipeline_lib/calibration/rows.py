"""Documents to rows of token ids."""

import torch
from transformers import PreTrainedTokenizerBase

from pipeline_lib.calibration.texts import Document, TextParams
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import Watched
from pipeline_lib.core.runtime import generator

TOGETHER = 1000  # documents that the tokenizer is given at once


def encode(tokenizer: PreTrainedTokenizerBase, documents: list[Document], chat_template: bool, watched: Watched = iter) -> list[list[int]]:
    """Each document as the start token (the tokenizer's BOS, else EOS) and its tokens, or as its chat template renders it.

    ``watched`` sees every thousand documents pass.

    Raises:
        SparselineError: chat messages without a template, or the reverse.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if chat_template:
        if tokenizer.chat_template is None:
            raise SparselineError("texts: chat_template is true, but this model's tokenizer has none; set it to false.")
        if any(isinstance(document, str) for document in documents):
            raise SparselineError("texts: chat_template is true, but a document is plain text; give lists of {role, content} messages.")
        return [tokenizer.apply_chat_template(document, tokenize=True, return_dict=False) for document in documents]
    if not all(isinstance(document, str) for document in documents):
        raise SparselineError("texts: a document is a list of messages; set chat_template: true, or choose a field that holds text.")
    encoded = []
    for first in watched(range(0, len(documents), TOGETHER)):
        batch = tokenizer(documents[first : first + TOGETHER], add_special_tokens=False, verbose=False)["input_ids"]
        encoded += [([] if start is None else [start]) + list(ids) for ids in batch]
    return encoded


def rows_of(documents: list[list[int]], params: TextParams) -> torch.Tensor:
    """Rows [N, T] of token ids.

    ``concatenate`` joins all documents and cuts the stream into rows; ``document`` takes one row from each document that is long
    enough, at a random place. With a seed the rows are drawn at random without replacement, else they are the first.

    Raises:
        SparselineError: too little text for the rows asked for.
    """
    if params.packing == "concatenate":
        stream = torch.tensor([token for document in documents for token in document])
        rows = stream[: len(stream) // params.length * params.length].view(-1, params.length)
    else:
        random = generator(params.seed or 0, "document")
        fitting = [torch.tensor(document) for document in documents if len(document) >= params.length]
        starts = [int(torch.randint(len(d) - params.length + 1, (1,), generator=random)) for d in fitting]
        cut = [document[start : start + params.length] for document, start in zip(fitting, starts, strict=True)]
        rows = torch.stack(cut) if cut else torch.empty(0, params.length, dtype=torch.long)
    if len(rows) < params.rows:
        raise SparselineError(
            f"The text at {params.path} gives {len(rows)} rows of {params.length} tokens, but {params.rows} are asked for; "
            "give more text or lower rows or length."
        )
    if params.seed is None:
        return rows[: params.rows]
    return rows[torch.randperm(len(rows), generator=generator(params.seed, "rows"))[: params.rows]]


def split(rows: torch.Tensor, held_out: float) -> dict[str, torch.Tensor]:
    """``fit`` and ``held_out`` rows; the held-out share is the last, rounded down. A share above 0 holds out at least one row.

    Raises:
        SparselineError: a share above 0 of a single row.
    """
    if held_out and len(rows) < 2:
        raise SparselineError(
            f"The calibration text has {len(rows)} row, which cannot be split into fitting and held-out rows; raise rows, or set held_out: 0."
        )
    count = min(max(1, int(round(len(rows) * held_out, 9))), len(rows) - 1) if held_out else 0
    return {"fit": rows[: len(rows) - count].clone(), "held_out": rows[len(rows) - count :].clone()}
