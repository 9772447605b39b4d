"""Parameters of fits by gradients through a block."""

from typing import Literal

from pydantic import Field

from pipeline_lib.core.params import Params

Order = Literal["spectral", "frobenius", "nuclear"]


class SpectralParams(Params):
    """Subsection ``spectral``: R_p = exp(−α · mean over matrices of ‖W̃‖_p / ‖W‖_p), weighted by λ."""

    weight: float = Field(ge=0)
    alpha: float
    order: Order
    iterations: int = Field(ge=1)


class FitParams(Params):
    """Sections ``prune.reconstruction.channel`` and ``.block``, but for the latter's own keys."""

    epochs: int = Field(ge=1)
    parts: list[Literal["weights", "factors", "biases", "norms"]] = Field(min_length=1)
    rate: float = Field(gt=0)
    bias_rate: float = Field(gt=0)
    batch_rows: int = Field(ge=1)
    patience: int = Field(ge=1)
    limit: float = Field(gt=0)
    compute_dtype: Literal["float32", "bfloat16"]
    spectral: SpectralParams
    seed: int


class BlockParams(FitParams):
    """Section ``prune.reconstruction.block``."""

    window: int = Field(ge=1)
    refresh_epochs: int = Field(ge=0)
