"""Measure one saved checkpoint on lm-eval's tasks, by preset. ``dense`` is the source model itself."""

import click

from pipeline_lib.core import launch, params, runtime
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.jobs import keys
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.recipe.variants import read_all


@click.command(help=__doc__)
@click.argument("variant")
def main(variant: str) -> None:
    workspace = Workspace()
    with runtime.stage(f"tasks-{variant}", workspace.tasks(variant)) as tell:
        part = keys.tasks(variant, read_all())
        if part is None:
            workspace.save(workspace.tasks(variant), {})
            tell(f"tasks {variant}: none")
            return
        from pipeline_lib.jobs.tasks import tasks

        source = params.load(ModelParams, "model")
        found = launch.run(tasks, workspace, source, variant, part.tasks, part.presets)
        tell(f"tasks {variant}: {found}")


if __name__ == "__main__":
    main()
