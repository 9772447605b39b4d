"""Read one text, tokenise it with the model's tokenizer, and write rows of token ids with their provenance."""

from functools import partial
from pathlib import Path

import click

from pipeline_lib.core import artifacts, params, runtime
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import track
from pipeline_lib.models.checkpoint import locate, read_config
from pipeline_lib.models.source import ModelParams
from pipeline_lib.models.start import start
from pipeline_lib.models.tokenizer import check_ids, load_tokenizer
from pipeline_lib.texts.chat import render
from pipeline_lib.texts.rows import encode, rows_of, split
from pipeline_lib.texts.texts import TextParams, read_texts

BEGINS = {"document": "each document begins with the start token", "row": "each row begins with the start token", "none": "no start token"}


@click.command(help=__doc__)
@click.argument("name")
def main(name: str) -> None:
    with runtime.stage() as tell:
        uses = {key: value.get("use") for key, value in params.section("texts").items() if isinstance(value, dict)}
        for key in [name, *uses]:
            params.check_name("text", key)
        settings = params.load(TextParams, f"texts.{name}")
        model = params.load(ModelParams, "model")
        directory = locate(model.path, model.id, model.revision)
        config = read_config(directory)
        window = getattr(config, "max_position_embeddings", None)
        if window is not None and settings.length > window:
            raise SparselineError(
                f"params.yaml: texts.{name}.length = {settings.length} is more than the model's {window} positions; lower it."
            )
        tokenizer = load_tokenizer(directory, config.vocab_size)
        begins = start(settings.start, config.model_type, tokenizer)
        texts = read_texts(settings)
        written = render(tokenizer, texts.chats, texts.places) if settings.chat_template else texts.documents
        watched = partial(track, what=f"text {name}, tokens", units="thousands of documents")
        documents = encode(tokenizer, written, watched)
        rows = rows_of(documents, settings, begins)
        check_ids(rows, config.vocab_size, tokenizer)
        tensors = split(rows, settings.held_out) if settings.use == "calibrate" else {"rows": rows}
        facts = texts.provenance | {
            "tokens": sum(map(len, documents)),
            "rows": len(rows),
            "length": settings.length,
            "seed": settings.seed,
            "start": begins.place,
            "distinct": len(rows.unique()),
        }
        artifacts.write_tensors(Path(f"build/texts/{settings.use}/{name}.safetensors"), tensors, facts)
        for left in Path("build/texts").glob("*/*.safetensors"):  # DVC leaves what a text of another name or use wrote
            if uses.get(left.stem) != left.parent.name:
                left.unlink()
        files = f" in {len(facts['sha256'])} file(s)" if settings.kind == "files" else ""
        empty = f", {facts['empty']} empty ones left out" if facts["empty"] else ""
        tell(
            f"text {name}: {len(rows)} rows of {settings.length} tokens from {facts['documents']} documents{files}{empty} "
            f"({facts['tokens']:,} tokens); {BEGINS[begins.place]}"
        )


if __name__ == "__main__":
    main()
