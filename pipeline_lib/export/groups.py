"""Quantised weights: w = scale · (code − zero point), with one scale per group of consecutive inputs
of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import torch

from pipeline_lib.core import artifacts
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Groups:
    """The quantisation of the [R, C] weights of one stored parameter; codes are 0 … 2^bits − 1,
    symmetric ones have 2^(bits − 1) as zero point.

    A parameter with several experts has one more dimension in front, and so have its scales.
    """

    bits: int
    size: int  # inputs with one scale; the last group of a row may be shorter
    scale: torch.Tensor  # [..., R, groups] in the parameter's dtype
    zero_point: torch.Tensor | None  # [..., R, groups] uint8; None: symmetric
    transposed: bool  # the parameter is stored [C, R]

    def logical(self, tensor: torch.Tensor) -> torch.Tensor:
        """[..., R, C] as a view of a tensor in the parameter's orientation."""
        return tensor.mT if self.transposed else tensor

    def spans(self, columns: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """For each group: its inputs, its scales [R, 1] in float32 (in which codes are computed),
        and its zero points [R, 1].
        """
        scale = self.scale.float()
        middle = torch.full(scale.shape, 2 ** (self.bits - 1)) if self.zero_point is None else self.zero_point
        for group in range(scale.shape[-1]):
            inputs = slice(group * self.size, min((group + 1) * self.size, columns))
            yield inputs, scale[..., group : group + 1], middle[..., group : group + 1].to(scale.dtype)

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """The codes (uint8) of weights, both in the parameter's orientation.

        Raises:
            ValueError: the weights do not correspond to codes.
        """
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        target, source = self.logical(codes), self.logical(weight)
        for inputs, scale, zero in self.spans(source.shape[-1]):
            steps = torch.where(scale == 0, 0, source[..., inputs].to(scale.dtype) / scale)
            target[..., inputs] = (steps.round() + zero).clamp(0, 2**self.bits - 1).to(torch.uint8)
        if not torch.equal(self.weights(codes), weight):
            raise ValueError("weights are not their scales times whole codes")
        return codes

    def weights(self, codes: torch.Tensor) -> torch.Tensor:
        """The weights of these codes: products in float32, rounded once to the parameter's dtype.
        Codes equal to the zero point give 0.0.
        """
        weight = torch.empty(codes.shape, dtype=self.scale.dtype)
        target, source = self.logical(weight), self.logical(codes)
        for inputs, scale, zero in self.spans(source.shape[-1]):
            steps = source[..., inputs].to(scale.dtype) - zero
            target[..., inputs] = torch.where(steps == 0, 0, scale * steps).to(weight.dtype)
        return weight

    def at_zero(self, codes: torch.Tensor) -> torch.Tensor:
        """The mask of codes that equal their zero point."""
        found = torch.empty(codes.shape, dtype=torch.bool)
        target, source = self.logical(found), self.logical(codes)
        for inputs, _, zero in self.spans(source.shape[-1]):
            target[..., inputs] = source[..., inputs] == zero
        return found


class Quantisation:
    """The content of ``quantization/`` beside a pruned checkpoint, read one block at a time; empty for
    a variant without quantisation.
    """

    def __init__(self, directory: Path, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._directory = directory
        self._block = lru_cache(maxsize=1)(self._read)

    def __bool__(self) -> bool:
        return self._directory.is_dir()

    def of(self, name: str) -> Groups | None:
        """The groups of a stored parameter, if it is completely quantised."""
        place = self._checkpoint.place(name) if self else None
        return None if place is None else self._block(place[0]).get(place[1])

    def _read(self, block: int) -> dict[str, Groups]:
        path = artifacts.block_file(self._directory, block)
        if not path.exists():
            return {}
        tensors, facts = artifacts.read_tensors(path)
        by_parameter: dict[str, list[Matrix]] = {}
        every = self._checkpoint.architecture.layouts[block].matrices
        for matrix in sorted(every, key=lambda matrix: (matrix.expert or 0, matrix.rows or (0, 0))):
            by_parameter.setdefault(matrix.parameter, []).append(matrix)
        found = {}
        for parameter, matrices in by_parameter.items():
            if any(f"{matrix.label}.scale" not in tensors for matrix in matrices):
                continue
            columns = self._checkpoint.matrix_shape(block, matrices[0])[1]
            size = columns if facts["group"] in (None, "row") else int(facts["group"])
            scale = _joined(matrices, tensors, "scale")
            zero = None if facts["symmetric"] else _joined(matrices, tensors, "zero_point")
            kept = scale.to(self._checkpoint.dtype)
            if not torch.equal(kept.to(scale.dtype), scale) or (
                zero is not None and not torch.equal(zero.to(torch.uint8).to(zero.dtype), zero)
            ):
                raise SparselineError(
                    f"{path}: scales or zero points of {parameter} are no {self._checkpoint.dtype} numbers;"
                    " run `dvc repro` to make it again."
                )
            found[parameter] = Groups(
                int(facts["bits"]),
                size,
                kept,
                None if zero is None else zero.to(torch.uint8),
                transposed=matrices[0].transposed,
            )
        return found


def _joined(matrices: Sequence[Matrix], tensors: Mapping[str, torch.Tensor], part: str) -> torch.Tensor:
    """Scales or zero points of all rows of a parameter [R, groups], or of all its experts [E, R,
    groups]. The matrices are in order.
    """
    by_expert = groupby(matrices, key=lambda matrix: matrix.expert)
    found = [
        (expert, torch.cat([tensors[f"{matrix.label}.{part}"] for matrix in own]))
        for expert, own in by_expert
    ]
    return found[0][1] if found[0][0] is None else torch.stack([own for _, own in found])
