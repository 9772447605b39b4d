"""One dense pass over the calibration rows, block by block, that yields every site's statistics."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pipeline_lib.core.artifacts import block_file, read_tensors
from pipeline_lib.models.architecture import Architecture, Layout, Site
from pipeline_lib.models.stream import BlockModel, tapped
from pipeline_lib.stats.lanes import LANES, Sums, deal, fold, parts
from pipeline_lib.stats.moments import Accumulator, SiteStatistics, drawn_together
from pipeline_lib.stats.settings import CalibrateParams


def gram_bytes(architecture: Architecture) -> int:
    """Bytes of all float32 Gram matrices of the model, fitting and held-out."""
    return 2 * sum(4 * len(site.index) ** 2 for layout in architecture.layouts for site in layout.sites)


def walk(
    model: BlockModel, fit: torch.Tensor, held_out: torch.Tensor, params: CalibrateParams, grams: bool
) -> Iterator[tuple[int, dict[str, SiteStatistics]]]:
    """Pass token rows [N, T] through the dense model; yield (block, statistics per site) as each block is done."""
    streams = [_Rows(model, rows, params, grams) for rows in (fit, held_out) if len(rows)]
    for index in range(model.checkpoint.architecture.depth):
        block = model.block(index)
        sites = {site.name: site for site in model.checkpoint.architecture.layouts[index].sites}
        pools = {name: site.pool for name, site in sites.items()}
        taken = [drawn_together(fold(map(partial(stream.collect, block, index), range(LANES))), pools) for stream in streams]
        held = taken[1] if len(taken) > 1 else {}
        shares = {name: None if pool is None else taken[0][name].seen / fit.numel() for name, pool in pools.items()}
        yield index, {name: found.finish(held.get(name), shares[name]).cpu() for name, found in taken[0].items()}


class _Rows:
    """The dense stream of some rows [N, T]."""

    def __init__(self, model: BlockModel, rows: torch.Tensor, params: CalibrateParams, grams: bool) -> None:
        self.model, self.rows, self.params, self.grams = model, rows, params, grams
        self.dealt = deal(len(rows), params.batch_rows)
        self.stream = model.embed(rows, self.dealt.sizes)

    def collect(self, block: nn.Module, index: int, lane: int) -> Sums[Accumulator]:
        """Pass a lane through a block; what its sites' inputs add to the statistics."""
        count, length = self.rows.shape
        first = parts(count)[lane].start * length
        sites = self.model.checkpoint.architecture.layouts[index].sites
        starts = {site.name: first if site.pool is None else 0 for site in sites}  # which tokens come to an expert is not known before
        found = Sums({name: Accumulator(count * length, self.params.median_tokens, self.grams, own) for name, own in starts.items()})

        def take(site: Site, x: torch.Tensor, weights: torch.Tensor | None) -> None:
            found[site.name].add(x if site.pool is not None else x.reshape(-1, length, x.shape[-1]), weights)

        with tapped(block, sites, take):
            self.model.advance(block, index, self.stream, self.dealt.lanes[lane])
        return found


def stored(directory: Path, layout: Layout, block: int) -> dict[str, SiteStatistics]:
    """One block's statistics as calibrate wrote them, Gram matrices only if they were within budget."""
    tensors, _ = read_tensors(block_file(directory, block))
    return {site.name: SiteStatistics.from_tensors(site.name, tensors) for site in layout.sites}


def stored_or_walked(
    directory: Path, model: BlockModel, fit: torch.Tensor, held_out: torch.Tensor, params: CalibrateParams
) -> Iterator[tuple[int, dict[str, SiteStatistics]]]:
    """Statistics with Gram matrices: from calibrate's files, or, where those were over budget, by walking the model again."""
    _, facts = read_tensors(block_file(directory, 0))
    if not facts["grams"]:
        yield from walk(model, fit, held_out, params, grams=True)
        return
    for index in range(model.checkpoint.architecture.depth):
        yield index, stored(directory, model.checkpoint.architecture.layouts[index], index)
