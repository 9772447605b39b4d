"""Turn documents into samples of token ids."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import Watched
from pipeline_lib.core.random import generator
from pipeline_lib.models.start import Start
from pipeline_lib.texts.texts import TextParams

TOGETHER = 1000  # documents that the tokenizer is given at once


def encode(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], watched: Watched = iter
) -> list[list[int]]:
    """Each document's tokens, without tokens that the tokenizer adds. ``watched`` counts every
    thousand documents.
    """
    encoded: list[list[int]] = []
    for first in watched(range(0, len(documents), TOGETHER)):
        batch = tokenizer(list(documents[first : first + TOGETHER]), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        encoded += [list(ids) for ids in batch]
    return encoded


def begin(documents: list[list[int]], start: Start, chat_template: bool) -> list[list[int]]:
    """Documents with the start token if ``start.place`` is document, and without it otherwise.

    A chat begins as its template says: it gets no second start token, and with ``row`` or ``none``
    its own is removed.
    """
    if start.token is None:
        return documents
    if not chat_template:
        return [[start.token, *ids] for ids in documents] if start.place == "document" else documents
    if start.place == "document":
        return documents
    return [ids[1:] if ids[:1] == [start.token] else ids for ids in documents]


def rows_of(documents: list[list[int]], params: TextParams, start: Start) -> torch.Tensor:
    """Samples [N, T] of token ids.

    ``concatenate`` joins all documents and cuts them into samples; ``document`` takes one sample
    from each document that is long enough, at a random position. With a seed, the samples are drawn
    at random without replacement; without, they are the first ones. If ``params.rows`` is None, all
    samples are taken in order. Samples for training come last, as many as the text still gives, in
    multiples of four. With ``start.place`` row, a sample is the start token and T - 1 tokens of text.

    Raises:
        SparselineError: too little text for the number of samples, or too few different tokens.
    """
    documents = begin(documents, start, params.chat_template)
    length = params.length - (start.place == "row")
    if params.packing == "concatenate":
        stream = torch.tensor([token for document in documents for token in document], dtype=torch.long)
        rows = stream[: len(stream) // length * length].view(-1, length)
    else:
        random = generator(params.seed or 0, "document")
        fitting = [torch.tensor(document) for document in documents if len(document) >= length]
        places = [int(torch.randint(len(d) - length + 1, (1,), generator=random)) for d in fitting]
        cut = [document[place : place + length] for document, place in zip(fitting, places, strict=True)]
        rows = torch.stack(cut) if cut else torch.empty(0, length, dtype=torch.long)
    if len(rows) < (params.rows or 1):
        raise SparselineError(
            f"The text at {params.path} gives {len(rows)} samples of {params.length} tokens, but"
            f" {params.rows or 'some'} are requested; give more text, or lower rows or length."
        )
    further = len(rows) - (params.rows or 0)
    wanted = len(rows) if params.rows is None else params.rows + min(params.training, further // 4 * 4)
    if params.seed is None or params.rows is None:
        rows = rows[:wanted]
    else:
        rows = rows[torch.randperm(len(rows), generator=generator(params.seed, "rows"))[:wanted]]
    if start.place == "row" and start.token is not None:
        rows = torch.cat([torch.full((len(rows), 1), start.token), rows], dim=1)
    return _checked(rows, params)


def _checked(rows: torch.Tensor, params: TextParams) -> torch.Tensor:
    found = len(rows.unique())
    if found < params.distinct:
        raise SparselineError(
            f"The text at {params.path} has only {found} different tokens in {len(rows)} samples, fewer"
            f" than its `distinct` of {params.distinct}: give other text, or lower `distinct` if the"
            " vocabulary is that small."
        )
    if len(rows) > 1 and len(rows.unique(dim=0)) == 1:
        raise SparselineError(
            f"The text at {params.path} gives {len(rows)} samples that are all the same; give other text."
        )
    return rows


def split(rows: torch.Tensor, held_out: float, training: int = 0) -> dict[str, torch.Tensor]:
    """``fit``, ``held_out`` and ``training`` samples. The last ones only train. The held-out split has
    the last ones of the others, rounded down; with a share above 0 it has at least one.

    Raises:
        SparselineError: a share above 0 of a single sample.
    """
    rows, more = rows[: len(rows) - training], rows[len(rows) - training :]
    if held_out and len(rows) < 2:
        raise SparselineError(
            f"The calibration text has {len(rows)} sample, which cannot be split into a training and a"
            " held-out split; raise rows, or set held_out: 0."
        )
    count = min(max(1, int(round(len(rows) * held_out, 9))), len(rows) - 1) if held_out else 0
    cut = len(rows) - count
    return {"fit": rows[:cut].clone(), "held_out": rows[cut:].clone(), "training": more.clone()}
