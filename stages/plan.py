"""Predict memory, disk and rough time for the configured model, before anything runs.

This is not a stage: it writes nothing.
"""

import click

from pipeline_lib.core import runtime


@click.command(help=__doc__)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="That the stages will compute on; else SPARSELINE_DEVICE.",
)
@click.option(
    "--gpu-memory",
    type=click.FloatRange(min=0, min_open=True),
    help="Bytes of the GPU, for instance 24e9; else what is here.",
)
def main(device: str | None, gpu_memory: float | None) -> None:
    with runtime.stage():
        from pipeline_lib.jobs.plan import foreseen

        for line in foreseen(device, gpu_memory):
            click.echo(line)


if __name__ == "__main__":
    main()
