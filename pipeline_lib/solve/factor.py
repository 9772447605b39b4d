"""Damped second moments of a site's inputs, factorised once for all matrices of the site; and layer
errors.

Shape letters: ``R`` outputs, ``C`` inputs. G = E[X Xᵀ], shape [C, C]; H = G + damping.
"""

import functools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from pipeline_lib.core import products
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.masks.scores import Curvature
from pipeline_lib.masks.settings import DampingOf

LARGEST_DAMPING = 1.0
# rows and columns of a matrix whose error is computed at a time: they bound the memory, and suffice
# for products to run at full speed
ROWS, COLUMNS = 1024, 512
AVERAGED = 2048  # from this many columns on, rounding of single products averages out in an energy


@dataclass(frozen=True)
class Factorisation:
    """H = G + damping of a site, factorised once for all matrices of the site.

    ``upper`` is U [C, C], upper triangular with H⁻¹ = Uᵀ U: U_mm² is [H⁻¹]_mm of the trailing
    submatrix from m on. With an ``order``, this holds for H's rows and columns in that order; all
    other fields are in the order of the matrix's own columns.
    """

    second_moment: torch.Tensor  # G_mm [C]
    diagonal: torch.Tensor  # H_mm [C]
    inverse_diagonal: torch.Tensor  # [H⁻¹]_mm [C]
    upper: torch.Tensor
    dead: torch.Tensor  # [C] inputs that were always zero
    damping: float  # the damping that was needed
    order: torch.Tensor | None = None  # [C] columns in the order of the sweep; None: left to right

    @functools.cached_property
    def independence(self) -> float:
        """The mean share (0 … 1) of an input's variance that the other inputs do not explain. It is
        1/(H_mm [H⁻¹]_mm), averaged over inputs that are not always zero; 1 if all are.
        """
        share = (self.diagonal * self.inverse_diagonal).reciprocal().mul_(~self.dead)
        live = (~self.dead).sum()
        return float((share.sum() + (live == 0)) / live.clamp_min(1))

    def whole(self) -> Curvature:
        """The curvature for scores of the whole matrix at once; columns are in their own order."""
        return Curvature(self.second_moment, self.diagonal, self.inverse_diagonal)

    def trailing(self) -> Curvature:
        """The curvature for scores inside the sweep; columns are in the order of the sweep."""
        inverse_diagonal = self.upper.diagonal().square()
        if self.order is None:
            return Curvature(self.second_moment, self.diagonal, inverse_diagonal)
        return Curvature(self.second_moment[self.order], self.diagonal[self.order], inverse_diagonal)


def factorise(
    gram: torch.Tensor,
    damping: float,
    damping_of: DampingOf,
    where: str,
    factor: torch.Tensor | None = None,
    ordering: Callable[[Curvature], torch.Tensor | None] | None = None,
) -> Factorisation:
    """Damp and factorise a second moment G [C, C].

    ``mean`` adds ``damping`` times the mean diagonal (SparseGPT). If G belongs to folded inputs X' = D
    X, the mean is taken in the original coordinates, so that factors change no score. ``diagonal``
    adds ``damping`` times the entry itself, which needs no such correction. Always-zero inputs are
    excluded from the mean, and damped by it in both cases, so the scale of the activations changes no
    mask. (SparseGPT's code gives them a diagonal of 1.) If the Cholesky factorisation fails, the
    damping is multiplied by ten, up to 1.

    Args:
        factor: D's diagonal [C], if G belongs to folded inputs.
        ordering: function from the whole matrix's curvature to the order [C] of the sweep, or to None
            for left to right.

    Raises:
        SparselineError: G contains NaN or infinity, or cannot be factorised with the highest
            damping.
    """
    usable = finite(gram.diagonal())
    second_moment = gram.diagonal().clamp_min(0)  # for shifted inputs, rounding can make it negative
    dead = second_moment == 0
    amount = damping_unit(second_moment, damping_of, factor)
    while damping <= LARGEST_DAMPING:
        # H, its Cholesky factor, H⁻¹ and U in turn; the symmetric G is transposed to LAPACK's column order
        work = gram.clone().mT
        diagonal = work.diagonal().copy_(second_moment + damping * amount).clone()
        positive = cholesky_in_place(work)
        with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # raised if there is no factor
            torch.cholesky_inverse(work, out=work)
        inverse_diagonal = work.diagonal().clone()
        order = None if ordering is None else ordering(Curvature(second_moment, diagonal, inverse_diagonal))
        if order is not None:
            work = work[order][:, order].mT
        positive = positive & cholesky_in_place(work, upper=True) & torch.isfinite(work.diagonal()).all()
        possible, done = torch.stack([usable, positive]).tolist()  # one transfer from the device
        if not possible:
            raise SparselineError(NOT_FINITE.format(where))
        if done:
            return Factorisation(second_moment, diagonal, inverse_diagonal, work, dead, damping, order)
        damping = max(10 * damping, 1e-4)
    raise SparselineError(
        f"The second moment of {where} cannot be factorised even with damping 1; give more calibration"
        " samples."
    )


NOT_FINITE = "The second moment of {} contains NaN or infinity; check the model, or compute in float32."


def finite(diagonal: torch.Tensor) -> torch.Tensor:
    """Whether [] a second moment is finite, judged by its diagonal [C]: the largest entry there bounds
    all others.
    """
    return torch.isfinite(diagonal).all()


def damping_unit(
    second_moment: torch.Tensor, damping_of: DampingOf, factor: torch.Tensor | None = None
) -> torch.Tensor:
    """The amount that a damping of 1 adds to each entry of the diagonal [C] (``factorise``)."""
    dead = second_moment == 0
    unit = torch.ones_like(second_moment) if factor is None else factor.square()
    alive = dead.logical_not().sum()
    # always-zero inputs add nothing to the sum
    mean = torch.where(alive > 0, (second_moment / unit).sum() / alive, 1) * unit
    return mean if damping_of == "mean" else torch.where(dead, mean, second_moment)


def cholesky_in_place(matrix: torch.Tensor, upper: bool = False) -> torch.Tensor:
    """Replace a positive definite matrix [C, C] by its Cholesky factor, and return whether [] this
    exists. A matrix in column order is not copied.
    """
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, upper=upper, out=(matrix, info))
    return info == 0


def quadratic(weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """The diagonal [R] of W G Wᵀ in float64, for W [R, C] and a symmetric G [C, C].

    It takes half of the operations of W G: products of a column block with the blocks before it are
    computed once, and count twice. Products use G's dtype. Memory: two matrices [R, COLUMNS].
    """
    weight = weight.to(moment.dtype)
    found = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    for start in range(0, weight.shape[1], COLUMNS):
        own = weight[:, start : start + COLUMNS]
        product = own @ moment[start : start + COLUMNS, start : start + COLUMNS]
        if start:
            product.addmm_(weight[:, :start], moment[:start, start : start + COLUMNS], alpha=2)
        found += (
            torch.linalg.vecdot(product, own)
            if product.dtype != torch.bfloat16
            else product.mul_(own).sum(1, dtype=torch.float32)
        )
    return found


def lost(original: torch.Tensor, pruned: torch.Tensor | None, moment: torch.Tensor) -> torch.Tensor:
    """The error tr((W − Ŵ) G (W − Ŵ)ᵀ) [] in float64, from a symmetric second moment G [C, C]. Without
    Ŵ, it is tr(W G Wᵀ). It stays on the device.
    """
    total = torch.zeros((), dtype=torch.float64, device=moment.device)
    for first in range(0, len(original), ROWS):
        difference = original[first : first + ROWS]
        if pruned is not None:
            difference = difference - pruned[first : first + ROWS]
        total += quadratic(difference, moment).sum()
    return total


def energy(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """E‖W X‖² = tr(W G Wᵀ) [] in float64 from G [C, C], the unit of layer errors. It stays on the
    device.

    On a CPU that is faster with bfloat16, products of large matrices use bfloat16. The terms of G's
    diagonal are exact; the rounding errors of the many other terms average out.
    """
    if (
        gram.dtype != torch.float32
        or len(gram) < AVERAGED
        or gram.device.type != "cpu"
        or not products.bfloat16_is_faster()
    ):
        return lost(weight, None, gram)
    total, beside = torch.zeros((), dtype=torch.float64), gram.bfloat16()
    beside.diagonal().zero_()
    for part in weight.split(ROWS):
        total += part.float().square().sum(0).double() @ gram.diagonal().double()
        total += quadratic(part.bfloat16(), beside).sum()
    return total


def layer_error(original: torch.Tensor, pruned: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """E‖(W − Ŵ) X‖² / E‖W X‖² [] from the second moment G [C, C]; W is ``original``, or the target W₀
    of ``target_weight``. It stays on the device.
    """
    return lost(original, pruned, gram) / lost(original, None, gram).clamp_min(1e-30)
