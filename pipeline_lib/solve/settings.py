"""Parameters of solvers on one matrix."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline_lib.core.params import Params

Refit = Literal["scales", "biases", "norms"]


class QuantizationParams(Params):
    """Section ``prune.quantization``, with ``variants.<name>.quantization`` laid over it."""

    bits: int | None = Field(ge=2, le=8)
    group: Annotated[int, Field(ge=1)] | Literal["row"]
    symmetric: bool
    refit: list[Refit]


class LsqParams(Params):
    """Section ``prune.reconstruction.lsq``."""

    iterations: int = Field(ge=1)
    tolerance: float = Field(gt=0, lt=1)
    mask_iterations: int = Field(ge=0)
    mask_penalty: float = Field(gt=0)
    mask_dtype: Literal["bfloat16", "float32"]
