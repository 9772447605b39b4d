"""Figures and settings as readers see them, in the report and on the model cards."""

from collections.abc import Mapping
from typing import Any


def sparsity(share: float) -> str:
    return f"{100 * share:.2f}%"


def perplexity(value: float) -> str:
    if value < 1000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def gap(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:.1f}%"


def size(count: int) -> str:
    value, unit = next(
        (count / scale, unit) for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if count >= scale or scale == 1
    )
    return f"{value:.2f} {unit}"


def recipe(settings: Mapping[str, Any]) -> dict[str, str]:
    """What a variant is made of, from the settings that prune recorded."""
    selection, allocation, quantisation = (settings[name] for name in ("selection", "allocation", "quantization"))
    within = f"block of {selection['block']} columns" if selection["group"] == "block" else selection["group"]
    method, alpha = allocation["method"], f"α = {allocation['alpha']:g}"
    allocated = {"uniform": "uniform", "predicted": f"least predicted loss ({allocation.get('weighting')}), {alpha}"}
    quantised = "none"
    if quantisation["bits"] is not None:
        groups = "rows" if quantisation["group"] == "row" else f"groups of {quantisation['group']}"
        quantised = f"{quantisation['bits']} bits, {groups}{'' if quantisation['symmetric'] else ', zero points'}"
    factors = settings["factors"]
    return {
        "score": selection["score"],
        "compared within": within if selection["pattern"] == "unstructured" else selection["pattern"],
        "allocation": allocated.get(method, f"by {method}, {alpha}"),
        "reconstruction": " + ".join(settings["reconstruction"]["steps"]) or "none",
        "quantisation": quantised,
        "factors": "none" if factors.startswith("prepare/") else factors.rpartition("/")[0] or factors,
    }
