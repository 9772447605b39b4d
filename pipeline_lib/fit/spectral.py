"""The regulariser of the Spectral Norm Loss (2602.21652, Eq. 8), relative so that it neither
underflows nor overflows.
"""

from collections.abc import Sequence

import torch

from pipeline_lib.fit.settings import SpectralParams


class Norm:
    """‖·‖_p of one matrix while it changes: p = 2 by power iteration with a warm start."""

    def __init__(self, weight: torch.Tensor, params: SpectralParams) -> None:
        self.params = params
        self.right = torch.nn.functional.normalize(weight.detach().square().sum(0).sqrt(), dim=0)
        for _ in range(10):
            self(weight.detach())
        initial = self(weight.detach())
        # an all-zero matrix stays at ratio 0
        self.initial = torch.where(initial > 0, initial, torch.ones_like(initial))

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """‖weight‖_p, differentiable in ``weight`` [R, C]. The singular vectors count as constants,
        which gives the exact gradient at convergence.
        """
        if self.params.order == "frobenius":
            return weight.norm()
        if self.params.order == "nuclear":
            return torch.linalg.matrix_norm(weight, "nuc")
        with torch.no_grad():
            for _ in range(self.params.iterations):
                left = torch.nn.functional.normalize(weight @ self.right, dim=0)
                self.right = torch.nn.functional.normalize(weight.T @ left, dim=0)
        return left @ weight @ self.right

    def relative(self, weight: torch.Tensor) -> torch.Tensor:
        return self(weight) / self.initial

    def rescaled(self, weight: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """``relative`` of diag(e^rows) W diag(e^columns), differentiable in the log scales; for p =
        2 without forming the product.
        """
        if self.params.order != "spectral":
            return self.relative(weight * (rows[:, None] + columns).exp())
        outer, inner = rows.exp(), columns.exp()
        with torch.no_grad():
            for _ in range(self.params.iterations):
                left = torch.nn.functional.normalize(outer * (weight @ (inner * self.right)), dim=0)
                self.right = torch.nn.functional.normalize(inner * (weight.T @ (outer * left)), dim=0)
        return (outer * left) @ (weight @ (inner * self.right)) / self.initial


def regulariser(
    norms: Sequence[Norm], weights: Sequence[torch.Tensor], params: SpectralParams
) -> torch.Tensor:
    """R_p of the current weights, one scalar in (0, 1] for α ≥ 0."""
    return penalty([norm.relative(weight) for norm, weight in zip(norms, weights, strict=True)], params)


def penalty(ratios: Sequence[torch.Tensor], params: SpectralParams) -> torch.Tensor:
    """R_p from every matrix's ‖W̃‖_p / ‖W‖_p."""
    return torch.exp(-params.alpha * torch.stack(list(ratios)).mean())
