"""The choice between several pruned models, by perplexity on one text."""

from collections.abc import Mapping


def choose(perplexities: Mapping[str, float]) -> str | None:
    """The candidate with the lowest perplexity; the earlier one wins ties. None if there are no
    candidates.
    """
    return min(perplexities, key=lambda name: perplexities[name], default=None)
