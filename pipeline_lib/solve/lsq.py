"""Layer-wise least squares as ALPS (2406.07831) solves it: the best weights on a mask, and a better mask.

Both minimise E(Ŵ) = tr((Ŵ − W₀) H (Ŵ − W₀)ᵀ), in which rows do not meet. The OBS sweep is greedy, and moves only columns still to come: even
on its own mask its weights are not the best. Shape letters: ``R`` outputs, ``C`` inputs. The columns of always-zero inputs should be
0 in W₀, as the sweep makes them: they cost E their damping only, and must not compete for places.
"""

from collections.abc import Callable

import torch

from pipeline_lib.solve.factor import cholesky_in_place, squared_error
from pipeline_lib.solve.settings import LsqParams

EVERY = 3  # iterations of ADMM between two changes of ρ, each an inverse [C, C] (3 in the authors' code)
ROWS = 1024  # solved at a time: bounds the memory, and is enough for a matrix product to run at full speed
LEAST_RHO = 1e-6  # a ρ at which nothing is held back any more: if the support does not move now, it never will
SPECTRAL = 512  # columns up to which one eigendecomposition and a product per ρ are faster than a Cholesky factorisation and an inverse
STILL = 1e-3  # share of the kept weights: a support of which no more is exchanged stands still


def solve(
    target: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor, start: torch.Tensor, params: LsqParams
) -> tuple[torch.Tensor, int]:
    """The weights that are zero off the mask and minimise E, by preconditioned conjugate gradients (2406.07831, Section 3.3).

    All rows share the product with H but have steps of their own; the preconditioner is H's diagonal, so that scales of inputs do not
    matter. A row is done when its residual (W₀ − Ŵ) H on the mask is at most ``tolerance`` times the right-hand side W₀ H on the mask,
    both in the norm of 1/H_mm. No row ends with a larger E than it starts with. Where H_mm = 0 weights stay as in ``start``.

    Rows are taken ``ROWS`` at a time, which changes nothing but rounding: besides inputs and output, this needs five matrices [ROWS, C].

    Args:
        target: W₀ [R, C], float32 or float64 as all others.
        mask: [R, C] bool, True = kept.
        hessian: H [C, C], positive semidefinite.
        start: [R, C]; what it holds off the mask does not count.
        params: at most ``iterations``, each one product [R, C] × [C, C]; three more go before and after.

    Returns:
        Ŵ [R, C], and how many iterations the slowest row took.
    """
    weight = start.masked_fill(~mask, 0)
    diagonal = hessian.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    slowest = 0
    for first in range(0, len(target), ROWS):
        part = slice(first, first + ROWS)
        slowest = max(slowest, _descend(weight[part], target[part], mask[part].to(weight), hessian, inverse, params))
    return weight, slowest


def _descend(
    weight: torch.Tensor,
    target: torch.Tensor,
    on: torch.Tensor,
    hessian: torch.Tensor,
    inverse: torch.Tensor,
    params: LsqParams,
) -> int:
    """Conjugate gradients for some rows, in place; ``on`` is 1 on the mask and 0 elsewhere, ``inverse`` holds 1/H_mm.

    Products with ``on`` are several times faster on the CPU than filling where a mask says so; ``weight`` itself stays +0 off the mask.
    """
    limit = (target @ hessian).mul_(on).square_() @ inverse * params.tolerance**2
    found = weight.clone()
    product = target - weight
    residual = product @ hessian
    before = torch.linalg.vecdot(residual, product)
    residual.mul_(on)
    direction = residual * inverse
    size = torch.linalg.vecdot(residual, direction)
    steps = 0
    while steps < params.iterations:
        torch.mm(direction, hessian, out=product)
        curvature = torch.linalg.vecdot(direction, product)
        going = (size > limit) & (curvature > 0)
        if not going.any():
            break
        steps += 1
        length = torch.where(going, size / curvature, 0)  # rows that are done stand still
        found.addcmul_(direction, length[:, None])
        residual.addcmul_(product.mul_(on), length[:, None], value=-1)
        torch.mul(residual, inverse, out=product)
        smaller = torch.linalg.vecdot(residual, product)
        direction.mul_(torch.where(going, smaller / size, 0)[:, None]).add_(product)
        size = torch.where(going, smaller, size)
    torch.sub(target, found, out=product)
    after = torch.linalg.vecdot(torch.mm(product, hessian, out=residual), product)
    worse = ~(after.abs() <= before)  # only by rounding: in exact arithmetic every step lowers E, and E is never negative
    found[worse] = weight[worse]
    weight.copy_(found)
    return steps


def admm(
    target: torch.Tensor,
    mask: torch.Tensor,
    hessian: torch.Tensor,
    start: torch.Tensor,
    choose: Callable[[torch.Tensor], torch.Tensor],
    params: LsqParams,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Look for a better mask by ADMM (2406.07831, Algorithm 1), refit it by ``solve``, and take it if its E is not larger than ``start``'s.

    Inputs are scaled so that H_mm = 1: what is compared is w²·H_mm. Memory: four matrices [R, C], their masks, and one [C, C].

    Args:
        target: W₀ [R, C].
        mask: the mask to improve [R, C] bool.
        hessian: H [C, C].
        start: the weights to beat [R, C], zero off the mask: ``solve``'s own on that mask, if the better of two masks is to be taken.
        choose: from scores [R, C] to the mask of the best, as many and compared as the variant says.
        params: at most ``mask_iterations`` of ADMM, each one product [R, C] × [C, C]; ``mask_penalty`` is ρ to begin with, in units of H's
            scaled diagonal (0.1 in the authors' code). The others are of ``solve`` on the new mask.

    Returns:
        The weights [R, C], their mask [R, C], and facts: ADMM's ``iterations``; ``swapped``, the share of weights whose place in the mask
        changed (0 if the old mask stays); ``gain``, by which share E fell.
    """
    sparse, support, steps = _alternate(target, mask, hessian, start, choose, params)
    refitted, _ = solve(target, support, hessian, sparse, params)
    old, new = (squared_error(target, weight, hessian) for weight in (start, refitted))
    if not new <= old:
        return start, mask, {"iterations": steps, "swapped": 0.0, "gain": 0.0}
    swapped = float((support != mask).count_nonzero()) / mask.numel()
    return refitted, support, {"iterations": steps, "swapped": swapped, "gain": 1 - new / old if old else 0.0}


def _alternate(
    target: torch.Tensor,
    mask: torch.Tensor,
    hessian: torch.Tensor,
    start: torch.Tensor,
    choose: Callable[[torch.Tensor], torch.Tensor],
    params: LsqParams,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """ADMM from ``start``: the last sparse iterate, its support, and the iterations.

    The dense iterate plus dual/ρ is all that is kept: on the support it is the sparse iterate, off it dual/ρ.

    ρ draws the dense iterate to the sparse one. It grows as long as the support moves, faster the more it moves, until it stands still;
    if at first it hardly moves, ρ was too large, and all begins again with a fifth of it. (The thresholds and factors are those of the
    authors' code, which restarts only where the support moved at all.)
    """
    diagonal = hessian.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1).sqrt()
    pull = (target @ hessian).div_(scale)
    point, support = start * scale, mask
    last, kept, steps, grown = mask, int(mask.count_nonzero()), 0, False
    inverses = _inverses(hessian, scale)
    rho = params.mask_penalty
    inverse = inverses(rho)
    while steps < params.mask_iterations and rho > LEAST_RHO and inverse is not None:
        for first in range(0, len(point), ROWS):
            part = slice(first, first + ROWS)
            own, off = point[part], point[part] * ~support[part]
            torch.addmm(off, torch.add(pull[part], own.sub_(off, alpha=2), alpha=rho), inverse, out=own)
        support = choose(point.square())
        steps += 1
        if steps % EVERY:
            continue
        changed, last, before = int((support != last).count_nonzero()) / max(kept, 1), support, rho
        if changed > 0.005:
            rho, grown = rho * (1.3 if changed > 0.1 else 1.2), True
        elif not grown:
            rho, last, support = rho / 5, mask, mask
            torch.mul(start, scale, out=point)
        elif changed > STILL:
            rho *= 1.1
        else:
            break
        point.mul_(torch.where(support, point.new_tensor(1.0), point.new_tensor(before / rho)))  # the dual stays what it is
        inverse = inverses(rho)
    return point.mul_(support).div_(scale), support, steps


def _inverses(hessian: torch.Tensor, scale: torch.Tensor) -> Callable[[float], torch.Tensor | None]:
    """From ρ to (S⁻¹ H S⁻¹ + ρ)⁻¹ [C, C], S⁻¹ H S⁻¹ being H with its diagonal scaled to 1; None if rounding forbids it. Each overwrites the last."""
    if len(scale) <= SPECTRAL:
        values, vectors = torch.linalg.eigh((hessian / scale / scale[:, None]).double())
        values, vectors = values.clamp_min(0).to(hessian.dtype), vectors.to(hessian.dtype)
        return lambda rho: (vectors / (values + rho)) @ vectors.T
    place = torch.empty_like(hessian)

    def inverse(rho: float) -> torch.Tensor | None:
        found = torch.div(hessian, scale, out=place).div_(scale[:, None]).mT  # LAPACK's order: nothing is copied
        found.diagonal().add_(rho)
        return torch.cholesky_inverse(found, out=found) if cholesky_in_place(found) else None

    return inverse
