"""One pass of the dense model over the calibration samples, block by block, that yields every site's
statistics.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pipeline_lib.core import ranks, settings
from pipeline_lib.core.artifacts import block_file, read_tensors
from pipeline_lib.models.architecture import Architecture, Layout, Site
from pipeline_lib.models.stream import BlockModel, tapped
from pipeline_lib.stats import lanes
from pipeline_lib.stats.lanes import Sums, deal, fold_for, parts
from pipeline_lib.stats.moments import Accumulator, SiteStatistics, drawn_together
from pipeline_lib.stats.settings import CalibrateParams


def gram_bytes(architecture: Architecture) -> int:
    """Bytes of all float32 Gram matrices of the model, for both splits."""
    return 2 * sum(4 * len(site.index) ** 2 for layout in architecture.layouts for site in layout.sites)


def walk(
    model: BlockModel,
    fit: torch.Tensor,
    held_out: torch.Tensor,
    params: CalibrateParams,
    grams: bool,
    to: Sequence[int] | None = None,
) -> Iterator[tuple[int, Mapping[str, SiteStatistics]]]:
    """Pass samples [N, T] through the dense model; yield (block, statistics per site, on the model's
    device) for each finished block.

    If the Gram matrices of a block's experts are larger than SPARSELINE_GRAM_BYTES, memory holds
    one group of them at a time (``InTurn``).

    Args:
        to: the processes that get the statistics; None: all.
    """
    to = ranks.everyone() if to is None else to
    streams = [
        _Rows(model, name, rows, params, grams)
        for name, rows in {"fit": fit, "held_out": held_out}.items()
        if len(rows)
    ]
    for index, layout in enumerate(model.checkpoint.architecture.layouts):
        block = model.block(index)
        groups = _groups(layout.sites, settings.gram_bytes() if grams else math.inf)
        collected = partial(_collected, streams, block, index, to)
        if len(groups) == 1:
            yield index, collected(groups[0], advance=True)
        else:
            yield index, InTurn(groups, collected)
            for stream in streams:
                stream.advance(block, index)


def _collected(
    streams: "Sequence[_Rows]",
    block: nn.Module,
    index: int,
    to: Sequence[int],
    names: Sequence[str],
    advance: bool = False,
) -> dict[str, SiteStatistics]:
    """The statistics of some sites of a block, from the fitting rows and, if there are any, the
    held-out ones.
    """
    sites = streams[0].model.checkpoint.architecture.layouts[index].sites
    pools = {site.name: site.pool for site in sites if site.name in names}
    owners = dict.fromkeys([*pools, *sorted({pool for pool in pools.values() if pool is not None})], to)
    sums = [
        fold_for(owners, map(partial(stream.collect, block, index, names, advance), lanes.own_lanes()))
        for stream in streams
    ]
    if advance and (passed := [bounds for stream in streams for bounds in stream.passed]):
        streams[0].model.check_finite(index, torch.cat(passed))
    if ranks.rank() not in to:
        return {}
    own = [drawn_together(found, pools) for found in sums]
    held = own[1] if len(own) > 1 else {}
    shares = {
        name: None if pool is None else own[0][name].seen / streams[0].rows.numel()
        for name, pool in pools.items()
    }
    return {name: found.finish(held.get(name), shares[name]) for name, found in own[0].items()}


class InTurn(Mapping[str, SiteStatistics]):
    """Statistics of a block's sites, with one group in memory: a request for a site collects its group
    by another pass.
    """

    def __init__(
        self, groups: Sequence[Sequence[str]], collect: Callable[[Sequence[str]], dict[str, SiteStatistics]]
    ) -> None:
        self._groups, self._collect = groups, collect
        self._group: Sequence[str] = ()
        self._here: dict[str, SiteStatistics] = {}

    def __getitem__(self, site: str) -> SiteStatistics:
        self._fetch(site)
        return self._here[site]

    def follow(self) -> None:
        """Take part in the passes while another process, which needs the statistics, requests them
        site by site.
        """
        for site in self:
            self._fetch(site)

    def _fetch(self, site: str) -> None:
        if site not in self._group:
            self._here = {}  # free before the next
            self._group = next(group for group in self._groups if site in group)
            self._here = self._collect(self._group)

    def __iter__(self) -> Iterator[str]:
        return (site for group in self._groups for site in group)

    def __len__(self) -> int:
        return sum(map(len, self._groups))


def _groups(sites: Sequence[Site], budget: float) -> list[list[str]]:
    """One group of all sites. If the experts' Gram matrices (training, held-out, and a lane's of
    each) exceed the budget, the experts' sites form groups of their own within it.
    """
    experts = {site.name: 16 * len(site.index) ** 2 for site in sites if site.pool is not None}
    if sum(experts.values()) <= budget:
        return [[site.name for site in sites]]
    groups: list[list[str]] = [[site.name for site in sites if site.pool is None]]
    used = math.inf
    for name, size in experts.items():
        if used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return [group for group in groups if group]


class _Rows:
    """The dense stream of some rows [N, T]."""

    def __init__(
        self, model: BlockModel, name: str, rows: torch.Tensor, params: CalibrateParams, grams: bool
    ) -> None:
        self.model, self.rows, self.params, self.grams = model, rows, params, grams
        self.dealt = deal(len(rows), params.batch_rows)
        self.stream = model.embed(rows, self.dealt.sizes, name, own=self.dealt.own)
        self.passed: list[torch.Tensor] = []  # bounds of the last block's outputs, lane by lane

    def collect(
        self, block: nn.Module, index: int, names: Sequence[str], advance: bool, lane: int
    ) -> Sums[Accumulator]:
        """Pass a lane through a block, and return what the inputs of the given sites, and of their
        pools, add to the statistics.
        """
        count, length = self.rows.shape
        first = parts(count)[lane].start * length
        sites = self.model.checkpoint.architecture.layouts[index].sites
        pools = {site.pool for site in sites if site.name in names and site.pool is not None}
        wanted = [site for site in sites if site.name in names or site.pool in pools]
        # the positions of an expert's tokens are not known
        starts = {site.name: first if site.pool is None else 0 for site in wanted if site.name in names}
        found = Sums(
            {
                name: Accumulator(count * length, self.params.median_tokens, self.grams, own)
                for name, own in (starts | dict.fromkeys(sorted(pools), 0)).items()
            }
        )

        def take(site: Site, x: torch.Tensor, weights: torch.Tensor | None) -> None:
            if site.pool is None:
                found[site.name].add(x.reshape(-1, length, x.shape[-1]))
                return
            for name in (site.name, site.pool):
                if name in found:
                    found[name].add(x, weights)

        if lane == lanes.own_lanes().start:
            self.passed = []
        with tapped(block, wanted, take):
            if advance:
                self.passed.append(self.model.passed(block, index, self.stream, self.dealt.lanes[lane]))
            else:
                for number in self.dealt.lanes[lane]:
                    with torch.no_grad():
                        self.model.call(block, index, self.stream.hidden[number])
        return found

    def advance(self, block: nn.Module, index: int) -> None:
        """Pass all of the stream through a block."""
        self.model.advance(block, index, self.stream)


def stored(directory: Path, layout: Layout, block: int) -> dict[str, SiteStatistics]:
    """One block's statistics from calibrate's files; Gram matrices only if they were within the
    budget.
    """
    tensors, _ = read_tensors(block_file(directory, block))
    return {site.name: SiteStatistics.from_tensors(site.name, tensors) for site in layout.sites}


def stored_or_walked(
    directory: Path, model: BlockModel, fit: torch.Tensor, held_out: torch.Tensor, params: CalibrateParams
) -> Iterator[tuple[int, Mapping[str, SiteStatistics]]]:
    """Statistics with Gram matrices, on the model's device: from calibrate's files or, if those were
    over the budget, by another pass of the model.
    """
    _, facts = read_tensors(block_file(directory, 0))
    if not facts["grams"]:
        yield from walk(model, fit, held_out, params, grams=True)
        return
    for index in range(model.checkpoint.architecture.depth):
        found = stored(directory, model.checkpoint.architecture.layouts[index], index)
        yield index, {name: statistics.to(model.device) for name, statistics in found.items()}
