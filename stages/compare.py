"""Compare finished experiments, the branches and the workspace: a table here, figures in report/compare.html (not a stage: it reads git)."""

from pathlib import Path

import click

from pipeline_lib.core import artifacts, params, runtime
from pipeline_lib.reporting import compare

OUT = Path("report/compare.html")


@click.command(help=__doc__)
def main() -> None:
    with runtime.told():
        comparison = compare.compare(compare.collect(Path()), params.section("choose.text"))
        artifacts.write_text(OUT, compare.page(comparison))
        click.echo(f"{compare.terminal(comparison)}\ncompare: {OUT} has the figures")


if __name__ == "__main__":
    main()
