"""The model-level gate: of several pruned models, the one that a text kept for choosing prefers."""

from collections.abc import Mapping

from pipeline_lib.core.errors import SparselineError


def choose(text: str, perplexities: Mapping[str, Mapping[str, float]]) -> str | None:
    """The candidate of lowest perplexity on this text, ties to the earlier; None if there are no candidates.

    Args:
        perplexities: of every candidate, by text.

    Raises:
        SparselineError: the text is not among those evaluated.
    """
    for name in perplexities:
        if text not in perplexities[name]:
            raise SparselineError(
                f"params.yaml: choose.text = {text!r} is no text with use: evaluate; these are: {', '.join(perplexities[name])}."
            )
    return min(perplexities, key=lambda name: perplexities[name][text], default=None)
