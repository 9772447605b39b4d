"""Measure one saved checkpoint, or the source model (``dense``)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import click

from pipeline_lib.core import artifacts
from pipeline_lib.core.progress import track
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.evaluation.completions import complete
from pipeline_lib.evaluation.perplexity import perplexity
from pipeline_lib.evaluation.settings import EvaluatePart, Preset, TasksParams
from pipeline_lib.evaluation.subject import open_subject
from pipeline_lib.models.settings import ModelParams


def evaluate(workspace: Workspace, source: ModelParams, name: str, part: EvaluatePart) -> str:
    """Perplexity per text, and sample completions; a sentence on them."""
    params = part.evaluate
    model, tokenizer = open_subject(workspace, source, name, params.compute_dtype)
    files = {text: workspace.texts("evaluate") / f"{text}.safetensors" for text in sorted(part.texts)}
    texts = {text: artifacts.read_tensors(path)[0]["rows"] for text, path in files.items()}
    perplexities = {}
    for text, rows in texts.items():
        watched = partial(track, what=f"evaluate {name}, {text}", units="batches")
        perplexities[text] = perplexity(model, rows, params.batch_rows, watched)
    watched = partial(track, what=f"evaluate {name}, completions", units="tokens")
    completions = complete(model, tokenizer, texts[params.completions.text], params.completions, watched)
    artifacts.write_json(workspace.evaluation(name), {"perplexity": perplexities})
    artifacts.write_json(workspace.completions(name), completions)
    return ", ".join(f"perplexity {text} {value:.3f}" for text, value in perplexities.items())


def tasks(workspace: Workspace, source: ModelParams, name: str, params: TasksParams, presets: Mapping[str, Preset]) -> str:
    """Accuracy on each preset of lm-eval's tasks; a sentence on it."""
    from pipeline_lib.evaluation.tasks import run_tasks  # lm-eval takes seconds to import

    model, tokenizer = open_subject(workspace, source, name, params.compute_dtype)
    measured: dict[str, Any] = {}
    told = []
    for preset, asked in presets.items():
        found = run_tasks(model, tokenizer, params, asked, f"tasks {preset} {name}")
        for warning, count in found.warnings.items():
            click.echo(f"tasks {preset} {name}: warned {count} times: {warning}")
        measured[preset] = found.tasks
        told += [f"{task} {facts['acc']:.1%} of {_items(facts, asked.limit)}" for task, facts in found.tasks.items()]
    artifacts.write_json(workspace.tasks(name), measured)
    return ", ".join(told)


def _items(task: Mapping[str, Any], limit: int | None) -> str:
    """How many items the accuracy is of, and what is missing of them."""
    fewer = f" ({limit} were asked for, the task has {task['of']})" if limit is not None and task["of"] < limit else ""
    cut = f", {task['truncated']} of them truncated to the model's window" if task["truncated"] else ""
    return f"{task['items']} items{fewer}{cut}"
