"""Train one variant's whole pruned model towards the dense one, and keep its zeros.

The result is kept if it is better on the held-out split. Resumes after a kill.
"""

import click

from pipeline_lib.core import launch, params, runtime
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.recipe.variants import read


@click.command(help=__doc__)
@click.argument("variant")
def main(variant: str) -> None:
    workspace = Workspace()
    with runtime.stage(f"distil-{variant}", workspace.training(variant)) as tell:
        part = read(variant).distil
        if part is None:
            workspace.leave_empty(workspace.distilled(variant))
            workspace.save(workspace.training(variant), {})
            tell(f"distil {variant}: nothing to do, because it has no section distil")
            return
        from pipeline_lib.jobs.distil import distil

        source = params.load(ModelParams, "model")
        tell(f"distil {variant}: {launch.run(distil, workspace, source, variant, part)}")


if __name__ == "__main__":
    main()
