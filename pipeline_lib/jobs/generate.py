"""Let the source model write a text."""

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import Progress
from pipeline_lib.core.workspace import DENSE, Workspace
from pipeline_lib.evaluation.subject import open_subject
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.start import start
from pipeline_lib.texts.own import Author, wanted
from pipeline_lib.texts.prompts import prompts
from pipeline_lib.texts.texts import GeneratedParams, TextParams, read_texts


def generate(
    workspace: Workspace, source: ModelParams, name: str, params: TextParams, how: GeneratedParams
) -> str:
    """Write documents, each a prompt and its continuation, until there are enough for the text's
    samples. Returns a summary.

    Prompts are used in turn, and again after the last one; the number of the document changes the
    random draw. The start token precedes a document's prompt during generation, but is not written.

    Raises:
        SparselineError: there are no prompts, or they do not fit the model's positions; or the
            model ends texts before they have enough tokens.
    """
    model, tokenizer = open_subject(workspace, source, DENSE, source.compute_dtype)
    begins = start(params.start, model.config.model_type, tokenizer)
    author = Author(model, tokenizer, begins)
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = (window or 2**31) - how.new_tokens - len(author.lead(params))
    if most < 1 or (not params.chat_template and how.prompt_tokens > most):
        raise SparselineError(
            f"params.yaml: texts.{name}.generated: a prompt and {how.new_tokens} new tokens do not fit"
            f" into the model's {window} positions; lower new_tokens."
        )
    texts = read_texts(params)
    found = prompts(tokenizer, texts, params, how, most)
    units = "tokens" if params.packing == "concatenate" else "samples"
    with Progress(f"generate {name}", wanted(params), units) as progress:
        documents = author.documents(found, params, how, progress.advance)
    facts = texts.provenance | {
        "kind": "generated",
        "prompts": len(found),
        "generated": how.model_dump(mode="json"),
    }
    workspace.save(
        workspace.generated(name), {"documents": documents, "facts": facts | {"documents": len(documents)}}
    )
    return (
        f"{len(documents)} documents from {len(found)} prompts, {sum(map(len, documents)):,} tokens with the"
        " prompts"
    )
