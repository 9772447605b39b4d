"""Parameters of the initial factors and shifts."""

from typing import Literal

from pydantic import Field

from pipeline_lib.core.params import Params


class ScaleParams(Params):
    """Section ``scale``."""

    start: Literal["identity", "eq5", "second_moment", "maximum"]
    monotone: Literal["identity", "tanh"]
    power: float
    limit: float = Field(gt=0)
    pairs: Literal["inputs", "balance"]
    shift: Literal["none", "mean", "median"]
