"""Parameters of block-wise fine-tuning."""

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline_lib.core.params import Conflict, Params

Order = Literal["spectral", "frobenius", "nuclear"]


class SpectralParams(Params):
    """Subsection ``spectral``: R_p = exp(−α · mean over matrices of ‖W̃‖_p / ‖W‖_p), weighted by λ."""

    weight: float = Field(ge=0)
    alpha: float
    order: Order
    iterations: int = Field(ge=1)


class FitParams(Params):
    """Sections ``prune.reconstruction.finetune_channels`` and ``.finetune``, which has more keys."""

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


class FinetuneParams(FitParams):
    """Section ``prune.reconstruction.finetune``."""

    window: int = Field(ge=1)
    refresh_epochs: int = Field(ge=0)


class DistilParams(Params):
    """Section ``distil``, overridden by ``variants.<name>.distil``: training of the whole pruned
    model.
    """

    epochs: int = Field(ge=1)
    parts: list[Literal["weights", "biases", "norms"]] = Field(min_length=1)
    rate: float = Field(gt=0)
    warmup: float = Field(ge=0, lt=1)
    beta1: float = Field(ge=0, lt=1)
    beta2: float = Field(ge=0, lt=1)
    batch_rows: int = Field(ge=1)
    compute_dtype: Literal["float32", "bfloat16"]
    state_dtype: Literal["float32", "bfloat16"]
    seed: int

    @model_validator(mode="after")
    def _states_move(self) -> Any:
        if self.state_dtype == "bfloat16" and self.beta2 > 0.99:
            raise Conflict(
                "bfloat16 rounds away the change of such an average in one step; give beta2 0.99 or less",
                "beta2",
                "state_dtype",
            )
        return self
