"""Sensitivities to kept counts: which rank each matrix takes in the allocation."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline_lib.allocation.budget import Unit, allocate, ranks
from pipeline_lib.errors import SparselineError
from pipeline_lib.params import Params


class AllocationParams(Params):
    """Section ``prune.allocation``, with ``variants.<name>.allocation`` laid over it."""

    method: Literal["uniform", "weight", "layer"]
    alpha: float = Field(ge=0)
    layer_sensitivity: Literal["sum", "mean"]
    density_bounds: tuple[float, float]

    @model_validator(mode="after")
    def _ordered(self) -> "AllocationParams":
        low, high = self.density_bounds
        if not 0 <= low <= high <= 1:
            raise ValueError(f"density_bounds must be two numbers with 0 <= low <= high <= 1, not [{low:g}, {high:g}]")
        return self


def plan(units: Sequence[Unit], sparsity: float, params: AllocationParams, sensitivities: Mapping[str, float]) -> list[int]:
    """Kept weights per matrix (Algorithm 1 of 2310.09499): ``weight`` ranks matrices, ``layer`` ranks blocks.

    Args:
        sensitivities: mean Hessian diagonal Tr(H)/n per matrix name; a layer takes its matrices' sum or mean.

    Raises:
        SparselineError: sensitivities are missing, or no allocation meets the budget.
    """
    if params.method == "uniform":
        return allocate(units, sparsity, np.zeros(len(units)), 0.0, params.density_bounds)
    missing = [unit.name for unit in units if unit.name not in sensitivities]
    if missing:
        raise SparselineError(
            f"allocation.method = {params.method!r} needs sensitivities, but there is none for {missing[0]}; "
            "set the variant's `sensitivity: sensitivity/sensitivity.json`."
        )
    if params.method == "weight":
        return allocate(units, sparsity, ranks([sensitivities[unit.name] for unit in units]), params.alpha, params.density_bounds)
    blocks = sorted({unit.block for unit in units})
    combine = sum if params.layer_sensitivity == "sum" else np.mean
    by_block = [float(combine([sensitivities[unit.name] for unit in units if unit.block == block])) for block in blocks]
    place = dict(zip(blocks, ranks(by_block), strict=True))
    return allocate(units, sparsity, np.array([place[unit.block] for unit in units]), params.alpha, params.density_bounds)
