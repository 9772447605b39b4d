"""Measure how sensitive the loss is to each matrix, on the original model.

The trace of its Hessian (hutchinson) or of its Fisher information (fisher).
"""

import click

from pipeline_lib.core import artifacts, launch, params, runtime
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.jobs import keys
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.recipe.variants import read_all


@click.command(help=__doc__)
def main() -> None:
    workspace = Workspace()
    with runtime.stage("sensitivity", workspace.sensitivity / "sensitivity.json") as tell:
        settings = keys.sensitivity(read_all())
        if settings is None:
            workspace.save(workspace.sensitivity / "sensitivity.json", {})
            artifacts.write_json(workspace.sensitivity / "by_depth.json", [])
            workspace.save(workspace.sensitivity / "estimate.json", {})
            workspace.leave_empty(workspace.sensitivity / "moments")
            tell("sensitivity: nothing to do, because no allocation reads sensitivities")
            return
        from pipeline_lib.jobs.sensitivity import sensitivity

        source = params.load(ModelParams, "model")
        tell(f"sensitivity: {launch.run(sensitivity, workspace, source, settings)}")


if __name__ == "__main__":
    main()
