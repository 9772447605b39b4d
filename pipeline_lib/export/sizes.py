"""Bytes and bits per weight of the formats, and the theoretical limit, as JSON from plain numbers."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Weights:
    """One matrix: the number of its weights, of those that are not zero, and the bits of one of these."""

    total: int
    stored: int
    bits: int


@dataclass(frozen=True)
class Bytes:
    """Size of a format: the pruned matrices' tensors, and all weight files with headers."""

    matrices: int
    files: int


def theoretical_bits(weights: Iterable[Weights]) -> float:
    """H(p) + (1 − p) · b per weight, with p each matrix's own share of zeros: no lossless code for
    independent zeros is shorter.
    """
    bits = total = 0.0
    for one in weights:
        total += one.total
        bits += one.total * entropy(one.stored / one.total) + one.stored * one.bits
    return bits / total if total else 0.0


def entropy(p: float) -> float:
    """Entropy of a coin, in bits."""
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)


def summary(weights: Iterable[Weights], formats: Mapping[str, Bytes]) -> dict[str, Any]:
    """The content of build/sizes for one model."""
    found = list(weights)
    total = sum(one.total for one in found)
    return {
        "weights": total,
        "zeros": total - sum(one.stored for one in found),
        "theoretical_bits": round(theoretical_bits(found), 6),
        "formats": {
            name: {
                "matrix_bytes": one.matrices,
                "file_bytes": one.files,
                "bits": round(8 * one.matrices / total, 6) if total else 0.0,
            }
            for name, one in formats.items()
        },
    }
