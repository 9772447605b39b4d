"""Parameters of the quantisation of the weights that are left."""

from typing import Annotated, Literal

import torch
from pydantic import Field

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.params import Params
from pipeline_lib.quantization.grid import Scheme

Refit = Literal["scales", "biases", "norms"]


class QuantizationParams(Params):
    """Section ``prune.quantization``, with ``variants.<name>.quantization`` laid over it."""

    bits: int | None = Field(ge=2, le=8)
    group: Annotated[int, Field(ge=1)] | Literal["row"]
    symmetric: bool
    refit: list[Refit]

    def scheme(self, dtype: torch.dtype) -> Scheme | None:
        """What of it a grid needs, for a checkpoint of this dtype; None where nothing is quantised.

        Raises:
            SparselineError: the dtype cannot tell all codes apart.
        """
        if self.bits is None:
            return None
        if (
            self.bits == 8 and not self.symmetric and dtype == torch.bfloat16
        ):  # 8 significant bits: beyond 128 steps from zero two become one
            raise SparselineError(
                "A bfloat16 checkpoint cannot hold asymmetric codes of 8 bits; set quantization.symmetric to true, or quantization.bits to 7 or less."
            )
        return Scheme(self.bits, None if self.group == "row" else self.group, self.symmetric, dtype)
