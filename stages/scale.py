"""Compute initial function-preserving factors and shifts from the statistics."""

import click

from pipeline_lib.core import params, runtime
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.jobs import keys
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.recipe.variants import read_all


@click.command(help=__doc__)
def main() -> None:
    workspace = Workspace()
    with runtime.stage("scale", workspace.start) as tell:
        settings = keys.scale(read_all())
        if settings is None:
            workspace.leave_empty(workspace.start.parent)
            tell("scale: nothing to do, because no variant learns factors")
            return
        from pipeline_lib.jobs.scale import scale

        tell(f"scale: {scale(workspace, params.load(ModelParams, 'model'), settings)}")


if __name__ == "__main__":
    main()
