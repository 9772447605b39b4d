"""What the prune stage leaves, made in a moment: random masks, and round-to-nearest codes where asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline_lib.core import artifacts
from pipeline_lib.masks.bits import pack
from pipeline_lib.models.checkpoint import Checkpoint, ShardWriter
from pipeline_lib.solve.grid import Scheme
from pipeline_lib.solve.settings import Stored


@dataclass(frozen=True)
class Rounding:
    """Settings of a quantised variant; ``group`` None: one scale per row."""

    bits: int = 4
    group: int | None = 16
    symmetric: bool = True
    stored: Stored = "checkpoint"


def random_mask(rows: int, columns: int, pattern: str, random: torch.Generator) -> torch.Tensor:
    """Half of the weights: anywhere, or N of every M inputs; or all ("full")."""
    if pattern == "full":
        return torch.ones(rows, columns, dtype=torch.bool)
    draws = torch.rand(rows, columns, generator=random)
    if pattern == "unstructured":
        return draws > draws.median()
    kept, of = map(int, pattern.split(":"))
    ranks = draws.reshape(rows, -1, of).argsort(-1).argsort(-1)
    return (ranks < kept).reshape(rows, columns)


def nearest(weight: torch.Tensor, how: Rounding) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weights [R, C] rounded to codes and back in their dtype; scale and zero point [R, groups]."""
    wide, columns = weight.float(), weight.shape[1]
    size = how.group or columns
    out, scales, zeros = torch.empty_like(wide), [], []
    for start in range(0, columns, size):
        part = wide[:, start : start + size]
        if how.symmetric:
            scale = part.abs().amax(1, keepdim=True) / (2 ** (how.bits - 1) - 1)
        else:
            scale = (part.amax(1, keepdim=True).clamp(min=0) - part.amin(1, keepdim=True).clamp(max=0)) / (
                2**how.bits - 1
            )
        scale = scale.clamp(min=1e-6).to(weight.dtype).float()
        if how.stored == "gguf":
            scale = Scheme(how.bits, how.group, how.symmetric, weight.dtype, how.stored).exact(scale)
        if how.symmetric:
            zero, low = torch.zeros_like(scale), -(2 ** (how.bits - 1))
        else:
            zero, low = (
                (-part.amin(1, keepdim=True).clamp(max=0) / scale).round().clamp(0, 2**how.bits - 1),
                0,
            )
        codes = ((part / scale).round() + zero).clamp(low, low + 2**how.bits - 1)
        out[:, start : start + size] = scale * (codes - zero)
        scales.append(scale)
        zeros.append(zero)
    found = {"scale": torch.cat(scales, 1)} | ({} if how.symmetric else {"zero_point": torch.cat(zeros, 1)})
    return out.to(weight.dtype), found


def card(form: str, sizes: Mapping[str, Any]) -> str:
    """A stand-in for the model card: prints the format, and the sizes of its files."""
    return f"{form} {sizes['formats'][form]['file_bytes']}\n"


def make_pruned(
    directory: Path, source: Checkpoint, pattern: str = "unstructured", rounding: Rounding | None = None
) -> Path:
    """``directory`` (returned) with checkpoint/, masks/ and, of a quantised variant, quantization/."""
    random = torch.Generator().manual_seed(0)
    writer = ShardWriter(source, directory / "checkpoint")
    for block in range(source.architecture.depth):
        tensors = {name: tensor.clone() for name, tensor in source.block(block).items()}
        masks = {
            m.parameter: torch.empty(tensors[m.parameter].shape, dtype=torch.bool)
            for m in source.architecture.layouts[0].matrices
        }
        groups: dict[str, torch.Tensor] = {}
        for matrix in source.architecture.layouts[0].matrices:
            weight = matrix.view(tensors[matrix.parameter])
            mask = random_mask(*weight.shape, pattern, random)
            matrix.view(masks[matrix.parameter]).copy_(mask)
            weight[~mask] = 0
            if rounding is not None:
                rounded, found = nearest(weight, rounding)
                weight.copy_(rounded)
                weight[~mask] = 0
                groups |= {f"{matrix.label}.{key}": value for key, value in found.items()}
        writer.write(block, tensors)
        prefix = source.block_prefix(block)
        shapes = {prefix + name: list(mask.shape) for name, mask in masks.items()}
        bits = {prefix + name: pack(mask) for name, mask in masks.items()}
        artifacts.write_tensors(artifacts.block_file(directory / "masks", block), bits, {"shapes": shapes})
        if rounding is not None:
            facts = {"bits": rounding.bits, "group": rounding.group, "symmetric": rounding.symmetric}
            artifacts.write_tensors(artifacts.block_file(directory / "quantization", block), groups, facts)
    writer.finish()
    return directory
