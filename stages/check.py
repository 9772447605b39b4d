"""Check the names in params.yaml before anything runs."""

from pathlib import Path

import click

from pipeline_lib.core import artifacts, names, runtime


@click.command(help=__doc__)
def main() -> None:
    with runtime.stage():
        names.check()
        artifacts.write_json(Path("build/checked.json"), {})  # the same for all that is right, so that a new name concerns no other stage


if __name__ == "__main__":
    main()
