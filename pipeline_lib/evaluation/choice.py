"""The model-level gate: of several pruned models, the one that a text kept for choosing prefers."""

from collections.abc import Mapping


def choose(perplexities: Mapping[str, float]) -> str | None:
    """The candidate of lowest perplexity, ties to the earlier; None if there are no candidates."""
    return min(perplexities, key=lambda name: perplexities[name], default=None)
