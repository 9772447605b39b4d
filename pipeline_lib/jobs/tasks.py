"""Results on tasks of one saved checkpoint, or of the source model (``dense``)."""

from collections.abc import Mapping
from typing import Any

import click

from pipeline_lib.core import ranks
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.evaluation.metrics import metric, ordered
from pipeline_lib.evaluation.settings import Preset, TasksParams
from pipeline_lib.evaluation.subject import open_subject
from pipeline_lib.evaluation.tasks import run_tasks
from pipeline_lib.models.settings import ModelParams


def tasks(
    workspace: Workspace, source: ModelParams, name: str, params: TasksParams, presets: Mapping[str, Preset]
) -> str:
    """Measure each preset of lm-eval's tasks. Returns a summary of the main results."""
    model, tokenizer = open_subject(workspace, source, name, params.compute_dtype)
    measured: dict[str, Any] = {}
    told = []
    for preset, asked in presets.items():
        found = run_tasks(model, tokenizer, params, asked, f"tasks {preset} {name}")
        for warning, count in found.warnings.items():
            click.echo(f"tasks {preset} {name}: warned {count} times: {warning}")
        measured[preset] = found.tasks
        told += [
            f"{task} {_main(facts)} on {_items(facts, asked.limit)}" for task, facts in found.tasks.items()
        ]
    if not ranks.writes():
        return ""
    workspace.save(workspace.tasks(name), measured)
    return ", ".join(told)


def _main(task: Mapping[str, Any]) -> str:
    name = ordered(task["metrics"])[0]
    value = task["metrics"][name]["value"]
    return f"{value:.1%}" if metric(name).share else f"{name} {value:.3f}"


def _items(task: Mapping[str, Any], limit: int | None) -> str:
    """The number of items behind a result, and how many are missing or truncated."""
    fewer = (
        f" ({limit} were requested, the task has {task['of']})"
        if limit is not None and task["of"] < limit
        else ""
    )
    cut = (
        f", {task['truncated']} of them truncated to the model's context window" if task["truncated"] else ""
    )
    return f"{task['items']} items{fewer}{cut}"
