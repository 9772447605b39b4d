"""Learn one variant's factors and selection weights, block by block. They are kept only if they are
better on the held-out split. Resumes after a kill.
"""

import click

from pipeline_lib.core import artifacts, launch, params, runtime
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.recipe.variants import read
from pipeline_lib.stats.settings import CalibrateParams


@click.command(help=__doc__)
@click.argument("variant")
def main(variant: str) -> None:
    workspace = Workspace()
    with runtime.stage(f"induce-{variant}", workspace.induced(variant) / "curve.json") as tell:
        part = read(variant).induce
        if part is None:
            with workspace.directory(workspace.induced(variant)) as made:
                artifacts.write_json(made / "curve.json", [])
            tell(f"induce {variant}: nothing to do, because it has no section induce")
            return
        from pipeline_lib.jobs.induce import induce

        source, calibrate = params.load(ModelParams, "model"), params.load(CalibrateParams, "calibrate")
        tell(f"induce {variant}: {launch.run(induce, workspace, source, variant, part, calibrate)}")


if __name__ == "__main__":
    main()
