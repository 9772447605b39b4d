"""One dense pass over the calibration rows, block by block, that yields every site's statistics."""

from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline_lib.core.artifacts import block_file, read_tensors
from pipeline_lib.models.architecture import Architecture
from pipeline_lib.models.stream import BlockModel, tapped
from pipeline_lib.stats.moments import Accumulator, SiteStatistics
from pipeline_lib.stats.settings import CalibrateParams


def gram_bytes(architecture: Architecture) -> int:
    """Bytes of all float32 Gram matrices of the model, fitting and held-out."""
    return 2 * architecture.depth * sum(4 * len(site.index) ** 2 for site in architecture.sites)


def walk(
    model: BlockModel, fit: torch.Tensor, held_out: torch.Tensor, params: CalibrateParams, grams: bool
) -> Iterator[tuple[int, dict[str, SiteStatistics]]]:
    """Pass token rows [N, T] through the dense model; yield (block, statistics per site) as each block is done."""
    sites = {site.name: site.module for site in model.checkpoint.architecture.sites}
    streams = [model.embed(rows, params.batch_rows) for rows in (fit, held_out) if len(rows)]
    for index in range(model.checkpoint.architecture.depth):
        block = model.block(index)
        taken: list[dict[str, Accumulator]] = []
        for stream, rows in zip(streams, (fit, held_out), strict=False):
            accumulators = {site: Accumulator(rows.numel(), params.median_tokens, grams) for site in sites}
            with tapped(block, sites, lambda site, x, into=accumulators: into[site].add(x)):  # type: ignore[misc]
                model.advance(block, index, stream)
            taken.append(accumulators)
        yield index, {site: taken[0][site].finish(taken[1][site] if len(taken) > 1 else None).cpu() for site in sites}


def stored(directory: Path, architecture: Architecture, block: int) -> dict[str, SiteStatistics]:
    """One block's statistics as calibrate wrote them, Gram matrices only if they were within budget."""
    tensors, _ = read_tensors(block_file(directory, block))
    return {site.name: SiteStatistics.from_tensors(site.name, tensors) for site in architecture.sites}


def stored_or_walked(
    directory: Path, model: BlockModel, fit: torch.Tensor, held_out: torch.Tensor, params: CalibrateParams
) -> Iterator[tuple[int, dict[str, SiteStatistics]]]:
    """Statistics with Gram matrices: from calibrate's files, or, where those were over budget, by walking the model again."""
    _, facts = read_tensors(block_file(directory, 0))
    if not facts["grams"]:
        yield from walk(model, fit, held_out, params, grams=True)
        return
    for index in range(model.checkpoint.architecture.depth):
        yield index, stored(directory, model.checkpoint.architecture, index)
