"""Perplexity and completions of one saved checkpoint, or of the source model (``dense``); for a
checkpoint also its divergence from the source.
"""

from functools import partial

import torch

from pipeline_lib.core import ranks, runtime
from pipeline_lib.core.progress import track
from pipeline_lib.core.workspace import DENSE, Workspace
from pipeline_lib.evaluation.completions import complete
from pipeline_lib.evaluation.divergence import Dense, Divergence
from pipeline_lib.evaluation.perplexity import own_rows, perplexity
from pipeline_lib.evaluation.settings import EvaluatePart
from pipeline_lib.evaluation.subject import open_subject
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.source import open_source


def evaluate(workspace: Workspace, source: ModelParams, name: str, part: EvaluatePart) -> str:
    """Measure perplexity and divergence per text, and write completions. Returns a summary."""
    params = part.evaluate
    dense = None
    if name != DENSE:
        dense = Dense(open_source(workspace, source), getattr(torch, params.compute_dtype), runtime.compute())
    model, tokenizer = open_subject(workspace, source, name, params.compute_dtype)
    files = {text: workspace.texts("evaluate") / f"{text}.safetensors" for text in sorted(part.texts)}
    texts = {text: workspace.load_tensors(path)[0]["rows"] for text, path in files.items()}
    perplexities, divergences = {}, {}
    for text, rows in texts.items():
        compared = None
        if dense is not None:
            passed = partial(track, what=f"evaluate {name}, {text}, dense model", units="blocks")
            own = own_rows(rows, params.batch_rows)
            compared = Divergence(dense.logits(own, params.batch_rows, passed), params.reverse_kl)
        watched = partial(track, what=f"evaluate {name}, {text}", units="batches")
        perplexities[text] = perplexity(
            model, rows, params.batch_rows, watched, None if compared is None else compared.add
        )
        if compared is not None:
            divergences[text] = compared.summary()
    if not ranks.writes():
        return ""
    watched = partial(track, what=f"evaluate {name}, completions", units="tokens")
    completions = complete(model, tokenizer, texts[params.completions.text], params.completions, watched)
    workspace.save(workspace.evaluation(name), {"perplexity": perplexities, "divergence": divergences})
    workspace.save(workspace.completions(name), {"completions": completions})
    told = {text: f" (KL {found['kl']:.4f})" for text, found in divergences.items()}
    return "perplexity " + ", ".join(
        f"{value:.3f} on {text}{told.get(text, '')}" for text, value in perplexities.items()
    )
