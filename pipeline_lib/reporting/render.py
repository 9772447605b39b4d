"""The report as one self-contained HTML page, and as Markdown with its figures beside it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from pipeline_lib.reporting import content
from pipeline_lib.reporting.costs import Costs
from pipeline_lib.reporting.table import Results

FIGURES = "figures"  # folder of the Markdown's figures, beside it
# A figure in a file of its own has no page to take its colours from.
_DARK = "@media (prefers-color-scheme: dark) { svg { color: #dfe4ea; background: #14181d } }"
_COLOURS = f"<style>svg {{ color: #1c2128; background: #ffffff }} {_DARK}</style>"


@dataclass(frozen=True)
class Report:
    """Everything to write, as text."""

    html: str
    markdown: str
    figures: dict[str, str]  # file name -> SVG


def render(results: Results) -> Report:
    """The whole report; the same bytes for the same results."""
    sections = content.sections(results)
    lead = content.lead(results)
    figures = {f"{figure.name}.svg": _alone(figure.svg) for figure in content.figures(sections)}
    html = page(results.title, lead, sections)
    markdown = _template("report.md.jinja", html=False).render(title=results.title, lead=lead, sections=sections, folder=FIGURES)
    return Report(html, _tidy(markdown), figures)


def page(title: str, lead: str, sections: Sequence[content.Section]) -> str:
    """A self-contained HTML page."""
    return _template("report.html.jinja", html=True).render(title=title, lead=lead, sections=sections)


def costs(results: Results, measured: Costs) -> str:
    """The script ``costs.js``, which puts the costs into the page's section in the place of the sentence there."""
    show = _template("blocks.html.jinja", html=True).module.show  # type: ignore[attr-defined]
    shown = "".join(show(block) for block in content.costs(results, measured))
    heading = "<h2>Costs</h2>"
    return f"document.getElementById('costs').innerHTML = {json.dumps(heading + shown)};\n"


def _alone(svg: str) -> str:
    start = svg.index(">", svg.index("<svg")) + 1
    return svg[:start] + _COLOURS + svg[start:]


def _template(name: str, html: bool) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"prose": _prose, "cell": _cell, "fenced": _fenced}
    return environment.get_template(name)


def _prose(text: str) -> Markup:
    """`code` marks as elements, everything else escaped."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _cell(text: str) -> str:
    """A cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _fenced(text: str) -> str:
    """A Markdown code block; its fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _tidy(markdown: str) -> str:
    return markdown.strip() + "\n"
