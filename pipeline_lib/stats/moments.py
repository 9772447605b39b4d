"""Statistics of the inputs X [tokens, d] of a site, and their update after a change of factors without
a forward pass.

Symbols: G = E[X Xᵀ] second moment (Gram matrix) [d, d], μ = E[X] mean [d], n tokens.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

import torch


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics of one site. Vectors [d] and ``gram`` come from the training split, ``held_out_gram``
    from the held-out split.
    """

    second_moment: torch.Tensor  # diag(G)
    mean: torch.Tensor
    median: torch.Tensor  # over a fixed, evenly spaced subsample of tokens
    minimum: torch.Tensor
    maximum: torch.Tensor
    gram: torch.Tensor | None = None
    held_out_gram: torch.Tensor | None = None
    # [] for an expert: the sum of its squared router weights, divided by the number of all tokens;
    # None: 1
    share: torch.Tensor | None = None

    @property
    def second_moment_matrix(self) -> torch.Tensor:
        """G [d, d], which must be available.

        Raises:
            ValueError: only the vectors were collected.
        """
        if self.gram is None:
            raise ValueError("these statistics were collected without Gram matrices")
        return self.gram

    @property
    def moments(self) -> "Moments":
        """The moments for pruning, as a copy, because pruning overwrites them."""
        return Moments(self.second_moment_matrix.clone(), self.mean)

    def to(self, device: torch.device) -> "SiteStatistics":
        return SiteStatistics.from_tensors(
            "", {name: tensor.to(device) for name, tensor in self.tensors("").items()}
        )

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """For storage: ``{prefix}.{field}``, without absent Gram matrices."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {f"{prefix}.{name}": value for name, value in values.items() if value is not None}

    @classmethod
    def from_tensors(cls, prefix: str, tensors: Mapping[str, torch.Tensor]) -> "SiteStatistics":
        return cls(**{f.name: tensors[key] for f in fields(cls) if (key := f"{prefix}.{f.name}") in tensors})


S = TypeVar("S", bound="WeightedSums")
PIECE = 2**18  # values that a CPU widens to float64 at a time: they stay in its cache


class WeightedSums:
    """Sums over tokens, each weighted by the square of its router weight, because E‖w ΔW X‖² is the
    error that an expert contributes.

    The statistics of experts with few tokens are averaged with those of all experts of their layer.
    """

    MEANS: tuple[str, ...] = ()  # attributes that are sums, and become means by ``count``
    _seen: float | torch.Tensor | None = None

    def __init__(self) -> None:
        # the sum of squared weights, [] on the device; without weights, the number of tokens
        self.count: float | torch.Tensor = 0
        self.tokens = 0

    @property
    def seen(self) -> float | torch.Tensor:
        """The sum of weights before any averaging with a pool."""
        return self._seen if self._seen is not None else self.count

    def shrunk(self: S, pool: S) -> S:
        """Average the means with the pool's: n tokens have the weight n, the pool has the weight
        ``prior``. Sums that are the pool's only contribution do not change.
        """
        if self.tokens == pool.tokens:
            return self
        made = copy.copy(self if self.tokens else pool)
        made.count, made.tokens, made._seen = 1, self.tokens, self.count
        for name in self.MEANS:
            if getattr(pool, name) is None:
                continue
            common = getattr(pool, name) / pool.count
            own = self.tokens / (self.tokens + prior(common.shape[-1]))
            setattr(
                made,
                name,
                common if not self.tokens else own * getattr(self, name) / self.count + (1 - own) * common,
            )
        return made


def prior(channels: int) -> float:
    """The pool's weight in tokens: with fewer tokens than channels, a Gram matrix is singular."""
    return channels / 4


def drawn_together(found: Mapping[str, S], pools: Mapping[str, str | None]) -> dict[str, S]:
    """The sums of each site of ``pools`` (site -> pool or None), averaged with the sums of its
    pool. ``found`` contains both.
    """
    drawn = {}
    for site, pool in pools.items():
        whole = None if pool is None else found[pool]
        drawn[site] = found[site] if whole is None or not whole.tokens else found[site].shrunk(whole)
    return drawn


class Accumulator(WeightedSums):
    """Collects a site's statistics sample by sample, in float32 (count and sums in float64). An
    accumulator can be added to that of the preceding samples.
    """

    MEANS = ("sum", "squares", "gram")

    def __init__(self, total_tokens: int, median_tokens: int, gram: bool, first: int = 0) -> None:
        """
        Args:
            total_tokens: tokens of all rows, including those that others collect.
            median_tokens: maximum number of tokens for medians.
            first: the number of the first token that is collected here.
        """
        super().__init__()
        self.stride = max(1, -(-total_tokens // median_tokens))
        self.want_gram = gram
        self.first = first
        self.sample: list[torch.Tensor] = []
        self.sum = self.squares = torch.zeros((), dtype=torch.float64)
        self.minimum = self.maximum = torch.empty(0)
        self.gram: torch.Tensor | None = None

    def add(self, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add the activations of one sample [T, d] or of several [B, T, d]; or of an expert's tokens
        [n, d], with their router weights [n].
        """
        for row in _rows(inputs):
            if len(row):
                self._add(row, None if weights is None else weights.float().square())

    def _add(self, row: torch.Tensor, weights: torch.Tensor | None) -> None:
        if not self.tokens:
            self.sum, self.squares = (
                torch.zeros(row.shape[1], dtype=torch.float64, device=row.device) for _ in range(2)
            )
            if self.want_gram:
                self.gram = torch.zeros(row.shape[1], row.shape[1], device=row.device)
        x = row.float()
        weighed = x if weights is None else x * weights[:, None]
        for part in _parts(x):
            wide = weighed[part].double()
            self.sum += wide.sum(0)
            self.squares += (wide.square_() if weights is None else wide.mul_(x[part])).sum(0)
        low, high = torch.aminmax(x, dim=0)
        self.minimum = low if self.tokens == 0 else torch.minimum(self.minimum, low)
        self.maximum = high if self.tokens == 0 else torch.maximum(self.maximum, high)
        first = -(self.first + self.tokens) % self.stride
        self.sample.append(x[first :: self.stride].clone())
        if self.gram is not None:
            add_square(self.gram, row if weights is None else weighed, row)
        self.count += len(x) if weights is None else weights.sum(dtype=torch.float64)
        self.tokens += len(x)

    def __iadd__(self, other: "Accumulator") -> "Accumulator":
        if not self.tokens or not other.tokens:
            return self if self.tokens else other
        self.sum += other.sum
        self.squares += other.squares
        self.minimum, self.maximum = (
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
        )
        self.sample += other.sample
        if self.gram is not None and other.gram is not None:
            self.gram += other.gram
        self.count += other.count
        self.tokens += other.tokens
        return self

    def second_moment_matrix(self) -> torch.Tensor:
        """G [d, d]."""
        if self.gram is None:
            raise ValueError("this accumulator was not asked for the Gram matrix")
        return mirror_(self.gram / self.count)

    def finish(
        self, held_out: "Accumulator | None" = None, share: float | torch.Tensor | None = None
    ) -> SiteStatistics:
        return SiteStatistics(
            share=None
            if share is None
            else torch.as_tensor(share, dtype=torch.float32, device=self.sum.device),
            second_moment=(self.squares / self.count).float(),
            mean=(self.sum / self.count).float(),
            median=torch.cat(self.sample).median(0).values,
            minimum=self.minimum.clone(),  # experts without tokens share their pool's extremes
            maximum=self.maximum.clone(),
            gram=self.second_moment_matrix() if self.want_gram else None,
            held_out_gram=held_out.second_moment_matrix()
            if held_out is not None and held_out.gram is not None
            else None,
        )


@dataclass(frozen=True)
class Moments:
    """Statistics for pruning: of a site's inputs X in the pruned stream, and of X_dense in the
    dense one. Code that receives them owns them and may overwrite them.
    """

    gram: torch.Tensor  # G = E[X Xᵀ] [d, d]
    mean: torch.Tensor  # E[X] [d]
    cross: torch.Tensor | None = None  # C = E[X_dense Xᵀ] [d, d]
    dense_mean: torch.Tensor | None = None  # E[X_dense] [d]
    tokens: int | None = None  # number of tokens, before averaging with other experts

    def shifted(self, shift: torch.Tensor) -> "Moments":
        """The moments of X − δ and X_dense − δ (2602.21652, Eqs. 9–11; C' = C − δμᵀ − μ_dense δᵀ +
        δδᵀ).
        """
        cross = (
            None
            if self.cross is None or self.dense_mean is None
            else _shifted(self.cross, self.dense_mean, self.mean, shift)
        )
        dense_mean = None if self.dense_mean is None else self.dense_mean - shift
        return Moments(
            _shifted(self.gram, self.mean, self.mean, shift),
            self.mean - shift,
            cross,
            dense_mean,
            self.tokens,
        )


class MomentSums(WeightedSums):
    """Collects ``Moments`` sample by sample, in float32; means over samples in float64. They can be
    added to those of the preceding samples.
    """

    MEANS = ("gram", "mean")

    def __init__(self) -> None:
        super().__init__()
        self.gram = self.cross = self.mean = self.dense_mean = torch.zeros(())

    def add(
        self, inputs: torch.Tensor, dense: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> None:
        """Add the activations of one sample [T, d] or of several [B, T, d]; and those of the dense
        stream, in every call or in none.

        For an expert's tokens [n, d], also their router weights [n].
        """
        for number, row in enumerate(_rows(inputs)):
            if len(row):
                square = None if weights is None else weights.float().square()
                self._add(row, None if dense is None else _rows(dense)[number], square)

    def _add(self, x: torch.Tensor, dense: torch.Tensor | None, weights: torch.Tensor | None) -> None:
        if not self.tokens:
            self.gram = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            self.mean = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        if dense is not None and not self.tokens:
            self.cross, self.dense_mean = torch.zeros_like(self.gram), torch.zeros_like(self.mean)
        weighed = x if weights is None else x.float() * weights[:, None]
        add_square(self.gram, weighed, x)
        self.mean += weighed.sum(0, dtype=torch.float32)
        self.count += len(x) if weights is None else weights.sum(dtype=torch.float64)
        self.tokens += len(x)
        if dense is not None:
            add_product(self.cross, dense, x)
            self.dense_mean += dense.sum(0, dtype=torch.float32)

    def __iadd__(self, other: "MomentSums") -> "MomentSums":
        if not self.tokens or not other.tokens:
            return self if self.tokens else other
        self.gram += other.gram
        self.mean += other.mean
        self.cross += other.cross
        self.dense_mean += other.dense_mean
        self.count += other.count
        self.tokens += other.tokens
        return self

    def finish(self, beside: bool = False) -> Moments:
        """The moments, with the cross moment if requested. The sums become means in place, so nothing
        can be added afterwards.
        """
        own = mirror_(self.gram.div_(self.count)), (self.mean / self.count).float()
        beside = beside and self.dense_mean.ndim > 0  # an expert's inputs have no cross moment
        if not beside:
            return Moments(*own, tokens=self.tokens)
        return Moments(*own, self.cross.div_(self.count), (self.dense_mean / self.count).float(), self.tokens)


class DiagonalSums(WeightedSums):
    """The diagonal of a second moment, collected sample by sample in float64. It can be added to
    that of the preceding samples.
    """

    MEANS = ("squares",)

    def __init__(self) -> None:
        super().__init__()
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add the activations of one sample [T, d] or of several [B, T, d]; or of an expert's tokens
        [n, d], with their router weights [n].
        """
        for row in _rows(inputs):
            if len(row):
                if not self.tokens:
                    self.squares = torch.zeros(row.shape[1], dtype=torch.float64, device=row.device)
                for part in _parts(row):
                    squares = row[part].float().square()
                    weighed = (
                        squares if weights is None else squares.mul_(weights[part].float().square()[:, None])
                    )
                    self.squares += weighed.sum(0, dtype=torch.float64)
                self.count += len(row) if weights is None else weights.double().square().sum()
                self.tokens += len(row)

    def __iadd__(self, other: "DiagonalSums") -> "DiagonalSums":
        if not self.tokens or not other.tokens:
            return self if self.tokens else other
        self.squares += other.squares
        self.count += other.count
        self.tokens += other.tokens
        return self

    def finish(self) -> torch.Tensor:
        """E[X_m²], shape [d]."""
        return (self.squares / self.count).float()


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add leftᵀ right to ``total`` [d, d] float32, for [n, d] both. The factors are exact, and the
    sums are float32.

    A product of two bfloat16 values fits into float32. If a GPU's matrix units return their sums in
    float32, nothing is converted before.
    """
    if total.is_cuda and left.dtype == right.dtype == torch.bfloat16:
        total += torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        total.addmm_(left.float().T, right.float())


def add_square(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add leftᵀ right, which is symmetric, to ``total`` [d, d] float32, see ``add_product``. Nearly
    half of it, above the panels of its diagonal, is left out, and ``mirror_`` fills it in.
    """
    if not total.is_cuda:  # convert once for all panels
        left, right = left.float(), right.float()
    panels = _panels(total)
    if len(panels) == 1:
        add_product(total, left, right)
        return
    for panel in panels:
        add_product(total[panel, : panel.stop], left[:, panel], right[:, : panel.stop])


def mirror_(total: torch.Tensor) -> torch.Tensor:
    """A sum of ``add_square`` [d, d], completed in place; it is symmetric to the last bit."""
    for panel in _panels(total):
        own = total[panel, panel]
        own.copy_(own.tril() + own.tril(-1).T)
        total[: panel.start, panel] = total[panel, : panel.start].T
    return total


def _panels(total: torch.Tensor) -> list[slice]:
    """Slices of consecutive rows of [d, d], with as few rows as keep a processor busy."""
    size = 256 if total.device.type == "cpu" else 1024
    return [slice(start, min(start + size, len(total))) for start in range(0, len(total), size)]


def _parts(x: torch.Tensor) -> list[slice]:
    """Slices of consecutive rows of [n, d], so small that their float64 copies stay in a CPU's
    cache. On other devices one slice has all rows.
    """
    step = max(1, PIECE // x.shape[1]) if x.device.type == "cpu" else len(x)
    return [slice(start, start + step) for start in range(0, len(x), step)]


def _rows(inputs: torch.Tensor) -> torch.Tensor:
    """[B, T, d] of one row [T, d] or several."""
    return inputs if inputs.ndim == 3 else inputs[None]


def _shifted(
    moment: torch.Tensor, left: torch.Tensor, right: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """E[(A − δ)(B − δ)ᵀ] from E[A Bᵀ], E[A] and E[B]."""
    return moment - torch.outer(shift, right) - torch.outer(left, shift) + torch.outer(shift, shift)


def refresh(
    statistics: SiteStatistics, factor: torch.Tensor | None, shift: torch.Tensor | None = None
) -> SiteStatistics:
    """Statistics of X' = D (X − δ) from those of X: the fast Hessian update (2602.21652, Eqs. 9–11).

    G' = D (G − δμᵀ − μδᵀ + δδᵀ) D, hence diag(G') = d² ∘ (diag(G) − 2δ∘μ + δ²) and μ' = D (μ − δ).
    The held-out Gram matrix is centred with the mean of the training split, so with a shift it is
    exact only up to the difference of the two means.

    Args:
        factor: d > 0 [d], or None for 1.
        shift: δ [d], or None for 0.

    Returns:
        The statistics themselves if neither is given.
    """
    if factor is None and shift is None:
        return statistics
    delta = torch.zeros_like(statistics.mean) if shift is None else shift
    d = torch.ones_like(statistics.mean) if factor is None else factor
    mean = statistics.mean

    def matrix(moment: torch.Tensor | None) -> torch.Tensor | None:
        return None if moment is None else d[:, None] * _shifted(moment, mean, mean, delta) * d

    return SiteStatistics(
        second_moment=d * d * (statistics.second_moment - 2 * delta * mean + delta * delta),
        mean=d * (mean - delta),
        median=d * (statistics.median - delta),
        minimum=d * (statistics.minimum - delta),
        maximum=d * (statistics.maximum - delta),
        gram=matrix(statistics.gram),
        held_out_gram=matrix(statistics.held_out_gram),
        share=statistics.share,
    )
