"""Read one text (files, standard library or dataset), and cut it into samples of tokens."""

import click

from pipeline_lib.core import params, runtime
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.models.settings import ModelParams


@click.command(help=__doc__)
@click.argument("name")
def main(name: str) -> None:
    with runtime.stage() as tell:
        from pipeline_lib.jobs.text import text
        from pipeline_lib.texts.texts import TextParams

        params.check_name("text", name)
        settings = params.load(TextParams, f"texts.{name}")
        tell(f"text {name}: {text(Workspace(), params.load(ModelParams, 'model'), name, settings)}")


if __name__ == "__main__":
    main()
