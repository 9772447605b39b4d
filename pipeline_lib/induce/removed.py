"""The error of pruning as a function of score shifts: the mask-in-the-loop loss with its
straight-through gradient in closed form.

log scores are B + r 1ᵀ + 1 cᵀ, so the gradient needs row and column sums only. Nothing of the
matrix's size is stored for the backward pass, and rows are processed in parts that fit into the
cache. Shape letters: ``R`` outputs, ``C`` inputs, ``k`` probes.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch


class Scored(Protocol):
    """The data of a layer for ``Removed``."""

    weight: torch.Tensor  # W [R, C]
    gram: torch.Tensor  # G [C, C]
    energy: torch.Tensor  # tr(W G Wᵀ)

    def parts(self, step: int) -> Iterator[slice]: ...
    def scores(self, part: slice, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor: ...
    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


# the error, and its gradients with respect to the shifts
Sloped = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Removed(torch.autograd.Function):
    """tr(ΔW G ΔWᵀ) / tr(W G Wᵀ) (2602.21652, Eq. 4) with ΔW = W − W⊙M, differentiable in the shifts
    r [R] and c [C] of the log scores. ``sloped`` computes it, here or in another process.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, columns: torch.Tensor, found: Sloped) -> torch.Tensor:
        ctx.save_for_backward(found[1], found[2])
        return found[0].clone()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, columns = ctx.saved_tensors
        return outputs[0] * rows, outputs[0] * columns, None


@torch.no_grad()
def sloped(
    layer: Scored,
    rows: torch.Tensor,
    columns: torch.Tensor,
    temperature: float,
    signs: torch.Tensor | None,
) -> Sloped:
    """Compute the value of ``Removed``, and its gradients.

    The mask's gradient is that of a sigmoid around the threshold of each comparison group. With
    signs z ∈ {±1}, [k, R], Hutchinson's estimate replaces the off-diagonal part of G: the mean of
    (zᵀΔW)(G − diag G)(zᵀΔW)ᵀ. It is unbiased and needs 4RCk + 2C²k instead of 2RC² operations.
    """
    weight, gram, diagonal = layer.weight, layer.gram, layer.gram.diagonal()
    grad_rows, grad_columns, loss = torch.zeros_like(rows), torch.zeros_like(columns), rows.new_zeros(())

    def slope(part: slice, scores: torch.Tensor, threshold: torch.Tensor, left: torch.Tensor) -> None:
        """Add −2 W ∘ (ΔW G) ∘ σ'((scores − threshold) / T) / T, summed over columns and rows;
        overwrites its arguments.
        """
        soft = scores.sub_(threshold).div_(temperature).sigmoid_()
        moved = torch.ops.aten.sigmoid_backward(left.mul_(weight[part]), soft)
        grad_rows[part] += moved.sum(1)
        grad_columns.add_(moved.sum(0))

    if signs is None:
        for part in layer.parts(512):  # enough rows for the product with G
            scores = layer.scores(part, rows, columns)
            mask, threshold = layer.choose(scores)
            gone = weight[part] * ~mask
            left = gone @ gram
            loss = loss + torch.dot(left.flatten(), gone.flatten())
            slope(part, scores, threshold, left)
    else:
        signs = signs / len(signs) ** 0.5
        probed, squares = rows.new_zeros(len(signs), len(columns)), torch.zeros_like(columns)
        kept = []
        for part in layer.parts(64):  # few enough for the cache
            mask, threshold = layer.choose(layer.scores(part, rows, columns))
            gone = weight[part] * ~mask
            probed.addmm_(signs[:, part], gone)
            squares.add_(gone.square_().sum(0))
            kept.append((part, mask, threshold))
        through = probed @ gram - probed * diagonal
        loss = squares @ diagonal + (through * probed).sum()
        for part, mask, threshold in kept:
            left = (weight[part] * ~mask).mul_(diagonal).addmm_(signs[:, part].T, through)
            slope(part, layer.scores(part, rows, columns), threshold, left)
    scale = -2 / (temperature * layer.energy)
    return loss / layer.energy, grad_rows * scale, grad_columns * scale
