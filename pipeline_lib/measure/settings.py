"""Parameters of the sensitivity and curves stages."""

from typing import Literal

from pydantic import Field, field_validator

from pipeline_lib.core.params import Params


class SensitivityParams(Params):
    """Section ``sensitivity``."""

    estimator: Literal["fisher", "hutchinson"]
    probes: int = Field(ge=2)
    agreement: float = Field(ge=0, le=1)
    rows_per_probe: int = Field(ge=1)
    probes_per_pass: int = Field(ge=1)
    distribution: Literal["rademacher", "gaussian"]
    seed: int
    output_moments: Literal["none", "diagonal", "full"]
    moment_budget_bytes: int = Field(ge=0)


class CurvesParams(Params):
    """Section ``curves``, overridden by ``variants.<name>.curves``."""

    densities: list[float] = Field(min_length=1)
    outlier_factor: float = Field(gt=0)

    @field_validator("densities")
    @classmethod
    def _increasing(cls, densities: list[float]) -> list[float]:
        if not all(low < high for low, high in zip([0.0, *densities], [*densities, 1.0], strict=True)):
            raise ValueError("densities must increase and lie between 0 and 1; both ends are measured anyway")
        return densities
