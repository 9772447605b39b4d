"""Let the source model write a text."""

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import Progress
from pipeline_lib.core.workspace import DENSE, Workspace
from pipeline_lib.evaluation.subject import open_subject
from pipeline_lib.models.sample import Drawing, continued, ends
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.start import start
from pipeline_lib.texts.prompts import prompts
from pipeline_lib.texts.texts import GeneratedParams, TextParams, read_texts

TRIED = 16  # documents for each row, after which it is given up


def generate(
    workspace: Workspace, source: ModelParams, name: str, params: TextParams, how: GeneratedParams
) -> str:
    """Write documents, each a prompt and its continuation, until there are enough for the text's
    samples; a summary.

    Prompts are used in turn, and again after the last one; the number of the document changes the
    random draw. The start token precedes a document's prompt during generation, but is not written.

    Raises:
        SparselineError: there are no prompts, or they do not fit the model's positions; or the
            model ends texts before they have enough tokens.
    """
    model, tokenizer = open_subject(workspace, source, DENSE, source.compute_dtype)
    begins = start(params.start, model.config.model_type, tokenizer)
    lead = [] if params.chat_template or begins.token is None or begins.place == "none" else [begins.token]
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = (window or 2**31) - how.new_tokens - len(lead)
    if most < 1 or (not params.chat_template and how.prompt_tokens > most):
        raise SparselineError(
            f"params.yaml: texts.{name}.generated: a prompt and {how.new_tokens} new tokens do not fit"
            f" into the model's {window} positions; lower new_tokens."
        )
    texts = read_texts(params)
    found = prompts(tokenizer, texts, params, how, most)
    drawing, stops = Drawing(how.new_tokens, how.temperature, how.seed), ends(model, tokenizer)
    joined = params.packing == "concatenate"
    wanted, done = (params.rows or 0) * (params.length if joined else 1), 0
    documents: list[list[int]] = []
    with Progress(f"generate {name}", wanted, "tokens" if joined else "samples") as progress:
        while done < wanted:
            if not joined and len(documents) >= TRIED * wanted:
                raise SparselineError(
                    f"The model ends its texts early: {done} of {len(documents)} documents of the text"
                    f" {name} have {params.length} tokens. Set packing: concatenate, or lower length."
                )
            numbers = range(len(documents), len(documents) + how.batch_rows)
            batch = [found[number % len(found)] for number in numbers]
            for prompt, new in zip(
                batch,
                continued(model, [lead + prompt for prompt in batch], numbers, drawing, stops),
                strict=True,
            ):
                if done >= wanted:  # the text does not depend on the size of the batch
                    break
                documents.append(
                    prompt + (new[:-1] if new[-1] in stops and not params.chat_template else new)
                )
                added = min(
                    wanted - done, len(documents[-1]) if joined else int(len(documents[-1]) >= params.length)
                )
                done += added
                progress.advance(added)
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
