"""Accuracy of one saved checkpoint on one preset of lm-eval's tasks. ``dense`` is the source itself."""

from pathlib import Path

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
        found = run_tasks(*open_subject(variant, settings.compute_dtype), settings, asked, f"tasks {preset} {variant}")
        artifacts.write_json(Path(f"build/evaluate/{preset}/{variant}.json"), found)
        told = ", ".join(f"{name} {task['acc']:.1%}" for name, task in found.items())
        tell(f"tasks {preset} {variant}: {told or 'none'}")


if __name__ == "__main__":
    main()
