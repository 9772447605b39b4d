"""Figures as SVG text: the same bytes for the same data, no background, text and axes in the reader's colour (currentColor).

All figures are narrow (a phone shows them at three quarters), with real text in them.
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
from matplotlib.ticker import LogLocator

from pipeline_lib.export import wording
from pipeline_lib.reporting import sizes as weighed
from pipeline_lib.reporting import table
from pipeline_lib.reporting.table import Results, Variant

INK = "#0a0b0c"  # stands for currentColor until the SVG is written
WIDTH = 4.5  # inches
# Hues that hold on white and on near-black: after Okabe and Ito, evened out in lightness.
HUES = ("#3b82c4", "#d9822b", "#2a9d78", "#b05fb0", "#d1495b", "#8a8f3c", "#4aa8b8", "#a0734f")
GREY = "#8a8f98"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sparseline",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the layout is the same everywhere
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Figure:
    """An SVG with the sentence that stands for it and the one below it."""

    name: str  # of the file, without .svg
    svg: str
    alt: str
    caption: str


@contextmanager
def _canvas(height: float) -> Iterator[Canvas]:
    with matplotlib.rc_context(STYLE):
        yield Canvas(figsize=(WIDTH, height))


def _svg(canvas: Canvas) -> str:
    """The <svg> element alone, with currentColor for INK and without ids that nothing refers to (several figures share a page)."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub(r' width="([\d.]+)pt" height="([\d.]+)pt"| height="([\d.]+)pt" width="([\d.]+)pt"', "", text, count=1)
    text = re.sub(r'<svg ([^>]*?)\bviewBox="0 0 ([\d.]+) ([\d.]+)"', _sized, text, count=1, flags=re.DOTALL)
    return text.replace("<svg ", '<svg role="img" ', 1).strip() + "\n"


def _sized(match: re.Match[str]) -> str:
    """Width and height in CSS pixels (matplotlib's are points), so that a figure has a natural size of its own."""
    width, height = (round(float(match[side]) * 4 / 3) for side in (2, 3))
    return f'<svg {match[1]}width="{width}" height="{height}" viewBox="0 0 {match[2]} {match[3]}"'


def _panels(canvas: Canvas, count: int, across: int, **shared: Any) -> list[Axes]:
    """``count`` axes in rows of ``across``; places left over stay empty."""
    across = min(across, count)
    grid = canvas.subplots(-(-count // across), across, squeeze=False, **shared)
    axes = list(grid.flat)
    for empty in axes[count:]:
        empty.set_visible(False)
    for above in axes[max(0, count - across) : count]:  # the lowest of each column carries the tick labels
        above.tick_params(labelbottom=True)
    return axes[:count]


def _across(count: int) -> int:
    """Panels in a row: four where that saves a row or fills it."""
    return 4 if count in (4, 7, 8) or count > 9 else 3


def _hue(results: Results, variant: Variant) -> str:
    return HUES[results.pruned.index(variant) % len(HUES)] if variant.pruned else GREY


def _blocks_axis(axes: Axes, blocks: Sequence[int], most: int = 12) -> None:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200) if (blocks[-1] - blocks[0]) / step <= most)
    axes.set_xticks([block for block in range(0, blocks[-1] + 1, step) if block >= blocks[0]])


# Comparison


def perplexity(results: Results) -> Figure | None:
    """What pruning adds to the loss, per text: the length that "gap closed" shortens."""
    texts = [text for text in results.text_names if text in results.dense.perplexity]
    if not texts or not results.pruned:
        return None
    names = [variant.name for variant in results.pruned]
    with _canvas(0.55 + (0.35 + 0.26 * len(names)) * -(-len(texts) // 2)) as canvas:
        for axes, text in zip(_panels(canvas, len(texts), 2, sharey=True), texts, strict=True):
            dense = results.dense.perplexity[text]
            added = [math.log(v.perplexity[text] / dense) if text in v.perplexity else 0.0 for v in results.pruned]
            axes.barh(names, added, height=0.62, color=[_hue(results, variant) for variant in results.pruned])
            reach = max(*added, 0.0) or 1.0
            base = added[names.index(results.baseline)] if results.baseline in names else 0.0
            if base:
                axes.axvline(base, color=INK, linewidth=0.8, linestyle=(0, (3, 3)))
            for row, (variant, value) in enumerate(zip(results.pruned, added, strict=True)):
                shown = wording.perplexity(variant.perplexity[text]) if text in variant.perplexity else table.ABSENT
                axes.text(max(value, base, 0.0) + 0.03 * reach, row, shown, va="center", fontsize=8)  # clear of the dashed line
            axes.set_xlim(min(0.0, *added) * 1.05, reach * 1.3)
            axes.set_title(f"{text} (dense {wording.perplexity(dense)})", loc="left")
            axes.set_xlabel("added loss, nats per token")
            axes.locator_params(axis="x", nbins=4)
            axes.grid(axis="x")
            axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()  # shared: the first variant is on top
        svg = _svg(canvas)
    dashed = f" The dashed line is the baseline, {results.baseline}." if results.baseline in names else ""
    caption = f"ln(perplexity / dense perplexity), with the perplexity beside each bar; 0 is the dense model.{dashed}"
    return Figure("perplexity", svg, f"Bars of added loss over the dense model for {', '.join(names)}.", caption)


def accuracy(results: Results) -> Figure | None:
    """Accuracy of every task with its standard error and the level of guessing."""
    if not results.task_names:
        return None
    measured = [variant for variant in results.variants if variant.tasks]
    names = [variant.name for variant in measured]
    with _canvas(0.55 + (0.35 + 0.24 * len(names)) * -(-len(results.task_names) // 2)) as canvas:
        for axes, task in zip(_panels(canvas, len(results.task_names), 2, sharey=True), results.task_names, strict=True):
            for row, variant in enumerate(measured):
                if (found := variant.tasks.get(task)) is not None:
                    error = 100 * found.stderr
                    axes.errorbar(100 * found.acc, row, xerr=error, fmt="o", markersize=4.5, color=_hue(results, variant), elinewidth=1.4)
                    if found.chance is not None:
                        axes.axvline(100 * found.chance, color=INK, linewidth=0.8, linestyle=":")
            axes.set_yticks(range(len(names)), names)
            axes.set_title(task, loc="left")
            axes.set_xlabel("accuracy, %")
            axes.locator_params(axis="x", nbins=5)
            axes.grid(axis="x")
            axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(names) - 0.5, -0.5)
        svg = _svg(canvas)
    caption = "Accuracy ± one standard error of the mean; the dotted line is what guessing gives."
    return Figure("accuracy", svg, f"Task accuracy with error bars for {', '.join(names)}.", caption)


def tradeoff(text: str, lines: Mapping[str, Sequence[tuple[float, float]]], dense: float) -> Figure:
    """Perplexity over sparsity: a point per model, a line per variant through the best of each sparsity.

    Args:
        lines: variant -> (sparsity, perplexity).
        dense: perplexity of the source model.
    """
    with _canvas(3.0) as canvas:
        axes = canvas.subplots()
        for number, (name, points) in enumerate(lines.items()):
            hue, marker = HUES[number % len(HUES)], "os^D"[number // len(HUES) % 4]  # a second round of hues has other marks
            best = dict(sorted(points, reverse=True))  # the last of a sparsity is its lowest
            axes.plot(
                [100 * sparsity for sparsity, _ in points], [value for _, value in points], marker, color=hue, markersize=4, alpha=0.6
            )
            axes.plot(
                [100 * sparsity for sparsity in best], list(best.values()), f"{marker}-", color=hue, markersize=4, linewidth=1.3, label=name
            )
        axes.axhline(dense, color=INK, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda _value, _: "")
        axes.set_xlabel("pruned weights, %")
        axes.set_ylabel(f"perplexity, {text}")
        axes.grid()
        _legend(canvas, axes, 4)
        svg = _svg(canvas)
    caption = f"Perplexity on {text}, each line through the lowest of its variant. The dashed line is the dense model's, {wording.perplexity(dense)}."
    return Figure(f"tradeoff-{text}", svg, f"Perplexity on {text} over the share of pruned weights for {', '.join(lines)}.", caption)


# Sizes


def sizes(results: Results) -> Figure | None:
    """Perplexity over bits per weight, every variant in its smallest format: what lies lower left is better and smaller."""
    text = results.main_text
    found = [variant for variant in weighed.exported(results) if text in variant.perplexity]
    if text is None or not found:
        return None
    with _canvas(2.6) as canvas:
        axes = canvas.subplots()
        for variant in found:
            bits = variant.sizes["formats"][weighed.smallest(variant)]["bits"]
            axes.plot(bits, variant.perplexity[text], "o", color=_hue(results, variant), markersize=5, label=variant.name)
        if text in results.dense.perplexity:
            axes.axhline(results.dense.perplexity[text], color=INK, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.set_xlabel("bits per weight of the pruned matrices")
        axes.set_ylabel(f"perplexity, {text}")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda _value, _: "")
        axes.set_xlim(0, None)
        axes.grid()
        canvas.legend(loc="outside right upper")
        svg = _svg(canvas)
    names = ", ".join(variant.name for variant in found)
    caption = (
        "Every variant in its smallest format; points above each other are equal in bytes. The dashed line is the dense model's perplexity."
    )
    return Figure("sizes", svg, f"Perplexity over bits per weight for {names}.", caption)


# Sparsity per matrix


def heatmaps(results: Results) -> list[Figure]:
    """Depth × kind, one figure per variant that is not uniform, all with the same colours."""
    found = {v.name: table.sparsity_by_place(v.facts) for v in results.pruned if not table.uniform(v.facts)}
    if not found:
        return []
    everything = [share for shares in found.values() for share in shares.values()]
    low, high = min(everything), max(everything)
    return [_heatmap(variant, found[variant.name], low, high) for variant in results.pruned if variant.name in found]


def _heatmap(variant: Variant, shares: Mapping[tuple[int, str], float], low: float, high: float) -> Figure:
    kinds, blocks = table.kinds(variant.facts), sorted({block for block, _ in shares})
    values = np.array([[shares.get((block, kind), math.nan) for kind in kinds] for block in blocks])
    written = len(blocks) <= 16 and len(kinds) <= 10
    height = 0.24 if written else max(0.05, min(0.14, 7 / len(blocks)))
    with _canvas(0.75 + height * len(blocks) + (0 if written else 0.5)) as canvas:
        axes = canvas.subplots()
        colours = matplotlib.colormaps["cividis_r"].resampled(24)
        mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, linewidth=0.3, edgecolors="face")
        for row, column in np.ndindex(values.shape) if written else ():
            if not math.isnan(share := values[row, column]):
                red, green, blue, _ = colours(mesh.norm(share))
                bright = 0.299 * red + 0.587 * green + 0.114 * blue
                ink = "#111111" if bright > 0.5 else "#ffffff"
                axes.text(column + 0.5, row + 0.5, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=ink)
        step = next(step for step in (1, 2, 4, 5, 8, 10, 20, 50) if len(blocks) / step <= 20)
        axes.set_yticks([row + 0.5 for row in range(0, len(blocks), step)], [str(block) for block in blocks[::step]])
        axes.set_xticks([column + 0.5 for column in range(len(kinds))], kinds)
        axes.set_ylabel("block")
        axes.invert_yaxis()
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set_title(f"{variant.name}: pruned weights, %", loc="left")
        for spine in axes.spines.values():
            spine.set_visible(False)
        if not written:
            bar = canvas.colorbar(mesh, ax=axes, location="bottom", aspect=40, format=lambda share, _: f"{100 * share:.0f}")
            bar.outline.set_visible(False)
        svg = _svg(canvas)
    name = variant.name
    return Figure(
        f"sparsity-{name}",
        svg,
        f"Share of pruned weights of {name} by block and kind of matrix.",
        f"{name}: share of pruned weights in percent, by depth and kind; dark is much.",
    )


# Sensitivity


def sensitivity(measured: Variant, quantity: str) -> Figure:
    """The mean diagonal of ``quantity`` by depth, a panel per kind, on one logarithmic axis."""
    by_kind: dict[str, list[tuple[int, float, float]]] = {kind: [] for kind in table.kinds(measured.facts)}
    for (block, kind), matrices in sorted(table.by_place(measured.facts).items()):
        found = [(matrix["size"], matrix["sensitivity"]) for matrix in matrices if matrix["sensitivity"] is not None]
        if total := sum(size for size, _ in found):  # experts: the mean over their weights
            trace = sum(size * one["trace"] for size, one in found) / total
            error = math.sqrt(sum((size * one["stderr"]) ** 2 for size, one in found)) / total
            by_kind[kind].append((block, trace, error))
    by_kind = {kind: points for kind, points in by_kind.items() if points}
    blocks = sorted({block for points in by_kind.values() for block, _, _ in points})
    sizes = [size for points in by_kind.values() for _, trace, error in points if (size := max(trace, error)) > 0]
    low, high = (min(sizes) / 2, max(sizes) * 2.5) if sizes else (1e-3, 1.0)
    floored = any(trace < error for points in by_kind.values() for _, trace, error in points)
    with _canvas(0.4 + 1.3 * -(-len(by_kind) // _across(len(by_kind)))) as canvas:
        axes_of = _panels(canvas, len(by_kind), _across(len(by_kind)), sharex=True, sharey=True)
        for number, (axes, (kind, points)) in enumerate(zip(axes_of, by_kind.items(), strict=True)):
            hue = HUES[number % len(HUES)]
            axes.plot([b for b, _, _ in points], [max(t, e, low) for _, t, e in points], color=hue, linewidth=0.8, alpha=0.35)
            for block, trace, error in points:
                size = max(trace, error, low)
                face = hue if trace >= error else "none"
                axes.plot([block, block], [max(size - error, low), size + error], color=hue, linewidth=1.2, alpha=0.7)
                axes.plot(
                    block, size, marker="o", markersize=4 if len(blocks) <= 40 else 2, color=hue, markerfacecolor=face, linestyle="none"
                )
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.set_ylim(low, high)
            axes.set_title(kind, loc="left")
            axes.grid(axis="y")
            _blocks_axis(axes, blocks, most=6)
            axes.minorticks_off()
        canvas.supxlabel("block", fontsize=9)
        canvas.supylabel("mean diagonal", fontsize=9)
        svg = _svg(canvas)
    hollow = " Hollow: the estimate is below its standard error and stands there." if floored else ""
    caption = (
        f"Mean diagonal of the {quantity} by depth, one panel per kind of matrix; bars are ± one standard error over the probes.{hollow}"
    )
    return Figure("sensitivity", svg, "Sensitivity by depth and kind of matrix, logarithmic.", caption)


# Induction


def scores(variant: Variant) -> Figure:
    """Histograms of the log score before and after induction, one panel per kind."""
    histograms = {kind: variant.facts["transform"]["scores"][kind] for kind in _ordered(variant.facts["transform"]["scores"])}
    with _canvas(0.55 + 1.2 * -(-len(histograms) // _across(len(histograms)))) as canvas:
        axes_of = _panels(canvas, len(histograms), _across(len(histograms)))
        for axes, (kind, shares) in zip(axes_of, histograms.items(), strict=True):
            before, after = (100 * np.array(shares[side]) for side in ("before", "after"))
            axes.stairs(before, shares["edges"], fill=True, color=GREY, alpha=0.45, linewidth=0, label="before")
            axes.stairs(after, shares["edges"], color=HUES[0], linewidth=1.1, label="after")
            axes.set_title(f"{kind}: {abs(after - before).sum() / 2:.1f}%", loc="left")
            axes.set_ylim(0, None)
            axes.set_yticks([])
            axes.locator_params(axis="x", nbins=3)
            axes.spines["left"].set_visible(False)
        _legend(canvas, axes_of[0], 2)
        canvas.supxlabel("log10 of the score", fontsize=9)
        svg = _svg(canvas)
    name = variant.name
    caption = (
        f"{name}: how scores are distributed without induction (grey) and with it (line), all blocks together. The percentage is half the absolute \
difference of the two histograms; the outermost bins hold the tails."
    )
    return Figure(f"scores-{name}", svg, f"Score histograms of {name} before and after induction.", caption)


def curve(variant: Variant) -> Figure | None:
    """Held-out error and loss by step, one line per block."""
    induction = variant.facts["transform"]["induction"]
    lines: dict[int, list[tuple[int, float, float]]] = {}
    for point in variant.facts["transform"].get("curve") or ():
        lines.setdefault(int(point["block"]), []).append((int(point["step"]), float(point["held_out"]), float(point["loss"])))
    if not lines:
        return None
    blocks = sorted(lines)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.32, 0.82, len(blocks)))
    with _canvas(2.45) as canvas:
        errors, losses = _panels(canvas, 2, 2, sharex=True)
        for block, shade in zip(blocks, shades, strict=True):
            steps, held_out, loss = (np.array(part) for part in zip(*sorted(lines[block]), strict=True))
            none = induction[str(block)]["held_out"]["none"]
            style: dict[str, Any] = {"color": shade, "linewidth": 1.3, "marker": "o", "markersize": 2.5, "label": f"block {block}"}
            errors.plot(steps, 100 * (held_out / none - 1), **style)
            losses.plot(steps, 100 * (loss / loss[0] - 1), **style)
        errors.axhline(0, color=INK, linewidth=0.8, linestyle=":")
        errors.set_title("layer error against none, %", loc="left")
        losses.set_title("loss against the first look, %", loc="left")
        for axes in (errors, losses):
            axes.set_xlabel("step")
            axes.locator_params(nbins=5)
            axes.locator_params(axis="x", integer=True)
            axes.grid(axis="y")
        if len(blocks) <= 8:
            _legend(canvas, errors, 4)
        svg = _svg(canvas)
    name = variant.name
    order = "" if len(blocks) <= 8 else " Dark to light: first to last block."
    caption = f"{name}: layer error on held-out rows relative to no induction, and the training loss, at every look.{order}"
    return Figure(f"induction-{name}", svg, f"Induction curves of {name}, one line per block.", caption)


def _ordered(kinds: Mapping[str, Any]) -> list[str]:
    return sorted(kinds, key=lambda kind: (table.ORDER.index(kind) if kind in table.ORDER else len(table.ORDER), kind))


def _legend(canvas: Canvas, axes: Axes, across: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=across, columnspacing=1.2, handlelength=1.4)


# Reconstruction


def layer_error(results: Results) -> Figure | None:
    """Mean relative layer error per block, one line per variant."""
    if not results.pruned:
        return None
    with _canvas(2.5) as canvas:
        axes = canvas.subplots()
        places = sorted({int(matrix["block"]) for variant in results.pruned for matrix in variant.facts["matrices"].values()})
        for variant in results.pruned:
            errors: dict[int, list[float]] = {}
            for matrix in variant.facts["matrices"].values():
                errors.setdefault(int(matrix["block"]), []).append(float(matrix["layer_error"]))
            blocks = sorted(errors)
            means = [max(sum(errors[block]) / len(errors[block]), 1e-9) for block in blocks]
            dashed = "-" if results.pruned.index(variant) < len(HUES) else "--"  # where hues come round again
            style: dict[str, Any] = {"linewidth": 1.4, "linestyle": dashed, "marker": "o", "markersize": 3.5, "label": variant.name}
            axes.plot(blocks, means, color=_hue(results, variant), **style)
        _log_percent(axes)
        axes.set_xlabel("block")
        axes.set_ylabel("layer error")
        _blocks_axis(axes, places)
        axes.grid(axis="y", which="both")
        _legend(canvas, axes, 4)
        svg = _svg(canvas)
    caption = "‖(W − Ŵ)X‖² / ‖WX‖² on the pruned stream, after compensation where the variant has it; the mean over a block's matrices."
    return Figure("layer-error", svg, "Relative layer error by depth, one line per variant.", caption)


def _log_percent(axes: Axes) -> None:
    """A logarithmic axis in percent that has labels however little it spans."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    steps = (1,) if decades > 3 else (1, 3) if decades > 1.3 else (1, 1.5, 2, 3, 4, 5, 7)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.minorticks_off()
    axes.set_ylim(low, high)


def reconstruction(name: str, step: str, found: Mapping[int, Mapping[str, float]]) -> Figure:
    """Error of each block's output before and after a fit, on fitting and held-out rows."""
    blocks = list(found)
    with _canvas(2.5) as canvas:
        axes = canvas.subplots()
        for side, label, hue, shift in (("fit", "fitting rows", GREY, -0.14), ("held_out", "held-out rows", HUES[0], 0.14)):
            x = [block + shift for block in blocks]
            before, after = ([100 * facts[f"{side}_{when}"] for facts in found.values()] for when in ("before", "after"))
            axes.vlines(x, after, before, color=hue, linewidth=1.4, alpha=0.6)
            style: dict[str, Any] = {"color": hue, "linestyle": "none", "marker": "o", "markersize": 4}
            axes.plot(x, before, markerfacecolor="none", label=f"{label}, before", **style)
            axes.plot(x, after, label="after", **style)
        axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
        axes.set_xlabel("block")
        axes.set_ylabel("error of the block, %")
        axes.grid(axis="y")
        _blocks_axis(axes, blocks)
        _legend(canvas, axes, 2)
        svg = _svg(canvas)
    caption = (
        f"{name}: error of each block's output before (hollow) and after (filled) step {step}, on the first of the rows it saw and on "
        "the held-out rows, which decide."
    )
    return Figure(f"reconstruction-{name}-{step}", svg, f"Block error of {name} before and after step {step}.", caption)
