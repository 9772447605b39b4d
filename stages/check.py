"""Check the names in params.yaml before anything runs."""

from pathlib import Path

import click

from pipeline_lib.core import artifacts, names, params, runtime


@click.command(help=__doc__)
def main() -> None:
    with runtime.stage():
        values = {"texts": params.section("texts"), "variants": params.section("variants"), "presets": params.section("presets")}
        values |= {"induced": params.section("induced"), "curved": params.section("curved"), "exported": params.section("exported")}
        values |= {"tasks": {"variants": params.section("tasks.variants"), "presets": params.section("tasks.presets")}}
        names.check(values)
        artifacts.write_json(Path("build/checked.json"), {})  # the same for all that is right, so that a new name concerns no other stage


if __name__ == "__main__":
    main()
