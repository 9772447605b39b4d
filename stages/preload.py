"""Run a command, such as `dvc repro`, with a faster start of its stages.

The stages are forks of this process, which has imported torch already.
"""

import shutil

import click

from pipeline_lib.core import preloaded


@click.command(
    help=__doc__, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def main(command: tuple[str, ...]) -> None:
    if shutil.which(command[0]) is None:
        raise click.UsageError(
            f"there is no command {command[0]} here; try `python -m stages.preload dvc repro`."
        )
    preloaded.serve(list(command))


if __name__ == "__main__":
    main()
