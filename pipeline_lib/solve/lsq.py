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

from pipeline_lib.core.products import affords
from pipeline_lib.solve.factor import cholesky_in_place, lost
from pipeline_lib.solve.settings import LsqParams

PASSES = 6  # cost limit of iterations on a matrix, in forward passes of the calibration tokens through it
# iterations of ADMM per value of ρ, which needs one inverse [C, C] (3 in the authors' code); also the
# lowest limit on iterations
EVERY = 6
# growth of ρ from one value to the next, with enough iterations (at most 1.3 in the authors' code)
GROWTH = 1.44
STEEPEST = 2.0  # largest growth of ρ with few iterations
LAST = 1.0  # the last ρ, in units of H's scaled diagonal: the support hardly changes any more
# rows solved at a time: they bound the memory, and suffice for a matrix product to run at full speed
ROWS = 1024
# most columns for which one eigendecomposition, and a product per ρ, are faster than a Cholesky
# factorisation and an inverse per ρ
SPECTRAL = 512
# if E of a row falls at most by this factor, subtracting the decreases gives E to four digits
TOLD = 32
STILL = 1e-3  # ADMM ends if the mask changes by at most this share of the kept weights


def affordable(params: LsqParams, tokens: int | None, columns: int) -> LsqParams:
    """The parameters, with each number of iterations limited to the cost of ``PASSES`` forward passes
    of the tokens behind H. The limit is at least ``EVERY`` iterations.

    An iteration on a matrix [R, C] costs as much as a forward pass of C tokens through it. So with
    few tokens, iterations do not cost much more than H itself, and weights are not fitted more closely
    than so few tokens justify. Without ``tokens`` there is no limit.
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
    rᵀM⁻¹r would be the decrease of E if inputs were uncorrelated. A row is finished when this is at
    most ``tolerance`` times its initial E. All rows are finished when their sums fulfil this. No row
    ends with a larger E. Where H_mm = 0, weights stay as in ``start``.

    Rows are processed in parts of ``ROWS``, and the sums are over one part. Besides inputs and output,
    this needs five matrices [ROWS, C].

    Args:
        target: W₀ [R, C], float32 or float64 like all others.
        mask: [R, C] bool, True = kept.
        hessian: H [C, C], positive semidefinite.
        start: [R, C]; values outside the mask are ignored.
        params: at most ``iterations``, each with one product [R, C] × [C, C]. One more product comes
            before them, and one after them if a row has lost nearly all of its E.

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
    """Improve some rows of ``weight`` in place by conjugate gradients, and return the number of steps
    and E of each row.

    ``on`` is 1 on the mask and 0 elsewhere; ``inverse`` holds 1/H_mm. On a CPU, multiplying by ``on``
    is several times faster than filling by a mask. ``weight`` itself stays +0 off the mask.
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
        length = torch.where(going, size / curvature, 0)  # finished rows do not move
        after = after - length * size
        found.addcmul_(direction, length[:, None])
        residual.addcmul_(product.mul_(on), length[:, None], value=-1)
        torch.mul(residual, inverse, out=product)
        smaller = torch.linalg.vecdot(residual, product)
        direction.mul_(torch.where(going, smaller / size, 0)[:, None]).add_(product)
        size = torch.where(going, smaller, 0)
    # E follows from its decreases, unless it is so small that their rounding matters
    if not (after >= before / TOLD).all():
        torch.sub(target, found, out=product)
        after = torch.linalg.vecdot(torch.mm(product, hessian, out=residual), product)
    # this happens only by rounding: in exact arithmetic every step lowers E, and E is never negative
    worse = ~(after.abs() <= before)
    torch.where(worse[:, None], weight, found, out=found)
    weight.copy_(found)
    return steps, torch.where(worse, before, after)


@dataclass(frozen=True)
class Search:
    """The search for a better mask."""

    # function from scores [R, C] to the mask of the highest, with the variant's number and groups
    choose: Callable[[torch.Tensor], torch.Tensor]
    independence: float  # as in ``Factorisation``
    error: torch.Tensor | None = None  # E [] of the start, if it is known


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

    Inputs are scaled so that H_mm = 1, so the scores are w²·H_mm. If the new mask is rejected, the old
    one is refitted. Memory: four matrices [R, C], their masks, and one and a half [C, C].

    Args:
        target: W₀ [R, C].
        mask: the mask to improve [R, C] bool.
        hessian: H [C, C].
        start: the weights to improve [R, C], zero outside the mask.
        params: at most ``mask_iterations`` of ADMM, each with one product [R, C] × [C, C] in
            ``mask_dtype``. The first ρ is ``mask_penalty`` times the search's ``independence``, in
            units of H's scaled diagonal. The other keys are for ``solve``.

    Returns:
        The weights [R, C], their mask [R, C], and facts. These are ADMM's ``iterations``; ``swapped``,
            the share of changed mask entries (0 if the old mask stays); ``gain``, the relative decrease
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
    """Run ADMM from ``start``, and return the last sparse iterate, its support, and the number of
    iterations.

    One matrix holds the sparse iterate on its support, and dual/ρ off it. The dual starts as the
    gradient of E off the mask, which is its value at a fixed point of ADMM. So ADMM stays at a start
    that is already good. With Algorithm 1's initial dual of 0, it would leave it.

    ρ pulls the dense iterate towards the sparse one. It grows in equal ratios to ``LAST``. While it is
    small, the support keeps changing. With correlated inputs it must start lower, because other
    weights can replace a removed one. (In the authors' code, ρ starts at 0.1, and its growth depends
    on how the support changes.)
    """
    diagonal = hessian.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1).sqrt()
    # not rounded: with correlated inputs, the inverse amplifies errors
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
        # the dual keeps its value: dual/ρ is rescaled
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
    """The values of ρ, in equal ratios from ``first`` to ``LAST``, and the number of iterations with
    each. With too few iterations for the whole range, they cover its middle, in ratios of
    ``STEEPEST``.
    """
    every = -(-iterations // max(1, round(iterations / EVERY)))
    count = min(-(-iterations // every), math.ceil(math.log(LAST / first) / math.log(GROWTH)) + 1)
    growth = min(LAST / first, STEEPEST ** (count - 1))
    first *= math.sqrt(LAST / first / growth)
    return [first * growth ** (step / max(count - 1, 1)) for step in range(count)], every


def _search_dtype(tensor: torch.Tensor, params: LsqParams) -> torch.dtype:
    wide = tensor.dtype == torch.float32
    return torch.bfloat16 if wide and affords(tensor.device, params.mask_dtype) else tensor.dtype


def _product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """The product of rows [n, C], rounded to the matrix's dtype, and a matrix [C, C]. On a GPU the sums
    have the dtype of ``rows``.
    """
    if matrix.dtype == rows.dtype:
        return rows @ matrix
    if rows.device.type == "cuda":
        return torch.mm(rows.to(matrix.dtype), matrix, out_dtype=rows.dtype)
    return rows.to(matrix.dtype) @ matrix


def _inverses(hessian: torch.Tensor, scale: torch.Tensor) -> Callable[[float], torch.Tensor | None]:
    """A function from ρ to (S⁻¹ H S⁻¹ + ρ)⁻¹ [C, C], where S⁻¹ H S⁻¹ is H with its diagonal scaled to 1.
    It returns None if the factorisation fails by rounding. A call may overwrite the previous result.
    """
    if len(scale) <= SPECTRAL:
        values, vectors = torch.linalg.eigh((hessian / scale / scale[:, None]).double())
        values, vectors = values.clamp_min(0).to(hessian.dtype), vectors.to(hessian.dtype)
        return lambda rho: (vectors / (values + rho)) @ vectors.T
    place = torch.empty_like(hessian)

    def inverse(rho: float) -> torch.Tensor | None:
        # in LAPACK's column order, so that nothing is copied
        found = torch.div(hessian, scale, out=place).div_(scale[:, None]).mT
        found.diagonal().add_(rho)
        return torch.cholesky_inverse(found, out=found) if cholesky_in_place(found) else None

    return inverse
