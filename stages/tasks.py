"""Accuracy of one saved checkpoint on one preset of lm-eval's tasks. ``dense`` is the source itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pipeline_lib.core import artifacts, params, runtime
from pipeline_lib.evaluation.subject import open_subject
from pipeline_lib.evaluation.tasks import Preset, TasksParams, run_tasks


@click.command(help=__doc__)
@click.argument("preset")
@click.argument("variant")
def main(preset: str, variant: str) -> None:
    with runtime.stage(f"tasks-{preset}-{variant}", Path(f"build/evaluate/{preset}/{variant}.json")) as tell:
        settings = params.load(TasksParams, "tasks")
        asked = params.load(Preset, f"presets.{preset}")
        model, tokenizer = open_subject(variant, settings.compute_dtype)
        found = run_tasks(model, tokenizer, settings, asked, f"tasks {preset} {variant}")
        for warning, count in found.warnings.items():
            click.echo(f"tasks {preset} {variant}: warned {count} times: {warning}")
        artifacts.write_json(Path(f"build/evaluate/{preset}/{variant}.json"), found.tasks)
        told = ", ".join(f"{name} {task['acc']:.1%} of {items(task, asked.limit)}" for name, task in found.tasks.items())
        tell(f"tasks {preset} {variant}: {told or 'none'}")


def items(task: Mapping[str, Any], limit: int | None) -> str:
    """How many items the accuracy is of, and what is missing of them."""
    fewer = f" ({limit} were asked for, the task has {task['of']})" if limit is not None and task["of"] < limit else ""
    cut = f", {task['truncated']} of them truncated to the model's window" if task["truncated"] else ""
    return f"{task['items']} items{fewer}{cut}"


if __name__ == "__main__":
    main()
