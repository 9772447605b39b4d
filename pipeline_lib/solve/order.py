"""The order of ROSE (2603.05878), in which the OBS sweep takes a site's columns; and the way back from it."""

import torch

from pipeline_lib.masks.rule import Rule
from pipeline_lib.masks.scores import Curvature, saliency


def column_losses(weight: torch.Tensor, curvature: Curvature, kept: int, rule: Rule) -> torch.Tensor:
    """What each column [C] will probably cost: w²/[H⁻¹]_mm, summed over the weights that would go
    if the mask were chosen now.

    ROSE (2603.05878) chooses and adds up |w|·‖X_m‖ in every column block; here the variant's own
    score chooses within its own group, and the sum is of what OBS says removing a weight costs.
    Always-zero inputs cost nothing.

    Args:
        weight: [R, C].
        curvature: of the whole matrix.
        kept: how many weights stay.
    """
    weight = weight.masked_fill(curvature.second_moment == 0, 0)
    mask = rule.mask(rule.scores(weight, curvature), kept)
    return saliency("obs", weight, curvature).masked_fill_(mask, 0).sum(0)


def rose_order(column_loss: torch.Tensor, block: int, m: int, least_range: float) -> torch.Tensor | None:
    """ROSE's order of a site's columns [C]: those that will cost most first, while many columns are
    left to make up for them.

    Two levels (2603.05878): column blocks by descending loss, and in each of them its columns by
    descending loss; ties from left to right. For N:M it is the groups of M that are ordered in each
    block, and each moves as one. None, for left to right, where the site is not columnar: the
    relative range (max − min)/max of the block losses is below ``least_range`` (0.5 in the authors'
    code; 0 always orders). A block's loss is its mean over columns, which ranks as the paper's sum
    and lets a short last block be compared.

    Args:
        column_loss: [C], of one matrix or summed over those that share the site.
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
    """Which ``width`` consecutive columns come one after the other in an order that keeps them together."""
    runs: list[int] = (order // width).unique_consecutive().tolist()
    if len(runs) != -(-len(order) // width):
        raise ValueError(f"the order of the columns tears apart {width} that belong together")
    return runs


def restored(permuted: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Columns in ``order``, back in their own."""
    restored = torch.empty_like(permuted)
    restored[:, order] = permuted
    return restored
