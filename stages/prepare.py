"""Find the model, check it, and record the facts about it that all later stages use."""

import click

from pipeline_lib.core import params, runtime
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.models.settings import ModelParams


@click.command(help=__doc__)
def main() -> None:
    workspace = Workspace()
    with runtime.stage("prepare", workspace.model) as tell:
        from pipeline_lib.jobs.prepare import prepare

        tell(f"prepare: {prepare(workspace, params.load(ModelParams, 'model'))}")


if __name__ == "__main__":
    main()
