"""Write the report as one page, and its tables for the terminal and for DVC."""

from pathlib import Path

import click

from pipeline_lib.core import artifacts, runtime
from pipeline_lib.reporting import table
from pipeline_lib.reporting.render import render

OUT = Path("report")


@click.command(help=__doc__)
def main() -> None:
    with runtime.stage() as tell:
        results = table.collect()
        artifacts.write_text(OUT / "index.html", render(results))
        artifacts.write_json(OUT / "summary.json", table.summary(results))
        artifacts.write_json(OUT / "perplexity.json", table.points(results))
        notes = table.notes(results)
        artifacts.write_text(
            OUT / "table.txt", "\n".join([table.plain(table.comparison(results)), *notes]) + "\n"
        )
        for note in notes:
            click.echo(f"report: {note}")
        tell(
            f"report: {len(results.pruned)} pruned variants; read {OUT / 'index.html'}, or"
            f" {OUT / 'table.txt'}"
        )


if __name__ == "__main__":
    main()
