"""GGUF's blocks: 32 weights of a row after their float16 scale. Codes are packed to bytes; nothing is
rounded again.

Layouts: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

from typing import Literal

import torch

from pipeline_lib.export.groups import Groups
from pipeline_lib.solve.settings import BLOCK

Kind = Literal["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"]
BYTES: dict[Kind, tuple[int, int]] = {  # weights of a block, and its bytes
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (BLOCK, 2 + BLOCK // 2),  # scale; w = scale·(code − 8)
    "Q4_1": (BLOCK, 4 + BLOCK // 2),  # scale, least weight; w = scale·code + least
    "Q8_0": (BLOCK, 2 + BLOCK),  # scale; w = scale·code, −128 … 127
}
DTYPES: dict[Kind, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def size(shape: tuple[int, ...], kind: Kind) -> tuple[int, ...]:
    """Shape of a tensor's bytes, with the bytes of a row in the place of its columns."""
    weights, taken = BYTES[kind]
    return (*shape[:-1], shape[-1] // weights * taken)


def fitting(groups: Groups, columns: int) -> Kind | None:
    """The smallest block type that represents every weight of these groups exactly, or None."""
    whole = groups.size % BLOCK == 0 or groups.size >= columns
    if columns % BLOCK or not whole or not _halves(groups.scale.float()):
        return None
    if groups.zero_point is None:
        return "Q4_0" if groups.bits <= 4 else "Q8_0"
    if groups.bits <= 4 and _halves(groups.scale.float() * groups.zero_point):
        return "Q4_1"
    return "Q8_0" if groups.bits <= 7 else None


def _halves(values: torch.Tensor) -> bool:
    """Whether float16 holds all of these float32 numbers."""
    return torch.equal(values.half().float(), values)


def pack(codes: torch.Tensor, groups: Groups, kind: Kind) -> torch.Tensor:
    """Bytes [..., R, columns / 32 · bytes of a block] of codes in the parameter's orientation, in the
    type given by ``fitting``.
    """
    logical = groups.logical(codes)
    *rows, columns = logical.shape
    scale = _of_blocks(groups.scale.float(), groups.size, columns)
    zero = torch.full_like(scale, 2 ** (groups.bits - 1))
    if groups.zero_point is not None:
        zero = _of_blocks(groups.zero_point.float(), groups.size, columns)
    parts = [scale.half().view(torch.uint8)]
    steps = logical.reshape(*rows, -1, BLOCK).to(torch.int16)
    if kind != "Q4_1":
        steps = steps - zero.to(torch.int16)
    if kind == "Q8_0":
        parts.append(steps.to(torch.int8).view(torch.uint8))
    else:
        if kind == "Q4_1":
            parts.append((scale * -zero).half().view(torch.uint8))
        half = (steps if kind == "Q4_1" else steps + 8).to(torch.uint8)
        parts.append(half[..., : BLOCK // 2] | half[..., BLOCK // 2 :] << 4)
    return torch.cat(parts, dim=-1).flatten(-2)


def _of_blocks(values: torch.Tensor, size: int, columns: int) -> torch.Tensor:
    """Values of groups [..., R, groups] for every block [..., R, columns / 32, 1]."""
    return values[..., torch.arange(0, columns, BLOCK) // size, None]


def plain(tensor: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Bytes of a tensor without blocks, rounded to the type's dtype if that is narrower.

    Raises:
        ValueError: a weight is beyond the dtype's range.
    """
    stored = tensor.to(DTYPES[kind]).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(f"weights are beyond the range of {kind}")
    return stored.view(torch.uint8)
