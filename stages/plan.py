"""Predict memory, disk and rough time for the configured model, before anything runs.

This is not a stage: it writes nothing.
"""

import click

from pipeline_lib.core import runtime


@click.command(help=__doc__)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Device of the stages. Default: SPARSELINE_DEVICE.",
)
@click.option(
    "--gpu-memory",
    type=click.FloatRange(min=0, min_open=True),
    help="Bytes of the GPU of a process, such as 24e9. Default: the GPU of this machine.",
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    help="Number of processes that run a stage. Default: SPARSELINE_PROCESSES, or one.",
)
@click.option(
    "--speed",
    type=click.FloatRange(min=0, min_open=True),
    help="FLOP/s of matrix products of a process, such as 50e12. Default: measured on this machine.",
)
def main(device: str | None, gpu_memory: float | None, processes: int | None, speed: float | None) -> None:
    with runtime.stage():
        from pipeline_lib.jobs.plan import Machine, foreseen

        for line in foreseen(Machine(device, gpu_memory, processes, speed)):
            click.echo(line)


if __name__ == "__main__":
    main()
