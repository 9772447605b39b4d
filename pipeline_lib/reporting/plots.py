"""Figures as SVG text: deterministic, without a background, and with text and axes in the text colour
of the page (currentColor).

Figures are narrow, so that they can be read on a phone, and their text is text.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, MaxNLocator

from pipeline_lib.export import wording
from pipeline_lib.reporting import overview, table
from pipeline_lib.reporting.table import Results, Variant

INK = "#0a0b0c"  # stands for currentColor until the SVG is written
WIDTH = 4.5  # inches
# Readable on white and on near-black: after Okabe and Ito, with similar lightness.
HUES = ("#3b82c4", "#d9822b", "#2a9d78", "#b05fb0", "#d1495b", "#8a8f3c", "#4aa8b8", "#a0734f")
GREY = "#8a8f98"
DASHED: dict[str, Any] = {"color": INK, "linewidth": 0.8, "linestyle": (0, (3, 3))}
STYLE = {
    **dict.fromkeys(
        (
            "text.color",
            "axes.labelcolor",
            "axes.titlecolor",
            "axes.edgecolor",
            "xtick.color",
            "ytick.color",
            "grid.color",
        ),
        INK,
    ),
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 9),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8),
    **dict.fromkeys(
        ("legend.frameon", "axes.spines.top", "axes.spines.right", "axes.formatter.useoffset"), False
    ),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    **{
        "axes.linewidth": 0.6,
        "grid.linewidth": 0.6,
        "grid.alpha": 0.13,
        "axes.axisbelow": True,
        "figure.constrained_layout.use": True,
    },
    # this font is part of matplotlib, so that the layout is the same everywhere
    **{"svg.fonttype": "none", "svg.hashsalt": "sparseline", "font.family": "DejaVu Sans"},
}


@dataclass(frozen=True)
class Figure:
    """An SVG with its alternative text and its caption."""

    name: str
    svg: str
    alt: str
    caption: str


@contextmanager
def _canvas(height: float) -> Iterator[Canvas]:
    with matplotlib.rc_context(STYLE):
        yield Canvas(figsize=(WIDTH, height))


def _figure(canvas: Canvas, name: str, alt: str, caption: str) -> Figure:
    """The <svg> element, with currentColor for INK and without unused ids (several figures share a
    page).
    """
    buffer = io.StringIO()
    canvas.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    svg = buffer.getvalue()
    svg = (
        svg[svg.index("<svg") :]
        .replace(INK, "currentColor")
        .replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    )
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)
    # The natural size in CSS pixels: matplotlib's are points.
    svg = re.sub(
        r' (width|height)="([\d.]+)pt"',
        lambda match: f' {match[1]}="{round(float(match[2]) * 4 / 3)}"',
        svg,
        count=2,
    )
    return Figure(name, svg.replace("<svg ", '<svg role="img" ', 1).strip() + "\n", alt, caption)


def _panels(canvas: Canvas, count: int, across: int, **shared: Any) -> list[Axes]:
    """``count`` axes in rows of ``across``; the rest of the last row is empty."""
    across = min(across, count)
    axes = list(canvas.subplots(-(-count // across), across, squeeze=False, **shared).flat)
    for empty in axes[count:]:
        empty.set_visible(False)
    for lowest in axes[max(0, count - across) : count]:  # the lowest one of each column has the tick labels
        lowest.tick_params(labelbottom=True)
    return axes[:count]


def _hue(results: Results, variant: Variant) -> str:
    return HUES[results.pruned.index(variant) % len(HUES)] if variant in results.pruned else GREY


def _blocks_axis(axes: Axes, most: int = 12) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10], integer=True))


def _log_percent(axes: Axes) -> None:
    """A logarithmic y axis in percent, with labels even if it spans less than a decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    steps = (1,) if decades > 3 else (1, 3) if decades > 1.3 else (1, 1.5, 2, 3, 4, 5, 7)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.minorticks_off()
    axes.set_ylim(low, high)


def _legend(canvas: Canvas, axes: Axes, across: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    canvas.legend(
        handles, labels, loc="outside upper center", ncols=across, columnspacing=1.2, handlelength=1.4
    )


# The first screen


def tradeoff(results: Results) -> Figure | None:
    """Perplexity on the main text over the size of all weights, a point per model."""
    text, taken = results.main_text, overview.recommended(results)
    sizes = [overview.size(results, variant) for variant in results.variants]
    known = [size for size in sizes if size]
    if text is None or not results.pruned or len(known) < len(sizes):
        return None
    unit, scale = next(
        (unit, scale)
        for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
        if known[0].bytes >= scale or scale == 1e3
    )
    across = [size.bytes / scale for size in known]
    up = [variant.perplexity[text] for variant in results.variants]
    with _canvas(2.9) as canvas:
        axes = canvas.subplots()
        axes.axhline(up[0], **DASHED)
        for variant, size, x, y in zip(results.variants, known, across, up, strict=True):
            hue, bold = _hue(results, variant), variant is taken
            style: dict[str, Any] = {"edgecolor": hue, "facecolor": hue if size.measured else "none"}
            axes.scatter(x, y, s=70 if bold else 34, linewidth=1.6, zorder=4 if bold else 3, **style)
        if max(up) > 3 * min(up):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.minorticks_off()
        axes.set(xlabel=f"size of all weights, {unit}", ylabel=f"perplexity on {text}")
        width, (low, high) = max(across) - min(across) or max(across), axes.get_ylim()
        axes.set_xlim(min(across) - 0.1 * width, max(across) + 0.3 * width)
        axes.set_ylim(low, high)
        axes.locator_params(axis="x", nbins=6)
        axes.grid()
        _names(axes, results, across, up, None if taken is None else taken.name)
        caption = (
            f"Lower and further to the left is better. The dashed line is the dense model ({up[0]:.2f})."
        )
        caption += "" if all(size.measured for size in known) else HOLLOW
        alt = f"Perplexity on {text} over size: " + "; ".join(
            f"{variant.name} {y:.2f} at {x:.2f} {unit}"
            for variant, x, y in zip(results.variants, across, up, strict=True)
        )
        return _figure(canvas, "tradeoff", f"{alt}.", caption)


HOLLOW = " A hollow point has a computed size (≈), because the variant is not exported in that format."
LONGEST = 30  # characters of a name in the chart; the table has it in full
LINE = 0.062  # minimum distance of two names, as a share of the axes' height


def _names(
    axes: Axes, results: Results, across: Sequence[float], up: Sequence[float], bold: str | None
) -> None:
    """Write each point's name to its right. Names of points with nearly the same size keep a
    distance, and a thin line leads to each point whose name was moved.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    points = [tuple(to_axes.transform((x, y))) for x, y in zip(across, up, strict=True)]
    order = sorted(range(len(points)), key=lambda one: points[one][1])
    placed: dict[int, float] = {}
    for one in order:
        x, y = points[one]
        beside = [placed[other] for other in placed if abs(points[other][0] - x) < 0.25]
        line = LINE * 0.7 if one == 0 else 0.0  # the dense model's name stands above the dashed line
        placed[one] = max([y + line, *(at + LINE for at in beside)])
    for one, y in placed.items():
        variant, (x, own) = results.variants[one], points[one]
        moved = one > 0 and y - own > LINE / 4
        axes.annotate(
            variant.name if len(variant.name) <= LONGEST else f"{variant.name[: LONGEST - 1]}…",
            (x, own),
            (x + (0.07 if moved else 0.035), y),
            xycoords="axes fraction",
            fontsize=8,
            va="center",
            weight="bold" if variant.name == bold else "normal",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": INK, "alpha": 0.5} if moved else None,
        )


# Comparison


def perplexity(results: Results) -> Figure | None:
    """The loss that pruning adds, per text; "gap closed" is the part of the baseline's bar that a
    variant removes.
    """
    texts, names, base = results.text_names, [variant.name for variant in results.pruned], results.baseline
    if not texts or not names:
        return None
    with _canvas(0.55 + (0.35 + 0.26 * len(names)) * -(-len(texts) // 2)) as canvas:
        for axes, text in zip(_panels(canvas, len(texts), 2, sharey=True), texts, strict=True):
            dense = results.dense.perplexity[text]
            added = [math.log(variant.perplexity[text] / dense) for variant in results.pruned]
            axes.barh(names, added, height=0.62, color=[_hue(results, variant) for variant in results.pruned])
            reach, dashed = max(*added, 0.0) or 1.0, added[names.index(base.name)] if base else 0.0
            if dashed:
                axes.axvline(dashed, **DASHED)
            # the texts keep clear of the dashed line
            for row, (variant, value) in enumerate(zip(results.pruned, added, strict=True)):
                cell = wording.perplexity(variant.perplexity[text])
                axes.text(max(value, dashed, 0.0) + 0.03 * reach, row, cell, va="center", fontsize=8)
            axes.set(xlim=(min(0.0, *added) * 1.05, reach * 1.3), xlabel="added loss, nats per token")
            axes.set_title(f"{text} (dense {wording.perplexity(dense)})", loc="left")
            axes.locator_params(axis="x", nbins=4)
            axes.grid(axis="x")
            axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()  # shared: the first variant is on top
        caption = "ln(perplexity / dense perplexity); 0 is the dense model. Beside each bar: the perplexity."
        caption += f" The dashed line is the baseline, {base.name}." if base else ""
        return _figure(
            canvas, "perplexity", f"Bars of added loss over the dense model for {', '.join(names)}.", caption
        )


# Matrices by depth


def heatmaps(results: Results) -> list[Figure]:
    """Depth × kind, one figure per variant that is not uniform, all with the same colours."""
    found = {
        variant.name: table.by_place(variant.facts)
        for variant in results.pruned
        if not table.uniform(variant.facts)
    }
    every = [share for shares in found.values() for share in shares.values()]
    return [_heatmap(name, shares, (min(every), max(every))) for name, shares in found.items()]


def _heatmap(name: str, shares: Mapping[tuple[int, str], float], limits: tuple[float, float]) -> Figure:
    kinds, blocks = table.in_order({kind for _, kind in shares}), sorted({block for block, _ in shares})
    values = np.array([[shares.get((block, kind), math.nan) for kind in kinds] for block in blocks])
    # numbers in the cells, otherwise a colour bar
    written = len(blocks) <= 16 and len(kinds) <= 10
    height = 0.24 if written else max(0.05, min(0.14, 7 / len(blocks)))
    with _canvas(0.75 + height * len(blocks) + (0 if written else 0.5)) as canvas:
        axes = canvas.subplots()
        colours = matplotlib.colormaps["cividis_r"].resampled(24)
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(values),
            cmap=colours,
            vmin=limits[0],
            vmax=limits[1],
            linewidth=0.3,
            edgecolors="face",
        )
        for (row, column), share in np.ndenumerate(values) if written else ():
            if not math.isnan(share):
                ink = "#ffffff" if share > sum(limits) / 2 else "#111111"
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    f"{100 * share:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=ink,
                )
        step = next(step for step in (1, 2, 4, 5, 8, 10, 20, 50) if len(blocks) / step <= 20)
        axes.set_yticks(
            [row + 0.5 for row in range(0, len(blocks), step)], [str(block) for block in blocks[::step]]
        )
        axes.set_xticks([column + 0.5 for column in range(len(kinds))], kinds)
        axes.set_ylabel("block")
        axes.invert_yaxis()
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set_title(f"{name}: pruned weights, %", loc="left")
        axes.spines[:].set_visible(False)
        if not written:
            bar = canvas.colorbar(
                mesh, ax=axes, location="bottom", aspect=40, format=lambda share, _: f"{100 * share:.0f}"
            )
            bar.outline.set_visible(False)
        caption = f"{name}: share of pruned weights in percent, by block and kind of matrix; darker is more."
        return _figure(
            canvas,
            f"sparsity-{name}",
            f"Share of pruned weights of {name} by block and kind of matrix.",
            caption,
        )


def sensitivity(measured: Variant, quantity: str) -> Figure:
    """The mean diagonal of ``quantity`` by depth, a panel per kind, on one logarithmic axis."""
    # kind -> block, estimate, standard error, whether it is above that
    points: dict[str, list[tuple[int, float, float, bool]]] = {}
    for one in sorted(table.sensitivities(measured.facts).values(), key=lambda one: int(one["block"])):
        estimate = (int(one["block"]), one["sensitivity"], one["stderr"], one["trace"] >= one["stderr"])
        points.setdefault(one["kind"], []).append(estimate)
    sizes = [size for of_kind in points.values() for _, size, _, _ in of_kind if size > 0]
    low, high = (min(sizes) / 2, max(sizes) * 2.5) if sizes else (1e-3, 1.0)
    across = 4 if len(points) in (4, 7, 8) or len(points) > 9 else 3  # 4 if that saves a row or fills it
    with _canvas(0.4 + 1.3 * -(-len(points) // across)) as canvas:
        panels = _panels(canvas, len(points), across, sharex=True, sharey=True)
        for number, (axes, kind) in enumerate(zip(panels, table.in_order(points), strict=True)):
            hue = HUES[number % len(HUES)]
            blocks, size, error, known = (np.array(part) for part in zip(*points[kind], strict=True))
            size = np.maximum(size, low)
            axes.vlines(
                blocks, np.maximum(size - error, low), size + error, color=hue, linewidth=1.2, alpha=0.7
            )
            axes.scatter(
                blocks,
                size,
                s=16 if len(blocks) <= 40 else 4,
                edgecolor=hue,
                facecolor=[hue if one else "none" for one in known],
            )
            axes.set(yscale="log", ylim=(low, high), xmargin=0.1)
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.set_title(kind, loc="left")
            axes.grid(axis="y")
            _blocks_axis(axes, most=6)
            axes.minorticks_off()
        canvas.supxlabel("block", fontsize=9)
        canvas.supylabel("mean diagonal", fontsize=9)
        caption = (
            f"Mean diagonal of the {quantity} by depth, one panel per kind of matrix; bars are ± one standard"
            " error over the probes."
        )
        if not all(known for of_kind in points.values() for *_, known in of_kind):
            caption += " A hollow point is an estimate below its standard error, shown at its standard error."
        return _figure(
            canvas, "sensitivity", "Sensitivity by depth and kind of matrix, logarithmic.", caption
        )


def layer_error(results: Results) -> Figure | None:
    """Mean relative layer error per block, one line per variant that measured it."""
    lines = [(variant, found) for variant in results.pruned if (found := table.layer_errors(variant.facts))]
    if not lines:
        return None
    with _canvas(2.5) as canvas:
        axes = canvas.subplots()
        for variant, errors in lines:
            # after the last hue, the first one returns
            dashed = "-" if results.pruned.index(variant) < len(HUES) else "--"
            style: dict[str, Any] = {
                "linewidth": 1.4,
                "linestyle": dashed,
                "marker": "o",
                "markersize": 3.5,
                "label": variant.name,
            }
            axes.plot(
                list(errors),
                [max(error, 1e-9) for error in errors.values()],
                color=_hue(results, variant),
                **style,
            )
        _log_percent(axes)
        axes.set(xlabel="block", ylabel="layer error")
        _blocks_axis(axes)
        axes.grid(axis="y", which="both")
        _legend(canvas, axes, 4)
        caption = (
            "‖(W − Ŵ)X‖² / ‖WX‖², mean over a block's matrices. X are the pruned model's activations, and Ŵ"
            " includes the compensation of the variant."
        )
        left = [variant.name for variant in results.pruned if not table.layer_errors(variant.facts)]
        caption += f" Not measured: {', '.join(left)}." if left else ""
        return _figure(canvas, "layer-error", "Relative layer error by depth, one line per variant.", caption)
