"""Masks as bits."""

from collections.abc import Iterator, MutableMapping

import numpy as np
import torch


def pack(mask: torch.Tensor) -> torch.Tensor:
    """A bool mask as bits, row-major, first entry in the highest bit; 1 = kept."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


class BitMasks(MutableMapping[str, torch.Tensor]):
    """Masks by name, packed to an eighth of their size. A lookup returns a copy; store it again after
    a change.

    Masks of three dimensions are changed expert by expert and are not packed.
    """

    def __init__(self) -> None:
        self._bits: dict[str, tuple[torch.Tensor, torch.Size]] = {}  # packed, and shape
        self._whole: dict[str, torch.Tensor] = {}

    def packed(self) -> dict[str, tuple[torch.Tensor, torch.Size]]:
        """Bits and shape of every mask."""
        return self._bits | {name: (pack(mask), mask.shape) for name, mask in self._whole.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._whole:
            return self._whole[name]
        bits, shape = self._bits[name]
        return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel()).view(bool)).reshape(shape)

    def __setitem__(self, name: str, mask: torch.Tensor) -> None:
        if mask.ndim == 3:
            self._whole[name] = mask
        else:
            self._bits[name] = pack(mask), mask.shape

    def __delitem__(self, name: str) -> None:
        del (self._whole if name in self._whole else self._bits)[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._bits, *self._whole])

    def __len__(self) -> int:
        return len(self._bits) + len(self._whole)
