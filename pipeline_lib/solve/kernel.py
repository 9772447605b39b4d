"""Elimination of a leaf as one GPU kernel in Triton. Each program handles a tile of outputs, and holds
their columns in registers.

Only ``eliminate.py`` imports this, if a GPU and Triton are available. Tests run it on a CPU with
Triton's interpreter.
"""

from typing import Any

import torch
import triton
import triton.language as tl

TILE = 32  # outputs of a program
# 1.5·2²³: adding and subtracting it rounds a float32 below 2²² to the nearest integer, ties to even
TO_WHOLE = tl.constexpr(12582912.0)


@triton.jit  # type: ignore[untyped-decorator]
def _eliminate(  # type: ignore[no-untyped-def]
    columns, kept, errors, upper, factor, scale, zero, group, count, rows, pitch, groups, low, high,
    N: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, B)[:, None]
    r = tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
    inside = (c < count) & (r < rows)
    x = tl.load(columns + c * rows + r, mask=inside, other=0.0)
    k = tl.load(kept + c * rows + r, mask=inside, other=0)
    e = tl.zeros((B, TILE), dtype=tl.float32)
    weights = tl.load(factor + c, mask=c < count, other=0.0)
    for j in range(count):
        if M > 0:  # noqa: SIM102  a constant: without groups, nothing of this is compiled
            if j % M == 0:
                scores = x * x * weights
                better = tl.zeros((B, TILE), dtype=tl.int32)
                for i in range(j, j + M):
                    one = tl.sum(tl.where(c == i, scores, 0.0), 0)[None, :]
                    better += (((one >= scores) & (i < c)) | ((one > scores) & (i > c))).to(tl.int32)
                best = ((better < N) & (scores == scores)).to(tl.int8)
                k = tl.where((c >= j) & (c < j + M), best, k)
        own = c == j
        w = tl.sum(tl.where(own, x, 0.0), 0)[None, :]
        stays = tl.sum(tl.where(own, k, 0).to(tl.int32), 0)[None, :] > 0
        left = tl.where(stays, w, 0.0)
        if ROUND:
            of = tl.load(group + j)
            step = tl.load(scale + r * groups + of, mask=r < rows, other=1.0)
            origin = tl.load(zero + r * groups + of, mask=r < rows, other=0.0)
            steps = tl.minimum(tl.maximum(tl.div_rn(left, step), -4096.0), 4096.0)
            whole = (steps + TO_WHOLE) - TO_WHOLE
            left = (tl.minimum(tl.maximum(whole + origin, low), high) - origin + 0.0) * step
        error = (w - left) / tl.load(upper + j * pitch + j)
        onward = tl.load(upper + j * pitch + c, mask=(c > j) & (c < count), other=0.0)
        x = tl.where(own, left, x - onward * error)
        e = tl.where(own, error, e)
    tl.store(columns + c * rows + r, x, mask=inside)
    tl.store(errors + c * rows + r, e, mask=inside)
    tl.store(kept + c * rows + r, k, mask=inside)


def eliminate(
    columns: torch.Tensor,
    kept: torch.Tensor,
    errors: torch.Tensor,
    upper: torch.Tensor,
    chosen: tuple[int, int, torch.Tensor] | None,
    grid: tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int]] | None,
) -> None:
    """Eliminate a leaf column by column in one launch, like ``_Block._loop`` in eliminate.py.

    Args:
        columns: [B, R] float32, contiguous, changed in place.
        kept: [B, R] bool, changed in place if the mask is chosen here.
        errors: [B, R], overwritten.
        upper: U [B, B], rows contiguous.
        chosen: N, M and the factor [B] of w² in the scores; None: ``kept`` is given.
        grid: scales and zero points [R, G], the group of each column [B] int32, and the smallest
            and the largest q; None: nothing is rounded.
    """
    count, rows = columns.shape
    n, m, factor = chosen or (0, 0, columns)
    scale, zero, group, (low, high) = grid or (columns, columns, columns, (0, 0))
    width = max(16, triton.next_power_of_2(count))
    sizes: dict[str, Any] = {"N": n, "M": m, "ROUND": grid is not None, "B": width, "TILE": TILE}
    _eliminate[(triton.cdiv(rows, TILE),)](
        columns, kept.view(torch.int8), errors, upper, factor, scale, zero, group,
        count, rows, upper.stride(0), scale.shape[1], float(low), float(high), **sizes,
    )  # fmt: skip
