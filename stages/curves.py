"""Measure one variant's error curves: the error of every matrix at several densities."""

import click

from pipeline_lib.core import launch, params, runtime
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.recipe.variants import read
from pipeline_lib.stats.settings import CalibrateParams


@click.command(help=__doc__)
@click.argument("variant")
def main(variant: str) -> None:
    workspace = Workspace()
    with runtime.stage(f"curves-{variant}", workspace.curves(variant)) as tell:
        part = read(variant).curves
        if part is None:
            workspace.save(workspace.curves(variant), {})
            tell(f"curves {variant}: nothing to do, because its allocation reads no error curves")
            return
        from pipeline_lib.jobs.curves import curves

        source, calibrate = params.load(ModelParams, "model"), params.load(CalibrateParams, "calibrate")
        tell(f"curves {variant}: {launch.run(curves, workspace, source, variant, part, calibrate)}")


if __name__ == "__main__":
    main()
