"""Statistics of the inputs of a block's sites, for pruning."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import nn

from pipeline_lib.core import ranks
from pipeline_lib.core.threads import side_by_side
from pipeline_lib.models.architecture import Site
from pipeline_lib.models.stream import BlockModel, Stream, tapped
from pipeline_lib.stats.lanes import Sums, fold_for
from pipeline_lib.stats.moments import DiagonalSums, Moments, MomentSums, drawn_together

# sites, and the processes that get the statistics of each; names alone: all processes
Owners = Sequence[str] | Mapping[str, Sequence[int]]


class _Reached(Exception):
    """Raised when all requested sites were reached: the rest of the block is not needed."""


class Reference:
    """A block before it changes, and a stream before it. The inputs of its sites are the target of
    compensation.

    One pass of the block computes the inputs of all sites. They are kept until they are used, if the
    stream's storage has room for them. Otherwise the block runs again for each collection. The
    results are the same.
    """

    def __init__(
        self,
        model: BlockModel,
        block: tuple[int, nn.Module],
        stream: Stream,
        lanes: Sequence[Sequence[int]],
        sites: Sequence[str],
        advances: bool = True,
    ) -> None:
        """
        Args:
            block: its index, and its module.
            lanes: for each lane, the numbers of its batches that enter statistics.
            sites: those whose inputs may be requested. Experts have none: the router may send the
                tokens of this stream to others.
            advances: the stream advances, in the same pass if the inputs are kept.
        """
        self._model, self._stream, self._advances = model, stream, advances
        self._index, self._module = block
        layout = model.checkpoint.architecture.layouts[self._index]
        self._sites = [name for name in sites if layout.site(name).pool is None]
        own, rows = set(stream.hidden.own), stream.hidden.sizes()
        tokens = model.length * sum(rows[number] for lane in lanes for number in lane if number in own)
        channels = sum(len(layout.site(name).index) for name in self._sites)
        self._keeps = tokens * channels * model.dtype.itemsize <= stream.storage.room()
        self._kept: dict[int, dict[str, torch.Tensor]] = {}  # batch -> site -> inputs
        self._bounds: dict[int, torch.Tensor] = {}  # of the outputs of batches that have advanced

    def inputs(self, number: int, sites: Sequence[str]) -> dict[str, torch.Tensor]:
        """The inputs [B, T, d] of these sites for one batch. Each site may be requested once."""
        if self._keeps and number in self._kept:
            own = self._kept[number]
            return {name: own.pop(name) for name in sites if name in own}
        found: dict[str, torch.Tensor] = {}

        def keep(name: str, x: torch.Tensor, _weights: torch.Tensor | None) -> None:
            # a copy, because the block may change it later in the pass
            found.setdefault(name, x.clone() if self._keeps else x)

        block, hidden = (self._index, self._model.own_copy(self._module)), self._stream.hidden[number]
        whole = self._keeps and self._advances
        out = _tap(self._model, block, hidden, self._sites if self._keeps else sites, keep, whole)
        if whole and out is not None:
            self._stream.hidden[number] = out
            self._bounds[number] = torch.stack(out.aminmax())
        if self._keeps:
            self._kept[number] = found
            return self.inputs(number, sites)
        return found

    def advance(self) -> None:
        """Pass the rest of the stream through the block.

        Raises:
            SparselineError: an output contains NaN or infinity.
        """
        own = self._stream.hidden.own
        left = [number for number in own if number not in self._bounds]
        rest = self._model.passed(self._module, self._index, self._stream, left if self._bounds else None)
        self._model.check_finite(self._index, torch.cat([*self._bounds.values(), rest]))


def collect(
    model: BlockModel,
    block: tuple[int, nn.Module],
    hidden: Sequence[torch.Tensor],
    lanes: Sequence[Sequence[int]],
    owners: Owners,
    reference: Reference | None = None,
) -> dict[str, Moments]:
    """Moments of the sites' inputs for batches of a stream before a block. Only the necessary part of
    the block is run.

    Memory: two matrices [d, d] per site (the total, and one lane's sum), twice that with
    ``reference``, and two more for a layer of experts; the inputs that ``reference`` keeps.

    Args:
        block: its index, and its module.
        hidden: [B, T, D] each.
        lanes: for each lane, the numbers of its batches.
        owners: the sites, and the processes that get their moments.
        reference: if given, the cross moments with its inputs are collected, too.
    """

    known = {site.name: site.pool for site in _sites(model, block[0])}
    sites = list(owners)
    pools, tapped_sites = _pooled(known, sites)

    def summed(lane: Sequence[int]) -> Sums[MomentSums]:
        sums = Sums({name: MomentSums() for name in [*sites, *pools]})
        own = model.own_copy(block[1])
        for number in lane:
            aims: dict[str, torch.Tensor] = {}
            if reference is not None and apart:
                aims = reference.inputs(number, apart)

            def add(
                name: str,
                x: torch.Tensor,
                weights: torch.Tensor | None,
                aims: dict[str, torch.Tensor] = aims,
            ) -> None:
                if name in sums:
                    sums[name].add(x, aims.get(name), weights)
                if (pool := known[name]) is not None:
                    sums[pool].add(x, None, weights)

            _tap(model, (block[0], own), hidden[number], tapped_sites, add)
        return sums

    apart = [name for name in sites if known[name] is None]
    to = _receivers(owners, known)
    with side_by_side(model.small[block[0]]) as each_lane:
        found = fold_for(to, each_lane(summed, [lanes[lane] for lane in ranks.part(len(lanes))]))
    own_sites = {name: known[name] for name in sites if name in found}
    drawn = drawn_together(found, own_sites)
    del found
    return {name: drawn.pop(name).finish(reference is not None) for name in own_sites}


def _receivers(owners: Owners, known: Mapping[str, str | None]) -> dict[str, Sequence[int]]:
    """The processes that get the sums of each site, and of each pool (``known``: site -> pool)."""
    to: dict[str, Sequence[int]] = {
        name: owners[name] if isinstance(owners, Mapping) else ranks.everyone() for name in owners
    }
    pools: dict[str, set[int]] = {}
    for name, own_ranks in to.items():
        if (pool := known[name]) is not None:
            pools.setdefault(pool, set()).update(own_ranks)
    return to | {pool: sorted(found) for pool, found in pools.items()}


def _sites(model: BlockModel, index: int) -> tuple[Site, ...]:
    return model.checkpoint.architecture.layouts[index].sites


def _pooled(known: Mapping[str, str | None], sites: Sequence[str]) -> tuple[list[str], list[str]]:
    """The pools of the given sites, and these sites with all others of their pools (``known``: site
    -> pool).
    """
    pools = list(dict.fromkeys(pool for name in sites if (pool := known[name]) is not None))
    return pools, [*sites, *(name for name, pool in known.items() if pool in pools and name not in sites)]


def collect_diagonals(
    model: BlockModel,
    block: tuple[int, nn.Module],
    hidden: Sequence[torch.Tensor],
    lanes: Sequence[Sequence[int]],
    sites: Sequence[str],
) -> dict[str, torch.Tensor]:
    """The diagonals [d] of the second moments of the sites' inputs, see ``collect``."""

    known = {site.name: site.pool for site in _sites(model, block[0])}
    pools, tapped_sites = _pooled(known, sites)

    def summed(lane: Sequence[int]) -> Sums[DiagonalSums]:
        sums = Sums({name: DiagonalSums() for name in [*sites, *pools]})

        def add(name: str, x: torch.Tensor, weights: torch.Tensor | None) -> None:
            for one in (name, known[name]):
                if one is not None and one in sums:
                    sums[one].add(x, weights)

        own = model.own_copy(block[1])
        for number in lane:
            _tap(model, (block[0], own), hidden[number], tapped_sites, add)
        return sums

    with side_by_side(model.small[block[0]]) as each_lane:
        summed_lanes = each_lane(summed, [lanes[lane] for lane in ranks.part(len(lanes))])
        found = fold_for(_receivers(sites, known), summed_lanes)
    drawn = drawn_together(found, {name: known[name] for name in sites})
    return {name: one.finish() for name, one in drawn.items()}


Named = Callable[[str, torch.Tensor, torch.Tensor | None], None]


def _tap(
    model: BlockModel,
    block: tuple[int, nn.Module],
    hidden: torch.Tensor,
    sites: Sequence[str],
    take: Named,
    whole: bool = False,
) -> torch.Tensor | None:
    """Run a block on a batch [B, T, D] until ``take(site, X, weights)`` was called with the inputs
    of every site. X is [B, T, d], or [n, d] for an expert.

    Returns:
        With ``whole``, the block's output; otherwise usually None.
    """
    names = set(sites)
    wanted = [one for one in _sites(model, block[0]) if one.name in names]
    ahead = {site.name for site in wanted}

    def reach(site: Site, x: torch.Tensor, weights: torch.Tensor | None) -> None:
        take(site.name, x if site.pool is not None else x.reshape(len(hidden), -1, x.shape[-1]), weights)
        ahead.discard(site.name)
        if not ahead and not whole:
            raise _Reached

    with torch.no_grad(), suppress(_Reached), tapped(block[1], wanted, reach):
        return model.call(block[1], block[0], hidden)
    return None
