"""Convert a bitmask checkpoint to an ordinary one. This is not a stage.

It needs neither the pipeline's parameters nor DVC.
"""

from pathlib import Path

import click

from pipeline_lib.core import runtime
from pipeline_lib.export.load import unpack


@click.command(help=__doc__)
@click.argument("bitmask", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(bitmask: Path, out: Path) -> None:
    with runtime.told():
        unpack(bitmask, out)
        click.echo(f"unpack: {out} is for AutoModelForCausalLM.from_pretrained")


if __name__ == "__main__":
    main()
