"""Layer-wise least squares by ALPS (2406.07831): the best weights on a mask, and a better mask.

Both minimise E(Ŵ) = tr((Ŵ − W₀) H (Ŵ − W₀)ᵀ), which is a sum over rows. The OBS sweep is greedy and
changes only later columns, so its weights are not optimal even on its own mask. Shape letters:
``R`` outputs, ``C`` inputs. The columns of always-zero inputs should be 0 in W₀, as after the
sweep: they contribute only their damping to E, and must not compete for the mask.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline_lib.solve.factor import cholesky_in_place, lost
from pipeline_lib.solve.settings import LsqParams

PASSES = 6  # what iterations on a matrix may cost, in forward passes of the calibration tokens through it
# iterations of ADMM with the same ρ, each an inverse [C, C]; also the least that are allowed (3 in
# the authors' code)
EVERY = 6
# of ρ from one inverse to the next, if there are enough of them (at most 1.3 in the authors' code)
GROWTH = 1.44
STEEPEST = 2.0  # the same where there are few
LAST = 1.0  # ρ at the end, in units of H's scaled diagonal: supports hardly move any more
ROWS = 1024  # solved at a time: bounds the memory, and is enough for a matrix product to run at full speed
# columns up to which one eigendecomposition and a product per ρ are faster than a Cholesky
# factorisation and an inverse
SPECTRAL = 512
# a row's E may have fallen to this part of itself, and is still told to four digits by what it lost
TOLD = 32
STILL = 1e-3  # share of the kept weights: a support of which no more is exchanged stands still


def affordable(params: LsqParams, tokens: int | None, columns: int) -> LsqParams:
    """The parameters with a limited number of iterations of either kind: at most ``PASSES`` forward
    passes of the tokens behind H, at least ``EVERY``.

    An iteration on a matrix [R, C] costs as much as a forward pass of C tokens through it. So with
    few tokens, neither costs much more than H itself, and weights are not fitted more closely than
    so few tokens justify. Without ``tokens`` there is no limit.
    """
    if tokens is None:
        return params
    most = max(EVERY, PASSES * tokens // columns)
    return params.model_copy(
        update={
            "iterations": min(params.iterations, most),
            "mask_iterations": min(params.mask_iterations, most),
        }
    )


def solve(
    target: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor, start: torch.Tensor, params: LsqParams
) -> tuple[torch.Tensor, int, torch.Tensor]:
    """The weights that are zero outside the mask and minimise E, by preconditioned conjugate gradients
    (2406.07831, Section 3.3).

    All rows share the product with H but have their own step lengths. The preconditioner is M =
    diag(H), so the scales of inputs do not matter. With r the residual (W₀ − Ŵ) H on the mask,
    rᵀM⁻¹r is the decrease of E if inputs were uncorrelated. A row is finished when this is at most
    ``tolerance`` times its initial E; all rows are when it holds for their sums. No row ends with a
    larger E. Where H_mm = 0, weights stay as in ``start``.

    Rows are processed in parts of ``ROWS``, whose sums are compared. Besides inputs and output,
    this needs five matrices [ROWS, C].

    Args:
        target: W₀ [R, C], float32 or float64 like all others.
        mask: [R, C] bool, True = kept.
        hessian: H [C, C], positive semidefinite.
        start: [R, C]; values outside the mask are ignored.
        params: at most ``iterations``, each one product [R, C] × [C, C]; one more before them, and
            one after them if a row has lost nearly all of its E.

    Returns:
        Ŵ [R, C]; the number of iterations of the slowest row; and E(Ŵ) [] float64.
    """
    weight = start.masked_fill(~mask, 0)
    diagonal = hessian.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    slowest, error = 0, torch.zeros((), dtype=torch.float64, device=weight.device)
    for first in range(0, len(target), ROWS):
        part = slice(first, first + ROWS)
        steps, errors = _descend(weight[part], target[part], mask[part].to(weight), hessian, inverse, params)
        slowest, error = max(slowest, steps), error + errors.sum(dtype=torch.float64)
    return weight, slowest, error


def _descend(
    weight: torch.Tensor,
    target: torch.Tensor,
    on: torch.Tensor,
    hessian: torch.Tensor,
    inverse: torch.Tensor,
    params: LsqParams,
) -> tuple[int, torch.Tensor]:
    """Conjugate gradients for some rows, in place; ``on`` is 1 on the mask and 0 elsewhere,
    ``inverse`` holds 1/H_mm. The steps, and E of each row.

    Products with ``on`` are several times faster on the CPU than filling where a mask says so;
    ``weight`` itself stays +0 off the mask.
    """
    found = weight.clone()
    product = target - weight
    residual = product @ hessian
    before = torch.linalg.vecdot(residual, product)
    limit = before.abs() * params.tolerance
    residual.mul_(on)
    direction = residual * inverse
    size = torch.linalg.vecdot(residual, direction)
    steps, after = 0, before
    while steps < params.iterations:
        if size.sum() <= limit.sum():
            break
        going = size > limit
        steps += 1
        torch.mm(direction, hessian, out=product)
        curvature = torch.linalg.vecdot(direction, product)
        going &= curvature > 0
        length = torch.where(going, size / curvature, 0)  # rows that are done stand still
        after = after - length * size
        found.addcmul_(direction, length[:, None])
        residual.addcmul_(product.mul_(on), length[:, None], value=-1)
        torch.mul(residual, inverse, out=product)
        smaller = torch.linalg.vecdot(residual, product)
        direction.mul_(torch.where(going, smaller / size, 0)[:, None]).add_(product)
        size = torch.where(going, smaller, 0)
    # what a row lost by the steps tells its E, unless rounding could hide it
    if not (after >= before / TOLD).all():
        torch.sub(target, found, out=product)
        after = torch.linalg.vecdot(torch.mm(product, hessian, out=residual), product)
    # only by rounding: in exact arithmetic every step lowers E, and E is never negative
    worse = ~(after.abs() <= before)
    torch.where(worse[:, None], weight, found, out=found)
    weight.copy_(found)
    return steps, torch.where(worse, before, after)


@dataclass(frozen=True)
class Search:
    """The search for a better mask."""

    # from scores [R, C] to the mask of the best, as many and compared as the variant says
    choose: Callable[[torch.Tensor], torch.Tensor]
    # 0 … 1: the mean of 1/(H_mm [H⁻¹]_mm), the share of an input that the others do not tell
    independence: float
    error: torch.Tensor | None = None  # E [] of the start, where it is known


def admm(
    target: torch.Tensor,
    mask: torch.Tensor,
    hessian: torch.Tensor,
    start: torch.Tensor,
    search: Search,
    params: LsqParams,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Search for a better mask by ADMM (2406.07831, Algorithm 1), refit it by ``solve``, and accept it
    if its E is not larger than ``start``'s.

    Inputs are scaled so that H_mm = 1: the scores are w²·H_mm. If the new mask is rejected, the old
    one is refitted. Memory: four matrices [R, C], their masks, and one and a half [C, C].

    Args:
        target: W₀ [R, C].
        mask: the mask to improve [R, C] bool.
        hessian: H [C, C].
        start: the weights to improve [R, C], zero outside the mask.
        params: at most ``mask_iterations`` of ADMM, each one product [R, C] × [C, C] in
            ``mask_dtype``; the first ρ is ``mask_penalty`` times the search's ``independence``, in
            units of H's scaled diagonal. The other keys are for ``solve``.

    Returns:
        The weights [R, C], their mask [R, C], and facts: ADMM's ``iterations``; ``swapped``, the
            share of changed mask entries (0 if the old mask stays); ``gain``, the relative decrease
            of E; ``refit_iterations`` of ``solve``; and ``error``, E itself [] float64.
    """
    before = lost(target, start, hessian) if search.error is None else search.error
    sparse, support, taken = _alternate(target, mask, hessian, start, search, params)
    refitted, steps, error = solve(target, support, hessian, sparse, params)
    swapped = (support != mask).count_nonzero()
    # one transfer from the device
    old, new, changed = torch.stack([before, error, swapped.double()]).tolist()
    if not new <= old:
        support, changed = mask, 0
        refitted, steps, error = solve(target, mask, hessian, start, params)
        new = float(error)
    gain = 1 - new / old if old else 0.0
    facts = {
        "iterations": taken,
        "swapped": changed / mask.numel(),
        "refit_iterations": steps,
        "error": error,
        "gain": gain,
    }
    return refitted, support, facts


def _alternate(
    target: torch.Tensor,
    mask: torch.Tensor,
    hessian: torch.Tensor,
    start: torch.Tensor,
    search: Search,
    params: LsqParams,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """ADMM from ``start``: the last sparse iterate, its support, and the iterations.

    One matrix holds the sparse iterate on its support, and off it dual/ρ. The dual starts as the
    gradient of E off the mask, which is what it is where ADMM stands still: a start that is good is
    not left for nothing, as it is with the dual of 0 of Algorithm 1.

    ρ draws the dense iterate to the sparse one. It grows in equal ratios to ``LAST``. As long as it
    is small the support changes all the time; where inputs are correlated it must start lower,
    since the others can make up for a weight that goes. (The authors' code starts from 0.1 and lets
    ρ grow by what the support does.)
    """
    diagonal = hessian.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1).sqrt()
    # not rounded: where inputs are correlated, the inverse makes much of what it lacks
    pull = (target @ hessian).div_(scale)
    point = _product(target - start, hessian.to(_search_dtype(hessian, params))).to(pull.dtype).div_(scale)
    inverses = _inverses(hessian, scale)
    last = support = mask
    steps, still = 0, STILL * mask.count_nonzero()
    penalties, every = _penalties(
        min(params.mask_penalty * search.independence, LAST), params.mask_iterations
    )
    rho = penalties[0]
    torch.where(mask, start * scale, point.div_(rho), out=point)
    for penalty in penalties:
        # the dual stays what it is
        point.mul_(torch.where(support, point.new_tensor(1.0), point.new_tensor(rho / penalty)))
        rho = penalty
        if (inverse := inverses(rho)) is None:
            break
        inverse = inverse.to(_search_dtype(inverse, params))
        for _ in range(min(every, params.mask_iterations - steps)):
            for begin in range(0, len(point), ROWS):
                part = slice(begin, begin + ROWS)
                own, off = point[part], point[part] * ~support[part]
                torch.add(pull[part], own.sub_(off, alpha=2), alpha=rho, out=own)
                torch.add(off, _product(own, inverse), out=own)
            support = search.choose(point.square())
            steps += 1
        if (support != last).count_nonzero() <= still:
            break
        last = support
    return point.mul_(support).div_(scale), support, steps


def _penalties(first: float, iterations: int) -> tuple[list[float], int]:
    """ρ in equal ratios from ``first`` to ``LAST``, and for how many of the iterations each. Where
    there are too few of them for the whole range, the middle of it is taken, so far as ``STEEPEST``
    reaches.
    """
    every = -(-iterations // max(1, round(iterations / EVERY)))
    count = min(-(-iterations // every), math.ceil(math.log(LAST / first) / math.log(GROWTH)) + 1)
    growth = min(LAST / first, STEEPEST ** (count - 1))
    first *= math.sqrt(LAST / first / growth)
    return [first * growth ** (step / max(count - 1, 1)) for step in range(count)], every


def _search_dtype(tensor: torch.Tensor, params: LsqParams) -> torch.dtype:
    return (
        torch.bfloat16 if params.mask_dtype == "bfloat16" and tensor.dtype == torch.float32 else tensor.dtype
    )


def _product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """rows [n, C] times a matrix [C, C], of numbers rounded to the matrix's dtype. On a GPU the
    sums stay float32.
    """
    if matrix.dtype == rows.dtype:
        return rows @ matrix
    if rows.device.type == "cuda":
        return torch.mm(rows.to(matrix.dtype), matrix, out_dtype=rows.dtype)
    return rows.to(matrix.dtype) @ matrix


def _inverses(hessian: torch.Tensor, scale: torch.Tensor) -> Callable[[float], torch.Tensor | None]:
    """From ρ to (S⁻¹ H S⁻¹ + ρ)⁻¹ [C, C], S⁻¹ H S⁻¹ being H with its diagonal scaled to 1; None if
    rounding forbids it. Each overwrites the last.
    """
    if len(scale) <= SPECTRAL:
        values, vectors = torch.linalg.eigh((hessian / scale / scale[:, None]).double())
        values, vectors = values.clamp_min(0).to(hessian.dtype), vectors.to(hessian.dtype)
        return lambda rho: (vectors / (values + rho)) @ vectors.T
    place = torch.empty_like(hessian)

    def inverse(rho: float) -> torch.Tensor | None:
        # LAPACK's order: nothing is copied
        found = torch.div(hessian, scale, out=place).div_(scale[:, None]).mT
        found.diagonal().add_(rho)
        return torch.cholesky_inverse(found, out=found) if cholesky_in_place(found) else None

    return inverse
