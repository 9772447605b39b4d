"""The measurements that a variant needs. They determine the graph, the stages, the report and the
model card.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline_lib.allocate.settings import CURVES, SENSITIVITIES
from pipeline_lib.recipe.settings import Recipe

Moments = Literal["none", "diagonal", "full"]


@dataclass(frozen=True)
class Needs:
    """Needs of one recipe; nothing else is computed for it."""

    moments: Moments  # second moments of the sites' inputs, for scores and compensation
    cross: bool  # cross moments with the dense model's activations
    dense_stream: bool  # the dense model's activations
    held_out: bool  # the held-out split, which judges fits
    sensitivities: bool
    output_moments: bool  # second moments of output gradients
    curves: bool
    factors: bool  # learned by induction

    @property
    def text(self) -> bool:
        """Whether pruning reads calibration samples."""
        return self.moments != "none" or self.dense_stream


def needs(recipe: Recipe) -> Needs:
    """The needs of a recipe. OBS and ISC need the inverse of H, Wanda and OBD diagonals, and magnitude
    no statistics.
    """
    how, score = recipe.reconstruction, recipe.selection.score
    fitted = bool(how.fits)
    rounded = recipe.quantization.bits is not None
    # A learned transform shifts inputs, which needs more than a diagonal.
    full = (
        score in ("obs", "isc")
        or bool({"obs", "lsq"} & set(how.steps))
        or rounded
        or recipe.induce is not None
    )
    return Needs(
        moments="full" if full else "none" if score == "magnitude" else "diagonal",
        cross=how.dense_target > 0,
        dense_stream=fitted or how.dense_target > 0,
        held_out=fitted or recipe.induce is not None,
        sensitivities=recipe.allocation.method in SENSITIVITIES,
        output_moments=recipe.allocation.method == "predicted" and recipe.allocation.weighting == "kronecker",
        curves=recipe.allocation.method in CURVES,
        factors=recipe.induce is not None,
    )
