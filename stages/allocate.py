"""Allocate one variant's budget: how many weights each matrix keeps."""

import click

from pipeline_lib.core import runtime
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.jobs.allocate import allocate
from pipeline_lib.recipe.variants import read


@click.command(help=__doc__)
@click.argument("variant")
def main(variant: str) -> None:
    workspace = Workspace()
    with runtime.stage(f"allocate-{variant}", workspace.allocation(variant)) as tell:
        tell(f"allocate {variant}: {allocate(workspace, variant, read(variant).allocate)}")


if __name__ == "__main__":
    main()
