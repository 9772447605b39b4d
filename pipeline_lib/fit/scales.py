"""The scales of a block's quantised matrices as separate tensors, so that a fit can train them; the
integer codes stay.
"""

from collections.abc import Mapping

import torch

from pipeline_lib.models.architecture import Matrix, laid
from pipeline_lib.solve.grid import Grid


class Scales:
    """The scales of one block, named ``<label>.scale`` [R, G]."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], grids: Mapping[Matrix, Grid]) -> None:
        """
        Args:
            tensors: the block's parameters, quantised.
            grids: those of the matrices whose scales are trained.
        """
        self.grids = grids
        self.steps = {
            matrix: grid.steps(matrix.view(tensors[matrix.parameter])) for matrix, grid in grids.items()
        }

    def free(self) -> dict[str, torch.Tensor]:
        """The scales, by name."""
        return {f"{matrix.label}.scale": grid.scale for matrix, grid in self.grids.items()}

    def joined(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The block's parameters from the codes and these scales; differentiable in the scales."""
        found = dict(tensors)
        weights = [
            grid.spread(found.pop(f"{matrix.label}.scale")) * self.steps[matrix]
            for matrix, grid in self.grids.items()
        ]
        return found | laid(list(self.grids), weights, found)

    @torch.no_grad()
    def settle(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Round the scales to values that the checkpoint's dtype can store, put them into the
        grids, and return ``joined`` with them.
        """
        exact = {
            f"{matrix.label}.scale": grid.scheme.exact(tensors[f"{matrix.label}.scale"])
            for matrix, grid in self.grids.items()
        }
        for matrix, grid in self.grids.items():
            grid.scale = exact[f"{matrix.label}.scale"]
        return self.joined({**tensors, **exact})
