"""Check all parameters, and write the stages' keys: the parameters and the code that each stage reads."""

import click

from pipeline_lib.core import runtime
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.jobs.keys import write


@click.command(help=__doc__)
def main() -> None:
    with runtime.stage() as tell:
        tell(f"keys: {write(Workspace())}")


if __name__ == "__main__":
    main()
