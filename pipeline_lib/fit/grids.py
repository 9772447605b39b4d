"""The file with a block's grids, which lies beside a checkpoint of quantised weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline_lib.core import artifacts
from pipeline_lib.models.architecture import Layout, Matrix
from pipeline_lib.solve.grid import Grid, Scheme

FOLDER = "quantization"  # beside the checkpoint; a file per block


def write(path: Path, grids: Mapping[Matrix, Grid]) -> None:
    """Write scales and zero points by label, and the quantisation's settings."""
    tensors = {
        name: tensor for matrix, grid in grids.items() for name, tensor in grid.tensors(matrix.label).items()
    }
    facts: dict[str, Any] = {"shapes": {matrix.label: list(grid.shape) for matrix, grid in grids.items()}}
    for grid in grids.values():
        how = grid.scheme
        facts |= {"bits": how.bits, "group": how.group or "row", "symmetric": how.symmetric}
    artifacts.write_tensors(path, tensors, facts)


def read(path: Path, block: Mapping[str, torch.Tensor], layout: Layout, scheme: Scheme) -> dict[Matrix, Grid]:
    """The grids of a block's quantised matrices, on the device of its parameters."""
    tensors, found = artifacts.read_tensors(path)[0], {}
    for matrix in layout.matrices:
        if (scale := tensors.get(f"{matrix.label}.scale")) is not None:
            weight = matrix.view(block[matrix.parameter])
            grid = found[matrix] = Grid(weight.shape, scheme, weight.device)
            grid.scale = scale.to(weight.device)
            zero = tensors.get(f"{matrix.label}.zero_point")
            grid.zero = grid.zero if zero is None else zero.to(grid.scale)
    return found
