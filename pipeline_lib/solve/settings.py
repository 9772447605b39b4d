"""Parameters of solvers for one matrix."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline_lib.core.params import Conflict, Params

BLOCK = 32  # consecutive inputs that share a scale in GGUF's Q4_0, Q4_1 and Q8_0

Refit = Literal["scales", "biases", "norms"]
Stored = Literal["checkpoint", "gguf"]


class QuantizationParams(Params):
    """Section ``prune.quantization``, overridden by ``variants.<name>.quantization``."""

    bits: int | None = Field(ge=2, le=8)
    group: Annotated[int, Field(ge=1)] | Literal["row"]
    symmetric: bool
    scales: Stored
    refit: list[Refit]

    @model_validator(mode="after")
    def _fits_blocks(self) -> Any:
        if self.bits is None or self.scales == "checkpoint":
            return self
        if self.group == "row" or self.group % BLOCK:
            raise Conflict(
                f"GGUF has scales for {BLOCK} inputs each; make the group a multiple of {BLOCK}",
                "scales",
                "group",
            )
        if self.bits == 8 and not self.symmetric:
            raise Conflict(
                "GGUF has no zero points for codes of 8 bits; set symmetric to true", "scales", "symmetric"
            )
        return self


class LsqParams(Params):
    """Section ``prune.reconstruction.lsq``."""

    iterations: int = Field(ge=1)
    tolerance: float = Field(gt=0, lt=1)
    mask_iterations: int = Field(ge=0)
    mask_penalty: float = Field(gt=0)
    mask_dtype: Literal["bfloat16", "float32"]
