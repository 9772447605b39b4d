"""Submit variants, or all of them, as jobs to Slurm: one job for the stages that all share, then
one per variant, each in its own clone. This is not a stage: `dvc repro` takes the results from the
cache.
"""

import click

from pipeline_lib.core import runtime
from pipeline_lib.core.errors import SparselineError


@click.command(help=__doc__)
@click.argument("variants", nargs=-1)
@click.option("--local", is_flag=True, help="Run the jobs as processes of this machine, and wait for them.")
@click.option(
    "--at-once",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of variants that run at the same time, with --local.",
)
@click.option(
    "--minutes",
    type=click.IntRange(1),
    default=1440,
    show_default=True,
    help="Time limit of a job, after which it is requeued.",
)
@click.option("--sbatch", multiple=True, metavar="KEY=VALUE", help="An option of sbatch, such as mem=64G.")
def main(variants: tuple[str, ...], local: bool, at_once: int, minutes: int, sbatch: tuple[str, ...]) -> None:
    with runtime.stage():
        try:
            from pipeline_lib.command.cluster import How, submit
        except ModuleNotFoundError as error:
            if error.name != "submitit":
                raise
            raise SparselineError(
                "Jobs go through the package submitit, which is not installed:"
                " pip install 'sparseline[cluster]'."
            ) from error
        options = dict(one.partition("=")[::2] for one in sbatch)
        for said in submit(variants, How(local, at_once, minutes, options)):
            click.echo(said)


if __name__ == "__main__":
    main()
