"""Distribution level: initial function-preserving factors and shifts (2602.21652, Sec. 2.2–2.3).

Convention: a factor d > 0 acts on a site's input as X' = D X and on its consumers as W' = W D⁻¹;
Eq. 3's s is 1/d.
"""

from collections.abc import Mapping

import torch

from pipeline_lib.induce.settings import ScaleParams
from pipeline_lib.models.architecture import Coupling, Layout
from pipeline_lib.models.folding import fold, numbers
from pipeline_lib.stats.moments import SiteStatistics


def normalise(log_factor: torch.Tensor, limit: float) -> torch.Tensor:
    """log s with mean 0 (geometric mean 1) and |log s| ≤ limit. Alternating between the two
    constraints converges fast.
    """
    for _ in range(8):
        log_factor = (log_factor - log_factor.mean()).clamp(-limit, limit)
    return log_factor


def start_of_site(statistics: SiteStatistics, params: ScaleParams) -> torch.Tensor:
    """s [d] of Eq. 3 for one site's channels, before normalisation.

    ``eq5``: s_j = (median_j − g(mean_j))² (Eq. 5); ``second_moment``: s_j = sqrt(G_jj), which turns
    Magnitude into Wanda; ``maximum``: s_j = (max |X_j|)^power.
    """
    if params.start == "eq5":
        mean = statistics.mean if params.monotone == "identity" else torch.tanh(statistics.mean)
        return (statistics.median - mean).square()
    if params.start == "second_moment":
        return statistics.second_moment.sqrt()
    if params.start == "maximum":
        return torch.maximum(statistics.maximum, -statistics.minimum).pow(params.power)
    return torch.ones_like(statistics.mean)


def _floored_log(s: torch.Tensor) -> torch.Tensor:
    """log s with a floor of 1e-6 of the largest, since Eq. 5 vanishes where median and mean agree."""
    return s.clamp_min(1e-6 * s.max()).clamp_min(torch.finfo(s.dtype).tiny).log()


def _balanced(coupling: Coupling, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """log of the factor that gives both matrices' entries equal norms in each channel; 0 where one
    side is zero.
    """
    squares = torch.zeros(2, coupling.size)
    for tie in coupling.ties:
        if tensors[tie.parameter].ndim > (tie.expert is not None) + 1:
            entries = tie.entries(tensors[tie.parameter].float()).square().sum(1)
            squares[0 if tie.power > 0 else 1].index_add_(0, numbers(tie.index), entries)
    up, down = squares
    return torch.where(
        (up > 0) & (down > 0), (down.clamp_min(1e-30).log() - up.clamp_min(1e-30).log()) / 4, 0.0
    )


def starting_factors(
    layout: Layout,
    tensors: Mapping[str, torch.Tensor],
    statistics: Mapping[str, SiteStatistics],
    params: ScaleParams,
) -> dict[str, torch.Tensor]:
    """For every coupling of a block, factors d [size] in float32 with geometric mean 1.

    Couplings of a norm start from their site's statistics. So do pairs of matrices with ``pairs:
    inputs``. With ``balance``, a pair starts where both sides have equal norms, including the
    norms' factors; Q and K, which have no site between them, always do. If a factor applies to
    several channels of a site (grouped queries), it starts from the mean of their logarithms.
    """
    if params.start == "identity":
        return {coupling.name: torch.ones(coupling.size) for coupling in layout.couplings}
    sites = {site.coupling: site for site in layout.sites}
    factors, norms = {}, {}
    for coupling in layout.couplings:
        if coupling.name not in sites or (_is_pair(coupling, tensors) and params.pairs == "balance"):
            continue
        site = sites[coupling.name]
        logs = _floored_log(start_of_site(statistics[site.name], params))
        index = numbers(site.index)
        total = torch.zeros(coupling.size).index_add_(0, index, logs)
        log_s = total / torch.zeros(coupling.size).index_add_(0, index, torch.ones(len(index)))
        factors[coupling.name] = torch.exp(-normalise(log_s, params.limit))
        if not _is_pair(coupling, tensors):
            norms[coupling.name] = factors[coupling.name]
    folded = fold(tensors, layout, norms)
    for coupling in layout.couplings:
        if coupling.name not in factors:
            factors[coupling.name] = torch.exp(normalise(_balanced(coupling, folded), params.limit))
    return factors


def _is_pair(coupling: Coupling, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the factor runs between matrices, not from a norm to matrices."""
    return all(
        any(tensors[t.parameter].ndim >= 2 for t in coupling.ties if t.power == power) for power in (1, -1)
    )


def shifts(
    layout: Layout, statistics: Mapping[str, SiteStatistics], params: ScaleParams
) -> dict[str, torch.Tensor]:
    """δ [d] for sites whose consumers all have a bias, which becomes b̃ = b + W δ (Eq. 3), in the
    original coordinates.
    """
    if params.shift == "none":
        return {}
    return {
        site.name: getattr(statistics[site.name], params.shift)
        for site in layout.sites
        if all(matrix.bias is not None for matrix in layout.consumers(site.name))
    }
