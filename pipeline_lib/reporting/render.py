"""The report as one self-contained HTML page."""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from pipeline_lib.reporting import content, overview, plots
from pipeline_lib.reporting.costs import Costs, by_variant
from pipeline_lib.reporting.table import Column, Results


def render(results: Results) -> str:
    """The page; the same bytes for the same results."""
    sections = {title: blocks(results) for title, blocks in content.SECTIONS.items()}
    chart = plots.tradeoff(results)
    return _template("report.html.jinja").render(
        title=results.settings.title,
        lead=overview.headline(results),
        details=overview.details(results),
        chart=[chart] if chart else [],
        table=overview.columns(results),
        sections=sections,
    )


def costs(results: Results, measured: Costs) -> str:
    """The script ``costs.js``: it adds the costs to the first screen, and fills the section Costs."""
    blocks, spent = _template("blocks.html.jinja").module, by_variant(results, measured)
    section = "".join(blocks.show(one) for one in content.measured_costs(results, measured))  # type: ignore[attr-defined]
    parts = {
        "overview": blocks.body("table", overview.columns(results, spent)),  # type: ignore[attr-defined]
        "spent": overview.spent(results, spent),
        "costs": f"<h2>Costs</h2>{section}",
    }
    return "".join(
        f"document.getElementById('{name}').innerHTML = {json.dumps(str(html))};\n"
        for name, html in parts.items()
    )


def _template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "prose": _prose,
        "groups": _groups,
        "anchor": lambda title: title.lower().replace(" ", "-"),
    }
    return environment.get_template(name)


def _prose(text: str) -> Markup:
    """Turn `code` marks into elements, and escape everything else."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _groups(columns: Sequence[Column]) -> list[tuple[str, int]]:
    """Neighbouring columns under one group head, and how many they are; none if no column has a group."""
    spans = [
        (name, len(list(under))) for name, under in itertools.groupby(columns, lambda column: column.group)
    ]
    return spans if any(name for name, _ in spans) else []
