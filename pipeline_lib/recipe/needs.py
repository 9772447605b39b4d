"""What a variant needs of the model and of the calibration text. It drives the graph, the stages,
the report and the model card.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline_lib.allocate.settings import CURVES, SENSITIVITIES
from pipeline_lib.recipe.settings import Recipe

Moments = Literal["none", "diagonal", "full"]


@dataclass(frozen=True)
class Needs:
    """Of one recipe; nothing that is not named here is computed for it."""

    moments: Moments  # second moments of the sites' inputs, for scores and compensation
    cross: bool  # cross moments with the dense model's activations
    dense_stream: bool  # the dense model's activations
    held_out: bool  # rows that judge fits
    sensitivities: bool
    output_moments: bool  # second moments of output gradients
    curves: bool
    factors: bool  # learned by induction

    @property
    def text(self) -> bool:
        """Whether pruning reads calibration rows."""
        return self.moments != "none" or self.dense_stream


def needs(recipe: Recipe) -> Needs:
    """Of scores, only OBS and ISC read the inverse of H; magnitude reads no statistics at all,
    Wanda and OBD read diagonals.
    """
    how, score = recipe.reconstruction, recipe.selection.score
    fitted = bool(how.fits)
    rounded = recipe.quantization.bits is not None
    # With a learned transform inputs are shifted, which takes more than a diagonal.
    full = (
        score in ("obs", "isc")
        or bool({"obs", "lsq"} & set(how.steps))
        or rounded
        or recipe.induce is not None
    )
    return Needs(
        moments="full" if full else "none" if score == "magnitude" else "diagonal",
        cross=how.towards_dense > 0,
        dense_stream=fitted or how.towards_dense > 0,
        held_out=fitted or recipe.induce is not None,
        sensitivities=recipe.allocation.method in SENSITIVITIES,
        output_moments=recipe.allocation.method == "predicted" and recipe.allocation.weighting == "kronecker",
        curves=recipe.allocation.method in CURVES,
        factors=recipe.induce is not None,
    )
