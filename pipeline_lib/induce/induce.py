"""Learn function-preserving factors and selection weights before a mask is final, with the mask in the
loop.

Source: 2602.21652, Eqs. 4, 6–11. The error of pruning a layer is computed in the original
coordinates from the Gram matrix, E‖(W − W⊙M) X‖² = tr(ΔW G ΔWᵀ). So factors and weights have an
effect only through the mask M (see docs/method.md). Shape letters: ``R`` outputs, ``C`` inputs of a
matrix, ``d`` channels of a site.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from pipeline_lib.core import ranks
from pipeline_lib.core.random import generator
from pipeline_lib.fit.spectral import Norm, penalty
from pipeline_lib.induce.removed import Removed, sloped
from pipeline_lib.induce.scale import normalise
from pipeline_lib.masks.scores import Curvature, saliency
from pipeline_lib.masks.select import bounds, select, select_n_of_m
from pipeline_lib.masks.settings import SelectionParams
from pipeline_lib.models.architecture import Layout, Matrix
from pipeline_lib.models.folding import MatrixScales
from pipeline_lib.models.transform import Transform
from pipeline_lib.recipe.settings import InduceParams
from pipeline_lib.solve.factor import factorise, lost
from pipeline_lib.stats.dense import DenseBlock
from pipeline_lib.stats.moments import SiteStatistics, refresh

T = TypeVar("T")


@dataclass
class Outcome:
    """Result of induction for one block. Errors are relative layer errors, averaged over matrices."""

    transform: Transform  # on the CPU, as it is stored
    choice: str  # none, start, learned
    judged: dict[str, float]  # candidate -> its error in the gate
    held_out: dict[str, float]  # candidate -> layer error on the held-out rows
    curve: list[dict[str, float]]  # step, loss, held_out
    mask_changed: float  # share of mask entries that induction changes

    def facts(self) -> dict[str, Any]:
        names = ("choice", "judged", "held_out", "mask_changed")
        return {name: getattr(self, name) for name in names}


class _Layer:
    """One logical matrix with everything that its score and error need."""

    def __init__(
        self,
        matrix: Matrix,
        weight: torch.Tensor,
        kept: int,
        statistics: SiteStatistics,
        curvature: Curvature,
        settings: SelectionParams,
    ) -> None:
        self.matrix, self.weight, self.kept, self.settings = matrix, weight, kept, settings
        self.curvature = curvature
        self.gram = statistics.second_moment_matrix
        self.held_out_gram = self.gram if statistics.held_out_gram is None else statistics.held_out_gram
        self.base = (weight.square() + 1e-30).log_()
        self.energy, self.held_out_energy = (
            lost(weight, None, gram).float().clamp_min(1e-30) for gram in (self.gram, self.held_out_gram)
        )

    def shifts(
        self, scales: tuple[torch.Tensor, torch.Tensor], log_u: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The shifts of rows [R] and columns [C] that turn log W² into the log of the refreshed
        score (fast Hessian update, Eqs. 9–11) times u².

        This needs no forward pass, only D. Since every score is W² times a factor per column, it
        needs no pass over the matrix either.
        """
        d_squared = (-2 * scales[1]).exp()  # columns of W̃ carry D⁻¹
        refreshed = Curvature(
            self.curvature.second_moment * d_squared,
            self.curvature.diagonal * d_squared,
            self.curvature.inverse_diagonal / d_squared,
        )
        factor = saliency(self.settings.score, scales[1].exp()[None], refreshed)[0]
        return 2 * scales[0], (factor + 1e-30).log() + 2 * log_u

    def scores(self, part: slice, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """log scores of some rows [r, C]."""
        return (self.base[part] + columns).add_(rows[part, None])

    def log_scores(self, scales: tuple[torch.Tensor, torch.Tensor], log_u: torch.Tensor) -> torch.Tensor:
        """log of the refreshed score [R, C] times u²."""
        return self.scores(slice(None), *self.shifts(scales, log_u))

    @property
    def _by_row(self) -> bool:
        """Whether the mask of every row is chosen separately, and in the same way."""
        share, spare = divmod(self.kept, len(self.weight))
        return bool(self.settings.shape.m) or (
            self.settings.group == "row" and spare == 0 < share < self.weight.shape[1]
        )

    def parts(self, step: int) -> Iterator[slice]:
        """Slices of rows whose masks are chosen at once: ``step`` rows if rows are independent,
        otherwise all.
        """
        rows = len(self.weight)
        step = step if self._by_row else rows
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask of one part's scores, and the threshold of each comparison group, which
        broadcasts against the mask.
        """
        if self._by_row and not self.settings.shape.m:
            return bounds(scores, self.kept // len(self.weight))
        hard = self.mask(scores)
        return hard, self._threshold(scores, hard)

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """The mask of the scores of one part, or of the whole matrix."""
        pattern = self.settings.shape
        if pattern.m:
            return select_n_of_m(scores, self.kept * pattern.m // self.weight.numel(), pattern.m)
        return select(scores, self.kept, self.settings.group, self.settings.block)

    def _threshold(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Midway between the weakest kept and the strongest pruned score of each group; broadcasts
        against [R, C].
        """
        infinity = float("inf")
        kept, pruned = scores.masked_fill(~mask, infinity), scores.masked_fill(mask, -infinity)

        def middle(a: torch.Tensor, b: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
            low, high = a.amin(dims, keepdim=True), b.amax(dims, keepdim=True)
            low = torch.where(low.isinf(), high, low)
            return (low + torch.where(high.isinf(), low, high)) / 2

        pattern = self.settings.shape
        if pattern.m:
            grouped = (scores.shape[0], -1, pattern.m)
            return (
                middle(kept.view(grouped), pruned.view(grouped), (2,))
                .expand(-1, -1, pattern.m)
                .reshape(scores.shape)
            )
        if self.settings.group == "row":
            return middle(kept, pruned, (1,))
        width = self.settings.block if self.settings.group == "block" else scores.shape[1]
        parts = zip(kept.split(width, 1), pruned.split(width, 1), strict=True)
        return torch.cat([middle(a, b, (0, 1)).expand_as(a) for a, b in parts], 1)

    def error(self, mask: torch.Tensor, held_out: bool = False) -> torch.Tensor:
        """E‖(W − W⊙M) X‖² / E‖W X‖² (Eq. 4 in original coordinates)."""
        gone = self.weight * (1 - mask.to(self.weight.dtype))
        gram, energy = (self.held_out_gram, self.held_out_energy) if held_out else (self.gram, self.energy)
        return lost(gone, None, gram) / energy


class _Block:
    """The layers of a block under shared log factors θ per coupling and log selection weights per site."""

    def __init__(self, layout: Layout, layers: list[_Layer]) -> None:
        self.layers = layers
        self.matrix_scales = [
            MatrixScales(
                layout, layer.matrix, (layer.weight.shape[0], layer.weight.shape[1]), layer.weight.device
            )
            for layer in layers
        ]

    def scales(self, number: int, theta: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log scales of the layer's rows [R] and columns [C]."""
        return self.matrix_scales[number](theta)

    def log_scores(
        self, number: int, theta: Mapping[str, torch.Tensor], log_u: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        layer = self.layers[number]
        return layer.log_scores(self.scales(number, theta), log_u.get(layer.matrix.site, torch.zeros(())))

    def removed(
        self,
        theta: Mapping[str, torch.Tensor],
        log_u: Mapping[str, torch.Tensor],
        temperature: float,
        probes: int,
        random: torch.Generator,
    ) -> list[torch.Tensor]:
        """Every layer's differentiable error with the mask of the refreshed score. It is exact with
        0 probes, otherwise estimated.
        """
        shifts, signs = [], []
        for number, layer in enumerate(self.layers):
            # drawn on the CPU, so that every device gets the same signs
            drawn = torch.randint(2, (probes, len(layer.weight)), generator=random)
            signs.append(2.0 * drawn.to(layer.weight.device) - 1 if probes else None)
            u = log_u.get(layer.matrix.site, torch.zeros(()))
            shifts.append(layer.shifts(self.scales(number, theta), u))
        found = self.each(
            lambda number: sloped(self.layers[number], *shifts[number], temperature, signs[number])
        )
        return [Removed.apply(*both, value) for both, value in zip(shifts, found, strict=True)]  # type: ignore[no-untyped-call]

    def each(self, compute: Callable[[int], T]) -> list[T]:
        """``compute`` of every layer's number. Layers are dealt to the stage's processes by rows ·
        columns².
        """
        costs = {n: layer.weight.numel() * layer.weight.shape[1] for n, layer in enumerate(self.layers)}
        return list(ranks.each(costs, compute).values())

    def mask(
        self, number: int, theta: Mapping[str, torch.Tensor], log_u: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        return self.layers[number].mask(self.log_scores(number, theta, log_u))

    def held_out(self, theta: Mapping[str, torch.Tensor], log_u: Mapping[str, torch.Tensor]) -> float:
        errors = self.each(
            lambda number: self.layers[number].error(self.mask(number, theta, log_u), held_out=True)
        )
        return float(torch.stack(errors).mean())


def induce_block(
    dense: DenseBlock,
    kept: Mapping[Matrix, int],
    start: Transform,
    selection: SelectionParams,
    params: InduceParams,
    error_of: Callable[[Transform], float] | None = None,
) -> Outcome:
    """Learn one block's factors and selection weights; keep them only if they are better on the
    held-out split.

    Shifts are kept per site. Candidates for the rest: ``none``, ``start`` (the initial factors),
    ``learned`` (the best evaluated step). L = mean layer error + λ R_p (Eqs. 6–8); Adam on log
    factors, projected to geometric mean 1 and |log| ≤ limit after every step.

    Args:
        dense: the block; its name and the seed key the random signs.
        kept: number of weights that each included matrix keeps; its mask is learned at that count.
        error_of: the error of a candidate (``gate.Gate``), of which the lowest wins. None: the
            held-out layer error decides.
    """
    layout, where, given = dense.layout, dense.where, dense.statistics
    device = given[layout.sites[0].name].mean.device
    start = start.to(device)
    if error_of:
        start = Transform(start.factors, _worthy(start.shifts, error_of), {})
    statistics = {
        site.name: refresh(given[site.name], None, start.shifts.get(site.name)) for site in layout.sites
    }

    def curvature(name: str) -> Curvature:
        gram = statistics[name].second_moment_matrix
        return factorise(gram, selection.damping, selection.damping_of, f"{where} {name}").whole()

    curvatures = ranks.each({name: len(site.mean) ** 3 for name, site in statistics.items()}, curvature)
    layers = [
        _Layer(
            m,
            m.view(dense.tensors[m.parameter]).float(),
            kept[m],
            statistics[m.site],
            curvatures[m.site],
            selection,
        )
        for m in layout.matrices
        if m in kept
    ]
    block = _Block(layout, layers)
    started = {name: factor.log() for name, factor in start.factors.items()}
    nothing: dict[str, torch.Tensor] = {}
    plain = Transform({}, start.shifts, {})
    held_out = {"none": block.held_out(nothing, nothing), "start": block.held_out(started, nothing)}
    judged = {"none": error_of(plain), "start": error_of(start)} if error_of else dict(held_out)
    # Learning starts from the better of the two: factors that help Magnitude can mislead scores
    # that already use the inputs.
    ahead = judged["start"] < judged["none"]
    theta = {
        c.name: started[c.name].clone() if ahead and c.name in started else torch.zeros(c.size, device=device)
        for c in layout.couplings
    }
    log_u = (
        {site.name: torch.zeros(len(site.index), device=device) for site in layout.sites}
        if params.importance
        else {}
    )
    candidates = {"none": (nothing, nothing), "start": (started, nothing), "learned": (dict(theta), nothing)}
    origin = "start" if ahead else "none"
    held_out["learned"], judged["learned"] = held_out[origin], judged[origin]
    norms = [Norm(layer.weight, params.spectral) for layer in layers]
    free = [*(theta.values() if params.factors else ()), *log_u.values()]
    curve: list[dict[str, float]] = []
    if free:
        for tensor in free:
            tensor.requires_grad_(True)
        optimiser = torch.optim.Adam(free, lr=params.rate)
        unimproved = 0
        random = generator(params.seed, where)
        for step in range(1, params.steps + 1):
            loss = torch.stack(block.removed(theta, log_u, params.temperature, params.probes, random)).mean()
            if params.spectral.weight:
                ratios = [
                    norm.rescaled(layer.weight, *block.scales(n, theta))
                    for n, (norm, layer) in enumerate(zip(norms, layers, strict=True))
                ]
                loss = loss + params.spectral.weight * penalty(ratios, params.spectral)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                for tensor in free:
                    tensor.copy_(normalise(tensor, params.limit))
                if step % params.check_every == 0 or step == params.steps:
                    error = block.held_out(theta, log_u)
                    curve.append({"step": step, "loss": float(loss.detach()), "held_out": error})
                    if error < held_out["learned"]:
                        held_out["learned"], unimproved = error, 0
                        candidates["learned"] = _copied(theta), _copied(log_u)
                    else:
                        unimproved += 1
            if unimproved >= params.patience:
                break
    with torch.no_grad():
        # otherwise the candidate is its origin, which was judged already
        if held_out["learned"] < held_out[origin]:
            judged["learned"] = (
                error_of(_transform(*candidates["learned"], start)) if error_of else held_out["learned"]
            )
        choice = min(judged, key=lambda name: (judged[name], list(judged).index(name)))
        best_theta, best_u = candidates[choice]
        swapped = block.each(
            lambda n: (block.mask(n, nothing, nothing) != block.mask(n, best_theta, best_u)).sum()
        )
        changed = int(torch.stack(swapped).sum()) / sum(layer.weight.numel() for layer in layers)
        transform = _transform(best_theta, best_u, start).to(torch.device("cpu"))
    return Outcome(transform, choice, judged, held_out, curve, changed)


def _worthy(
    shifts: Mapping[str, torch.Tensor], error_of: Callable[[Transform], float]
) -> dict[str, torch.Tensor]:
    """The sites' shifts that lower the error in the gate, tried one after the other. The mean of a
    site's inputs is not always the best shift.
    """
    kept: dict[str, torch.Tensor] = {}
    error = error_of(Transform()) if shifts else 0.0
    for site, shift in shifts.items():
        tried = error_of(Transform({}, kept | {site: shift}, {}))
        if tried < error:
            kept, error = kept | {site: shift}, tried
    return kept


def _copied(logs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: log.detach().clone() for name, log in logs.items()}


def _transform(
    theta: Mapping[str, torch.Tensor], log_u: Mapping[str, torch.Tensor], start: Transform
) -> Transform:
    factors, importance = (
        {name: value.detach().exp() for name, value in part.items()} for part in (theta, log_u)
    )
    return Transform(factors, start.shifts, importance)
