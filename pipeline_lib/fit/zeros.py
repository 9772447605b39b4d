"""Masks of pruned weights that keep zeros during training.

They work on tensors by name, so any training loop can use them: hold the gradients before an
optimiser's step, and the weights after it.
"""

from collections.abc import Iterator, Mapping
from typing import Self

import torch

SHIFTS = tuple(range(7, -1, -1))  # the first entry is in the highest bit, as in ``masks.bits``


class Zeros:
    """Positions of pruned weights, by name: one bit per weight, on the weights' device."""

    def __init__(self, kept: Mapping[str, torch.Tensor]) -> None:
        """
        Args:
            kept: bool masks by name, in the shape of the weights; True = kept.
        """
        self._bits = {name: _pack(mask) for name, mask in kept.items()}
        self._shapes = {name: mask.shape for name, mask in kept.items()}

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor]) -> Self:
        """Every zero of tensors with two or more dimensions; tensors without a zero are left out."""
        return cls(
            {name: weight != 0 for name, weight in weights.items() if weight.ndim > 1 and not weight.all()}
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __contains__(self, name: str) -> bool:
        return name in self._bits

    def __getitem__(self, name: str) -> torch.Tensor:
        """The mask (bool, True = kept) of a name; a new tensor."""
        bits, shape = self._bits[name], self._shapes[name]
        shifts = torch.tensor(SHIFTS, dtype=torch.uint8, device=bits.device)
        return ((bits[:, None] >> shifts) & 1).view(torch.bool).reshape(-1)[: shape.numel()].view(shape)

    @torch.no_grad()
    def hold(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set pruned entries of these tensors to zero, in place; unknown names are ignored.

        Args:
            tensors: weights, or their gradients, by name.
        """
        for name, tensor in tensors.items():
            if name in self:
                # a product would leave negative zeros, and NaN where there is one
                tensor.masked_fill_(~self[name], 0)


def _pack(mask: torch.Tensor) -> torch.Tensor:
    """Bits [⌈n / 8⌉] of a bool mask, row-major."""
    flat = mask.reshape(-1)
    padded = torch.zeros(-(-len(flat) // 8) * 8, dtype=torch.uint8, device=mask.device)
    padded[: len(flat)] = flat
    values = torch.tensor([1 << shift for shift in SHIFTS], dtype=torch.uint8, device=mask.device)
    return (padded.view(-1, 8) * values).sum(1, dtype=torch.uint8)
