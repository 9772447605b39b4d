"""Prune one variant block by block, and write a Hugging Face checkpoint and its masks.

Resumes after a kill.
"""

import click

from pipeline_lib.core import launch, params, runtime
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.recipe.variants import read
from pipeline_lib.recipe.words import in_words


@click.command(help=__doc__)
@click.argument("variant")
def main(variant: str) -> None:
    workspace = Workspace()
    with runtime.stage(f"prune-{variant}", workspace.facts(variant)) as tell:
        recipe = read(variant).recipe
        click.echo(f"prune {variant}: {in_words(recipe)}")
        from pipeline_lib.jobs.prune import prune_variant

        source = params.load(ModelParams, "model")
        tell(f"prune {variant}: {launch.run(prune_variant, workspace, source, variant, recipe)}")


if __name__ == "__main__":
    main()
