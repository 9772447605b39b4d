"""Descriptions of a recipe for the log, the report and model cards."""

from collections.abc import Mapping
from typing import Any

from pipeline_lib.recipe.settings import Recipe

STEPS = {
    "obs": "OBS sweep",
    "lsq": "least squares",
    "finetune_channels": "fine-tuning of channel factors",
    "finetune": "block-wise fine-tuning",
}


def rows(recipe: Recipe) -> dict[str, str]:
    """The parts of a variant: head -> words."""
    selection, allocation, quantisation = recipe.selection, recipe.allocation, recipe.quantization
    within = f"block of {selection.block} columns" if selection.group == "block" else selection.group
    alpha = f"α = {allocation.alpha:g}"
    hand = "".join(f"; manual {pattern} {sparsity:g}" for pattern, sparsity in selection.by_hand)
    allocated = {"uniform": "uniform", "predicted": f"least predicted loss ({allocation.weighting}), {alpha}"}
    quantised = "none"
    if quantisation.bits is not None:
        groups = "rows" if quantisation.group == "row" else f"groups of {quantisation.group}"
        quantised = f"{quantisation.bits} bits, {groups}{'' if quantisation.symmetric else ', zero points'}"
    return {
        "score": selection.score,
        "compared within": within if selection.pattern == "unstructured" else selection.pattern,
        "allocation": allocated.get(allocation.method, f"by {allocation.method}, {alpha}") + hand,
        "reconstruction": " + ".join(recipe.reconstruction.steps) or "none",
        "quantisation": quantised,
        "factors": "learned" if recipe.induce is not None else "none",
    }


def training(facts: Mapping[str, Any]) -> str:
    """The training of the whole pruned model in words, from ``build/training``."""
    if not facts:
        return "none: one-shot"
    return f"{facts['steps']} steps of distillation{'' if facts['kept'] else ', not kept'}"


def in_words(recipe: Recipe) -> str:
    """One line: sparsity, score, allocation, steps."""
    told = rows(recipe)
    steps = [STEPS.get(step, step) for step in recipe.reconstruction.steps]
    if recipe.quantization.bits is not None:
        steps.append(told["quantisation"])
    learned = ["learned factors and selection weights"] if recipe.induce is not None else []
    parts = [
        f"sparsity {recipe.selection.overall:g}",
        f"score {told['score']} within {told['compared within']}",
        f"allocation {told['allocation']}",
    ]
    return ", ".join([*parts, *learned, " + ".join(steps) or "no reconstruction"])
