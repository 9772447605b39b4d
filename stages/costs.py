"""Print the comparison with the costs on this machine, and add the costs to the report.

This is not a stage, because costs differ from run to run.
"""

from pathlib import Path

import click

from pipeline_lib.core import artifacts, runtime
from pipeline_lib.reporting import costs, render, table

OUT = Path("report/costs.js")


@click.command(help=__doc__)
def main() -> None:
    with runtime.told():
        results, measured = table.collect(), costs.collect()
        artifacts.write_text(OUT, render.costs(results, measured))
        click.echo(
            "\n".join(
                [
                    table.plain([*table.comparison(results), *costs.by_variant(results, measured)]),
                    *table.notes(results),
                ]
            )
        )


if __name__ == "__main__":
    main()
