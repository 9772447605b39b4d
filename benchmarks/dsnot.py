"""A reference like DSnoT (2310.08915): Wanda's mask, then weights swapped so that each output's mean error goes towards zero; no weight changes.

Per output row, ε = E[(W − W⊙M) x] = Σ_pruned w_i μ_i. A swap grows the pruned weight that takes most off ε for its inputs' variance,
sign(ε)·w_i μ_i / Var x_i, and prunes the kept one with the least |w|·‖x‖ among those whose loss pushes ε the other way. Written from the
paper's formulas, for comparison only.
"""

from collections.abc import Iterator, Mapping

import torch

from benchmarks.testbed import Testbed
from pipeline_lib.masks.select import select
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.prune.prune import collect
from pipeline_lib.stats.moments import Moments

CYCLES = 50  # swaps per row at most, the authors' default


def refine(weight: torch.Tensor, mask: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Wanda's mask [R, C] with swaps within rows; a row stops when no swap lowers |ε|."""
    diagonal, mask = moments.gram.diagonal(), mask.clone()
    variance = (diagonal - moments.mean.square()).clamp_min(1e-12)
    share, wanda = weight * moments.mean, weight.abs() * diagonal.sqrt()
    error = share.masked_fill(mask, 0).sum(1)
    rows, going = torch.arange(len(weight)), torch.ones(len(weight), dtype=torch.bool)
    for _ in range(CYCLES):
        towards = error.sign()[:, None] * share
        grown = (towards / variance).masked_fill(mask, -torch.inf).argmax(1)
        pruned = wanda.masked_fill(~mask | (towards >= 0), torch.inf).argmin(1)
        after = error - share[rows, grown] + share[rows, pruned]
        going &= (after.abs() < error.abs()) & ~mask[rows, grown] & mask[rows, pruned]
        if not going.any():
            break
        mask[rows[going], grown[going]] = True
        mask[rows[going], pruned[going]] = False
        error = torch.where(going, after, error)
    return mask


def prune(bed: Testbed, rows: torch.Tensor, kept: Mapping[tuple[int, Matrix], int]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Every block's tensors, block by block on the pruned stream."""
    model, entry = bed.stream(), bed.checkpoint.architecture
    stream = model.embed(rows, 4)
    for index in range(entry.depth):
        tensors = {name: tensor.float() for name, tensor in bed.checkpoint.block(index).items()}
        moments = collect(model, model.block(index), index, stream.hidden)
        for matrix in entry.matrices:
            weight, found = matrix.view(tensors[matrix.parameter]), moments[matrix.site]
            mask = select(weight.abs() * found.gram.diagonal().sqrt(), kept[index, matrix], "row", 0)
            weight.masked_fill_(~refine(weight, mask, found), 0)
        model.advance(model.block(index, tensors), index, stream)
        yield index, tensors
