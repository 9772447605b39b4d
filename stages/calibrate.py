"""Collect statistics of every site's inputs, in one pass of the dense model, block by block."""

import click

from pipeline_lib.core import artifacts, launch, params, runtime
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.jobs import keys
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.recipe.variants import read_all


@click.command(help=__doc__)
def main() -> None:
    workspace = Workspace()
    with runtime.stage("calibrate", artifacts.block_file(workspace.statistics, 0)) as tell:
        settings = keys.calibrate(read_all())
        if settings is None:
            workspace.leave_empty(workspace.statistics)
            tell("calibrate: nothing to do, because no variant reads statistics of the dense model")
            return
        from pipeline_lib.jobs.calibrate import calibrate

        source = params.load(ModelParams, "model")
        tell(f"calibrate: {launch.run(calibrate, workspace, source, settings)}")


if __name__ == "__main__":
    main()
