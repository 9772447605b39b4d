"""Encodings of one tensor in a bitmask file: unchanged, or a bit per weight and the stored values, or
a bit per weight and codes.

The smallest one is used. All are exact: a decoded tensor has the same bits. docs/artifacts.md
specifies the format.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.export.bits import pack, packed_bytes, stored, unpack
from pipeline_lib.export.groups import Groups
from pipeline_lib.export.tensorfile import DTYPES, NAMES, Blob, blob

# suffixes of the tensor's name
VERBATIM, MASK, VALUES, CODES, SCALE, ZERO_POINT = "", ".mask", ".values", ".codes", ".scale", ".zero_point"
PARTS = (VERBATIM, CODES, MASK, SCALE, VALUES, ZERO_POINT)  # in the order of their checksum


@dataclass(frozen=True)
class Plan:
    """The parts of one tensor, and the facts that a reader needs."""

    parts: Mapping[str, Blob]
    facts: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts.values())


def plan(tensor: torch.Tensor, groups: Groups | None = None) -> Plan:
    """The smallest encoding, computed without creating its parts."""
    kept = stored(tensor)
    count, total = int(kept.sum()), tensor.numel()
    facts: dict[str, Any] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
    mask = {MASK: Blob(torch.uint8, (packed_bytes(total, 1),))}
    ways = [Plan({VERBATIM: blob(tensor)}, {}), Plan(mask | {VALUES: Blob(tensor.dtype, (count,))}, facts)]
    if groups is not None:
        facts = facts | {"bits": groups.bits, "group": groups.size, "transposed": groups.transposed}
        around = {SCALE: blob(groups.scale)}
        if groups.zero_point is not None:
            around[ZERO_POINT] = Blob(torch.uint8, (packed_bytes(groups.zero_point.numel(), groups.bits),))
        # without a mask, codes represent only one of 0.0 and -0.0
        if not bool((kept & (tensor == 0)).any()):
            ways.append(Plan(around | {CODES: Blob(torch.uint8, (packed_bytes(total, groups.bits),))}, facts))
        ways.append(
            Plan(around | mask | {CODES: Blob(torch.uint8, (packed_bytes(count, groups.bits),))}, facts)
        )
    return min(ways, key=lambda way: way.bytes)


def encode(tensor: torch.Tensor, chosen: Plan, groups: Groups | None = None) -> dict[str, torch.Tensor]:
    """The planned parts of a tensor."""
    if VERBATIM in chosen.parts:
        return {VERBATIM: tensor}
    kept = stored(tensor)
    made = {MASK: pack(kept, 1)} if MASK in chosen.parts else {}
    if CODES not in chosen.parts or groups is None:
        return made | {VALUES: tensor.reshape(-1)[kept.reshape(-1)]}
    made[SCALE] = groups.scale
    if groups.zero_point is not None:
        made[ZERO_POINT] = pack(groups.zero_point, groups.bits)
    codes = groups.codes(tensor).reshape(-1)
    return made | {CODES: pack(codes[kept.reshape(-1)] if MASK in made else codes, groups.bits)}


class Facts(BaseModel):
    """The facts about one tensor that a reader needs, besides its parts."""

    model_config = ConfigDict(extra="forbid")

    sha256: str  # of the parts, in the order of ``PARTS``
    dtype: str | None = None  # None: the tensor is stored as it is, without further facts
    shape: list[NonNegativeInt] = []
    bits: int | None = Field(default=None, ge=2, le=8)
    group: int | None = Field(default=None, ge=1)
    transposed: bool = False

    @property
    def verbatim(self) -> bool:
        return self.dtype is None

    @property
    def blob(self) -> Blob:
        """Description of the decoded tensor."""
        return Blob(DTYPES[self.dtype or ""], tuple(self.shape))

    def check(self, parts: Mapping[str, Blob]) -> None:
        """Check that the parts have the sizes that these facts require. So a decoded tensor is at most
        some hundred times as large as the file.

        Raises:
            ValueError: the sizes differ.
        """
        if self.verbatim:
            _fits(parts.keys() == {VERBATIM})
            return
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not known")
        total = math.prod(self.shape)
        packed = {part: blob for part, blob in parts.items() if part in (MASK, CODES, ZERO_POINT)}
        _fits(MASK in parts or CODES in parts)
        _fits(all(blob.dtype == torch.uint8 and len(blob.shape) == 1 for blob in packed.values()))
        _fits(MASK not in parts or parts[MASK].bytes == packed_bytes(total, 1))
        if CODES not in parts:
            _fits(
                parts.keys() == {MASK, VALUES}
                and parts[VALUES].dtype == DTYPES[self.dtype]
                and len(parts[VALUES].shape) == 1
            )
            return
        if self.bits is None or self.group is None or len(self.shape) not in (2, 3):
            raise ValueError("bits, group and two or three dimensions belong to codes")
        *experts, rows, columns = self.shape
        rows, columns = (columns, rows) if self.transposed else (rows, columns)
        _fits({CODES, SCALE} <= parts.keys() <= {CODES, SCALE, MASK, ZERO_POINT})
        _fits(
            parts[SCALE].shape == (*experts, rows, -(-columns // self.group))
            and parts[SCALE].dtype == DTYPES[self.dtype]
        )
        _fits(parts[SCALE].dtype.is_floating_point)
        _fits(
            ZERO_POINT not in parts
            or parts[ZERO_POINT].bytes == packed_bytes(math.prod(parts[SCALE].shape), self.bits)
        )
        _fits(MASK in parts or parts[CODES].bytes == packed_bytes(total, self.bits))


class Described(BaseModel):
    """The tensors in the header of a bitmask file."""

    model_config = ConfigDict(extra="forbid")

    format: str
    version: int
    tensors: dict[str, Facts]


def decode(parts: Mapping[str, torch.Tensor], facts: Facts) -> torch.Tensor:
    """The tensor, bit for bit.

    Args:
        facts: facts that passed ``Facts.check``.

    Raises:
        SparselineError: the mask's number of ones differs from the number of values.
    """
    if facts.verbatim:
        return parts[VERBATIM]
    shape, dtype = facts.blob.shape, facts.blob.dtype
    total = math.prod(shape)
    kept = (
        unpack(parts[MASK], 1, total).view(torch.bool)
        if MASK in parts
        else torch.ones(total, dtype=torch.bool)
    )
    count = int(kept.sum())
    if CODES not in parts:
        _check(parts[VALUES].numel() == count)
        tensor = torch.zeros(total, dtype=dtype)
        tensor.masked_scatter_(kept, parts[VALUES])
        return tensor.reshape(shape)
    assert facts.bits is not None and facts.group is not None  # checked
    bits, scale = facts.bits, parts[SCALE]
    _check(parts[CODES].numel() == packed_bytes(count, bits))
    zero_point = (
        unpack(parts[ZERO_POINT], bits, scale.numel()).reshape(scale.shape) if ZERO_POINT in parts else None
    )
    groups = Groups(bits, facts.group, scale, zero_point, facts.transposed)
    codes = torch.zeros(total, dtype=torch.uint8)
    codes.masked_scatter_(kept, unpack(parts[CODES], bits, count))
    tensor = groups.weights(codes.reshape(shape))
    if MASK in parts:
        kept = kept.reshape(shape)
        # kept zeros are -0.0, because 0.0 is not stored
        tensor[groups.at_zero(codes.reshape(shape)) & kept] = -0.0
        tensor[~kept] = 0.0
    return tensor


def _fits(fits: bool) -> None:
    if not fits:
        raise ValueError("parts and facts do not fit each other")


def _check(fits: bool) -> None:
    if not fits:
        raise SparselineError(
            "a bitmask file's mask and values do not fit each other: its writer did not conform to"
            " docs/artifacts.md."
        )
