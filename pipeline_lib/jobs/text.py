"""Read one text and cut it into samples of tokens."""

from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import track
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.models.checkpoint import locate, read_config
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.start import start
from pipeline_lib.models.tokenizer import check_ids, load_tokenizer
from pipeline_lib.texts.chat import render
from pipeline_lib.texts.rows import encode, rows_of, split
from pipeline_lib.texts.texts import TextParams, read_texts

BEGINS = {
    "document": "each document begins with the start token",
    "row": "each row begins with the start token",
    "none": "no start token",
}


def text(workspace: Workspace, source: ModelParams, name: str, params: TextParams) -> str:
    """Write samples of token ids, and facts about their text. Returns a summary.

    Raises:
        SparselineError: samples are longer than the model's positions, or the text cannot be used.
    """
    if workspace.model.exists():  # by hand, a text may be made first
        workspace.load(workspace.model)  # the rows depend on its tokenizer
    directory = locate(source.path, source.id, source.revision)
    config = read_config(directory, source.remote_code)
    window = getattr(config, "max_position_embeddings", None)
    if window is not None and params.length > window:
        raise SparselineError(
            f"params.yaml: texts.{name}.length = {params.length} is more than the model's {window} positions;"
            " lower it."
        )
    tokenizer = load_tokenizer(directory, config.get_text_config().vocab_size, source.remote_code)
    begins = start(params.start, config.model_type, tokenizer)
    documents, provenance = (
        _generated(workspace, name) if params.generated else _read(tokenizer, name, params)
    )
    rows = rows_of(documents, params, begins)
    check_ids(rows, config.get_text_config().vocab_size, tokenizer)
    more = len(rows) - (params.rows or len(rows))
    tensors = split(rows, params.held_out, more) if params.use == "calibrate" else {"rows": rows}
    facts = provenance | {
        "tokens": sum(map(len, documents)),
        "rows": len(rows),
        "length": params.length,
        "seed": params.seed,
        "start": begins.place,
        "distinct": len(rows.unique()),
    }
    workspace.save_tensors(workspace.texts(params.use) / f"{name}.safetensors", tensors, facts)
    files = f" in {len(facts['sha256'])} file(s)" if params.kind == "files" else ""
    empty = f", {facts['empty']} empty ones skipped" if facts["empty"] else ""
    own = " generated" if params.generated else ""
    only = f" ({more} only train)" if params.training else ""
    return (
        f"{len(rows)} samples of {params.length} tokens{only} from {facts['documents']}{own}"
        f" documents{files}{empty} ({facts['tokens']:,} tokens); {BEGINS[begins.place]}"
    )


def _read(
    tokenizer: PreTrainedTokenizerBase, name: str, params: TextParams
) -> tuple[list[list[int]], dict[str, Any]]:
    """Documents as tokens, and their provenance."""
    texts = read_texts(params)
    written = render(tokenizer, texts.chats, texts.places) if params.chat_template else texts.documents
    watched = partial(track, what=f"text {name}, tokens", units="thousands of documents")
    return encode(tokenizer, written, watched), texts.provenance


def _generated(workspace: Workspace, name: str) -> tuple[list[list[int]], dict[str, Any]]:
    found = workspace.load(workspace.generated(name))
    return found["documents"], found["facts"]
