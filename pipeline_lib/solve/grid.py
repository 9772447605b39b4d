"""Quantisation grids: integers of ``bits`` bits and, for every group of consecutive inputs of an
output, a scale (and a zero point).

w = scale·(q − zero_point). Symmetric: q in −2^(b−1) … 2^(b−1) − 1 and no zero point; asymmetric: q
in 0 … 2^b − 1. Ranges include zero, so every grid contains zero and a pruned weight stays exactly
zero. The last group has the remaining columns. Shape letters: ``R`` outputs, ``C`` inputs, ``G``
groups of an output, ``g`` inputs of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.solve.settings import QuantizationParams, Stored


@dataclass(frozen=True)
class Scheme:
    """The parameters of a quantisation."""

    bits: int
    group: int | None  # columns; None: the whole row
    symmetric: bool
    dtype: torch.dtype  # dtype of the checkpoint, in which scales are exact
    stored: Stored = "checkpoint"  # gguf: scales are exact in GGUF's blocks too

    @property
    def levels(self) -> tuple[int, int]:
        """The smallest and the largest q."""
        return (
            (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if self.symmetric else (0, 2**self.bits - 1)
        )

    def scales(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points [R] (float32) for the rows of weights [R, g]; zeros do not count.

        As in GPTQ's code (2210.17323): all 2^b levels cover max(w, 0) − min(w, 0), or 2 max|w|. A
        row of zeros has scale 1.
        """
        low, high = weights.amin(1).clamp_max(0), weights.amax(1).clamp_min(0)
        width = 2 * torch.maximum(-low, high) if self.symmetric else high - low
        scale = self.exact(torch.where(width > 0, width / (2**self.bits - 1), 1))
        zero = torch.zeros_like(scale) if self.symmetric else (-low / scale).round_().clamp_(*self.levels)
        return scale, zero

    def exact(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales rounded to how they are stored, but never to 0: in a 16-bit dtype of the checkpoint, in
        GGUF's blocks, or unchanged (float32).
        """
        if self.stored == "gguf":
            return self._in_blocks(scale)
        if self.dtype.itemsize > 2:
            return scale
        limits = torch.finfo(self.dtype)
        return scale.clamp(limits.smallest_normal * limits.eps, limits.max).to(self.dtype).to(scale.dtype)

    def _in_blocks(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales that GGUF's blocks hold exactly, in float16.

        Q4_1 stores −zero_point·scale in float16 too. For 11 significant bits to hold this product, the
        scale has ``bits`` fewer.
        """
        digits = 11 if self.symmetric or self.bits > 4 else 11 - self.bits
        if self.dtype == torch.bfloat16:
            digits = min(digits, 8)
        mantissa, exponent = torch.frexp(scale)
        short = torch.ldexp((mantissa * 2**digits).round_(), exponent - digits)
        return short.clamp_(2.0**-24, 2.0 ** (15 - self.bits)).half().to(scale.dtype)

    def rounded(self, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The nearest weights on the grid; never −0."""
        codes = (weights / scale).round_().add_(zero).clamp_(*self.levels)
        return codes.sub_(zero).add_(0.0).mul_(scale)


def scheme(params: QuantizationParams, dtype: torch.dtype) -> Scheme | None:
    """The parameters of the grids for a checkpoint of this dtype; None without quantisation.

    Raises:
        SparselineError: the dtype cannot distinguish all codes.
    """
    if params.bits is None:
        return None
    # bfloat16 has 8 significant bits: with more than 128 steps, two can become one
    if params.bits == 8 and not params.symmetric and dtype == torch.bfloat16:
        raise SparselineError(
            "A bfloat16 checkpoint cannot hold asymmetric codes of 8 bits; set quantization.symmetric to"
            " true, or quantization.bits to 7 or less."
        )
    return Scheme(
        params.bits, None if params.group == "row" else params.group, params.symmetric, dtype, params.scales
    )


class Grid:
    """One matrix's grid [R, C], filled group by group."""

    def __init__(self, shape: Sequence[int], scheme: Scheme, device: torch.device) -> None:
        self.shape, self.scheme = tuple(shape), scheme
        self.width = min(scheme.group or shape[1], shape[1])
        self.scale = torch.ones(shape[0], -(-shape[1] // self.width), device=device)  # [R, G]
        self.zero = torch.zeros_like(self.scale)  # [R, G] whole numbers
        # sum of the squared rounding errors so far
        self.lost = torch.zeros((), dtype=torch.float64, device=device)
        # sum of the squared weights before rounding
        self.size = torch.zeros((), dtype=torch.float64, device=device)

    def fit(self, group: int, weights: torch.Tensor) -> None:
        """Choose a group's scales and zero points for its weights [R, g]."""
        self.scale[:, group], self.zero[:, group] = self.scheme.scales(weights)

    def round(self, weights: torch.Tensor, group: int) -> torch.Tensor:
        """Weights [R, n] of a group, rounded to the nearest ones on its grid."""
        return self.scheme.rounded(weights, self.scale[:, group, None], self.zero[:, group, None])

    def count(self, weights: torch.Tensor, lost: torch.Tensor) -> None:
        """Add the rounding error of weights to ``error``."""
        self.lost += lost.double().square().sum()
        self.size += weights.double().square().sum()

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """Fit every group and round to nearest: weights [R, C] on their grid, without compensation."""
        parts = []
        for group, part in enumerate(weight.split(self.width, dim=1)):
            self.fit(group, part)
            parts.append(self.round(part, group))
            self.count(part, part - parts[-1])
        return torch.cat(parts, dim=1)

    @property
    def error(self) -> torch.Tensor:
        """Σ (w − Q(w))² / Σ w² [] over all rounded weights, on the device."""
        return torch.where(self.size > 0, self.lost / self.size, 0.0)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of groups [R, G], repeated for all their columns [R, C]."""
        return values.repeat_interleave(self.width, dim=1)[:, : self.shape[1]]

    def steps(self, weight: torch.Tensor) -> torch.Tensor:
        """q − zero_point [R, C] int16 of weights on the grid, even if rounded to a 16-bit dtype since."""
        return (weight.float() / self.spread(self.scale)).round_().to(torch.int16)

    def tensors(self, label: str) -> dict[str, torch.Tensor]:
        """The tensors to store: ``{label}.scale`` [R, G] float32 and, if asymmetric,
        ``{label}.zero_point`` [R, G] uint8.
        """
        found = {f"{label}.scale": self.scale}
        return found if self.scheme.symmetric else found | {f"{label}.zero_point": self.zero.to(torch.uint8)}
