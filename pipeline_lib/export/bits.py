"""Bit patterns: the stored weights, and codes of a few bits packed without gaps."""

import numpy as np
import torch

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# codes expanded to bits at a time; a multiple of 8, so that every chunk ends with a whole byte
_CHUNK = 2**20


def words(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, so that −0.0 differs from 0.0 and NaN equals itself."""
    return tensor.contiguous().view(_WORDS[tensor.element_size()])


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """The mask of values whose bit pattern is not all zeros (bool, the tensor's shape)."""
    return words(tensor) != 0


def packed_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes below 2^bits (uint8 or bool), row-major, as one string of bits: first code first, highest
    bit first; zeros at the end.
    """
    flat = codes.contiguous().view(torch.uint8).reshape(-1).numpy()
    if bits == 1:
        return torch.from_numpy(np.packbits(flat))
    parts = [flat[start : start + _CHUNK] for start in range(0, len(flat), _CHUNK)]
    packed = [np.packbits(np.unpackbits(part[:, None], axis=1)[:, 8 - bits :]) for part in parts]
    return torch.from_numpy(np.concatenate(packed) if packed else np.empty(0, np.uint8))


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` codes (uint8) of the output of ``pack``."""
    flat = packed.numpy()
    if bits == 1:
        return torch.from_numpy(np.unpackbits(flat, count=count))
    if bits == 4:  # ten times as fast as bit by bit
        return torch.from_numpy(np.stack([flat >> 4, flat & 15], axis=1).reshape(-1)[:count])
    codes = np.empty(count, np.uint8)
    for start in range(0, count, _CHUNK):
        part = codes[start : start + _CHUNK]
        first = start * bits // 8
        expanded = np.unpackbits(
            flat[first : first + packed_bytes(len(part), bits)], count=len(part) * bits
        ).reshape(-1, bits)
        part[:] = np.packbits(np.pad(expanded, ((0, 0), (8 - bits, 0))), axis=None)
    return torch.from_numpy(codes)
