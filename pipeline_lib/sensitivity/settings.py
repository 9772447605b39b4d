"""Parameters of the sensitivity stage."""

from typing import Literal

from pydantic import Field

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
