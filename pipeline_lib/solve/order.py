"""ROSE's order (2603.05878) of a site's columns for the OBS sweep, and its inverse."""

import torch

from pipeline_lib.masks.rule import Rule
from pipeline_lib.masks.scores import Curvature, saliency


def column_losses(weight: torch.Tensor, curvature: Curvature, kept: int, rule: Rule) -> torch.Tensor:
    """The expected loss of each column [C]: w²/[H⁻¹]_mm, summed over the weights that would be pruned
    if the mask were chosen now.

    ROSE (2603.05878) uses |w|·‖X_m‖ both to choose weights, in every column block, and as their loss.
    Here, the variant's own score chooses within its own group, and the loss is OBS's cost of removing
    a weight. Always-zero inputs cost nothing.

    Args:
        weight: [R, C].
        curvature: curvature of the whole matrix.
        kept: number of kept weights.
    """
    weight = weight.masked_fill(curvature.second_moment == 0, 0)
    mask = rule.mask(rule.scores(weight, curvature), kept)
    return saliency("obs", weight, curvature).masked_fill_(mask, 0).sum(0)


def rose_order(column_loss: torch.Tensor, block: int, m: int, least_range: float) -> torch.Tensor | None:
    """ROSE's order of a site's columns [C], or None for left to right. The most costly columns come
    first, while many columns can still compensate.

    The order has two levels (2603.05878): column blocks by descending loss, and the columns in each
    block by descending loss. Ties are ordered from left to right. With N:M, the groups of M are ordered
    within each block and move as one. The result is None if the relative range (max − min)/max of the
    block losses is below ``least_range`` (0.5 in the authors' code; 0 always orders). A block's loss is
    its mean over columns, which ranks like the paper's sum and allows a short last block.

    Args:
        column_loss: [C], of one matrix or summed over those of the site.
        block: width of the column blocks; rounded up to whole groups of M.
        m: M of the pattern, 0 for unstructured.
    """
    unit = m or 1
    block = -(-block // unit) * unit
    columns = torch.arange(len(column_loss), device=column_loss.device)
    blocks = column_loss.split(block)
    losses = torch.stack([part.mean() for part in blocks])
    if losses.max() - losses.min() < least_range * losses.max():
        return None
    inside = [
        part.view(-1, unit)[loss.view(-1, unit).sum(1).argsort(descending=True, stable=True)].flatten()
        for part, loss in zip(columns.split(block), blocks, strict=True)
    ]
    return torch.cat([inside[i] for i in losses.argsort(descending=True, stable=True).tolist()])


def runs(order: torch.Tensor, width: int) -> list[int]:
    """Numbers of the groups of ``width`` consecutive columns, in the sequence in which ``order`` takes
    the groups.

    Raises:
        ValueError: ``order`` does not keep the columns of each group together.
    """
    runs: list[int] = (order // width).unique_consecutive().tolist()
    if len(runs) != -(-len(order) // width):
        raise ValueError(f"the order of the columns tears apart {width} that belong together")
    return runs


def restored(permuted: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """A matrix whose columns are in ``order``, with its columns back in their own order."""
    restored = torch.empty_like(permuted)
    restored[:, order] = permuted
    return restored
