"""Write one variant in its formats (dense, bitmask, compressed-tensors, gguf), and record their sizes."""

import click

from pipeline_lib.core import params, runtime
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.jobs import keys
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.recipe.variants import read


@click.command(help=__doc__)
@click.argument("variant")
def main(variant: str) -> None:
    workspace = Workspace()
    with runtime.stage(f"export-{variant}", workspace.sizes(variant)) as tell:
        settings = keys.export(read(variant))
        if settings is None:
            workspace.save(workspace.sizes(variant), {})
            workspace.leave_empty(workspace.export(variant))
            tell(f"export {variant}: nothing to do, because no format is requested")
            return
        from pipeline_lib.jobs.export import export_variant

        tell(
            f"export {variant}:"
            f" {export_variant(workspace, params.load(ModelParams, 'model'), variant, settings)}"
        )


if __name__ == "__main__":
    main()
