"""Compare one variant with the thresholds of the section `verdict`.

The exit code is 0 for ACCEPT and 1 for REGRESSION. This is not a stage: run `dvc repro` before it.
"""

import sys

import click

from pipeline_lib.core import params, runtime
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.evaluation.settings import VerdictParams
from pipeline_lib.jobs.verdict import verdict
from pipeline_lib.recipe.variants import read


@click.command(help=__doc__)
@click.argument("variant")
def main(variant: str) -> None:
    with runtime.told():
        found = verdict(Workspace(), read(variant).name, params.load(VerdictParams, "verdict"))
        if not found.findings:
            raise SparselineError(
                f"{params.FILE}: section verdict has no threshold for anything that was measured of"
                f" {variant}; set one."
            )
        click.echo("\n".join([f"{variant}: {found.word}", *(f"  {finding}" for finding in found.findings)]))
    sys.exit(0 if found.accepted else 1)


if __name__ == "__main__":
    main()
