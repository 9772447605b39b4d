"""Masks as bits."""

from collections.abc import Iterator, MutableMapping

import numpy as np
import torch


def pack(mask: torch.Tensor) -> torch.Tensor:
    """A bool mask as bits, row-major, first entry in the highest bit; 1 = kept."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


class BitMasks(MutableMapping[str, torch.Tensor]):
    """Masks by name, an eighth of their size in memory: what is looked up is a copy, to be put back where it has changed."""

    def __init__(self) -> None:
        self.bits: dict[str, tuple[torch.Tensor, torch.Size]] = {}  # packed, and shape

    def __getitem__(self, name: str) -> torch.Tensor:
        bits, shape = self.bits[name]
        return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel()).view(bool)).reshape(shape)

    def __setitem__(self, name: str, mask: torch.Tensor) -> None:
        self.bits[name] = pack(mask), mask.shape

    def __delitem__(self, name: str) -> None:
        del self.bits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.bits)

    def __len__(self) -> int:
        return len(self.bits)
