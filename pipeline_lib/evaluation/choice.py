"""The model-level gate: of several pruned models, the one that a text kept for choosing prefers."""

from collections.abc import Mapping, Sequence

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.params import Params


class ChooseParams(Params):
    """Section ``choose``."""

    text: str
    candidates: list[str]


def check(params: ChooseParams, variants: Sequence[str]) -> None:
    """Raises SparselineError for a candidate that is no variant."""
    for name in params.candidates:
        if name not in variants:
            raise SparselineError(
                f"params.yaml: choose.candidates names {name!r}, which is no variant; variants: {', '.join(variants) or 'none'}."
            )


def choose(params: ChooseParams, perplexities: Mapping[str, Mapping[str, float]]) -> str | None:
    """The candidate of lowest perplexity on ``params.text``, ties to the earlier; None if there are no candidates.

    Args:
        perplexities: of every candidate, by text.

    Raises:
        SparselineError: the text is not among those evaluated.
    """
    for name in params.candidates:
        if params.text not in perplexities[name]:
            raise SparselineError(
                f"params.yaml: choose.text = {params.text!r} is no text with use: evaluate; these are: {', '.join(perplexities[name])}."
            )
    return min(params.candidates, key=lambda name: perplexities[name][params.text], default=None)
