"""Perplexities and completions of one saved checkpoint, or of the source model (``dense``)."""

from functools import partial

from pipeline_lib.core.progress import track
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.evaluation.completions import complete
from pipeline_lib.evaluation.perplexity import perplexity
from pipeline_lib.evaluation.settings import EvaluatePart
from pipeline_lib.evaluation.subject import open_subject
from pipeline_lib.models.settings import ModelParams


def evaluate(workspace: Workspace, source: ModelParams, name: str, part: EvaluatePart) -> str:
    """Perplexity per text, and sample completions; a sentence on them."""
    params = part.evaluate
    model, tokenizer = open_subject(workspace, source, name, params.compute_dtype)
    files = {text: workspace.texts("evaluate") / f"{text}.safetensors" for text in sorted(part.texts)}
    texts = {text: workspace.load_tensors(path)[0]["rows"] for text, path in files.items()}
    perplexities = {}
    for text, rows in texts.items():
        watched = partial(track, what=f"evaluate {name}, {text}", units="batches")
        perplexities[text] = perplexity(model, rows, params.batch_rows, watched)
    watched = partial(track, what=f"evaluate {name}, completions", units="tokens")
    completions = complete(model, tokenizer, texts[params.completions.text], params.completions, watched)
    workspace.save(workspace.evaluation(name), {"perplexity": perplexities})
    workspace.save(workspace.completions(name), {"completions": completions})
    return ", ".join(f"perplexity {text} {value:.3f}" for text, value in perplexities.items())
