"""Measure one saved checkpoint: perplexity, divergence from the source model, and completions.

``dense`` is the source model itself.
"""

import click

from pipeline_lib.core import launch, params, runtime
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.evaluation.settings import EvaluatePart
from pipeline_lib.models.settings import ModelParams


@click.command(help=__doc__)
@click.argument("variant")
def main(variant: str) -> None:
    workspace = Workspace()
    with runtime.stage(f"evaluate-{variant}", workspace.evaluation(variant)) as tell:
        part = EvaluatePart.read()
        from pipeline_lib.jobs.evaluate import evaluate

        source = params.load(ModelParams, "model")
        tell(f"evaluate {variant}: {launch.run(evaluate, workspace, source, variant, part)}")


if __name__ == "__main__":
    main()
