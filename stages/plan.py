"""Predict memory, disk and rough time for the configured model, before anything runs (not a stage: nothing is written)."""

import click

from pipeline_lib.core import runtime


@click.command(help=__doc__)
def main() -> None:
    with runtime.stage():
        from pipeline_lib.jobs.plan import foreseen

        for line in foreseen():
            click.echo(line)


if __name__ == "__main__":
    main()
