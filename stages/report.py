"""Gather what the stages measured into tables, figures and one page to read."""

from pathlib import Path

import click

from pipeline_lib.core import artifacts, params, runtime
from pipeline_lib.reporting import table
from pipeline_lib.reporting.render import FIGURES, render
from pipeline_lib.reporting.table import ReportParams, Text

OUT = Path("report")


@click.command(help=__doc__)
def main() -> None:
    with runtime.stage() as tell:
        settings = params.load(ReportParams, "report")
        texts = {name: Text(text["rows"], text["length"]) for name, text in params.section("texts").items() if text["use"] == "evaluate"}
        names, exported = list(params.section("variants") or {}), list(params.section("exported") or {})
        measured = [table.DENSE, *params.section("tasks.variants")]
        tasks = dict.fromkeys(params.section("tasks.presets"), measured)
        written = params.FILE.read_text(encoding="utf-8")
        results = table.collect(Path("build"), settings, names, texts, exported, tasks, written)
        report = render(results)
        with artifacts.replacing(OUT / FIGURES) as directory:
            directory.mkdir()
            for name, svg in report.figures.items():
                (directory / name).write_text(svg, encoding="utf-8")
        artifacts.write_text(OUT / "index.html", report.html)
        artifacts.write_text(OUT / "index.md", report.markdown)
        artifacts.write_json(OUT / "summary.json", table.summary(results))
        artifacts.write_json(OUT / "costs.json", table.costs(results))
        artifacts.write_json(OUT / "perplexity.json", table.points(results))
        notes = table.notes(results)
        artifacts.write_text(OUT / "table.txt", "\n".join([table.plain(table.comparison(results)), *notes]) + "\n")
        for note in notes:
            click.echo(f"report: {note}")
        tell(f"report: {len(results.pruned)} pruned variants; read {OUT / 'index.html'}, or {OUT / 'table.txt'}")


if __name__ == "__main__":
    main()
