"""Convert pytorch_model.bin to safetensors, from a directory or the hub.

It runs no code of the model. This is not a stage.
"""

from pathlib import Path

import click

from pipeline_lib.core import runtime
from pipeline_lib.export.convert import convert
from pipeline_lib.models.files import grouped
from pipeline_lib.models.source import fetch_pickled


@click.command(help=__doc__)
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--revision", help="commit of a hub model")
def main(source: str, out: Path, revision: str | None) -> None:
    with runtime.told():
        directory = Path(source) if Path(source).exists() else fetch_pickled(source, revision)
        for line in grouped(convert(directory, out)):
            click.echo(f"convert: left out: {line}")
        click.echo(f"convert: give {out} as model.path in params.yaml, and null as id and revision")


if __name__ == "__main__":
    main()
