"""Parameters of the allocation."""

from typing import Literal

from pydantic import Field, model_validator

from pipeline_lib.core.params import Conflict, Params

SENSITIVITIES = frozenset({"weight", "layer", "predicted"})  # methods that read the sensitivities of matrices
CURVES = frozenset({"predicted", "owl", "dlp"})  # methods that read what curves measures


class AllocationParams(Params):
    """Section ``prune.allocation``, overridden by ``variants.<name>.allocation``."""

    method: Literal["uniform", "weight", "layer", "predicted", "owl", "dlp", "depth"]
    alpha: float = Field(ge=0)
    layer_sensitivity: Literal["sum", "mean"]
    weighting: Literal["trace", "kronecker"]
    temper: float = Field(gt=0, le=1)
    density_bounds: tuple[float, float]

    @model_validator(mode="after")
    def _ordered(self) -> "AllocationParams":
        low, high = self.density_bounds
        if not 0 <= low <= high <= 1:
            raise Conflict(
                f"it must be two numbers with 0 <= low <= high <= 1, not [{low:g}, {high:g}]",
                "density_bounds",
            )
        return self
