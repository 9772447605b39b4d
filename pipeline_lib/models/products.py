"""Observe the matrix products with parameters while a model runs, and their inputs X [tokens, d]."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Tensor = torch.Tensor
_OUTPUTS_FIRST = {nn.functional.linear}  # the weight is [R, C]; elsewhere it is [C, R]
_PLAIN = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__}
_ADDED = {torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm}  # the bias comes first


@dataclass(frozen=True)
class Part:
    """The weight of a product: a module's parameter, one expert's slice, or some of its rows. Names are
    relative to the block.
    """

    parameter: str
    expert: int | None = None
    rows: tuple[int, int] | None = None  # of the logical [R, C] matrix; None: all
    transposed: bool = False  # the parameter is stored [C, R]


@dataclass(frozen=True)
class Product:
    """One product, before it is computed."""

    part: Part
    inputs: Tensor  # X [..., d]
    size: int  # R
    bias: str | None  # the parameter that the same call adds
    batched: int | None = None  # its number, if the call computes several products
    turned: bool = False  # the weight comes first: W Xᵀ

    def outputs_in(self, result: Tensor) -> Tensor:
        """The product's outputs [..., R] from the call's result (or its part of the result's gradient)."""
        own = result if self.batched is None else result[self.batched]
        return own.transpose(-1, -2) if self.turned else own


class Parameters:
    """Lookup of the parameter that a tensor is a view of, and of the tensor's part of it."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self._of = {_storage(tensor): [] for tensor in named.values()}  # type: dict[int, list[tuple[str, Tensor]]]
        for name, tensor in named.items():
            self._of[_storage(tensor)].append((name, tensor))

    def find(self, tensor: Tensor) -> tuple[str, Tensor] | None:
        """Name and tensor of the parameter whose memory the tensor shares, or None."""
        for name, whole in self._of.get(_storage(tensor), ()):
            if (
                whole.storage_offset()
                <= tensor.storage_offset()
                < whole.storage_offset() + max(whole.numel(), 1)
            ):
                return name, whole
        return None

    def part(self, weight: Tensor) -> Part | None:
        """The part that equals a weight [R, C]; None unless the weight is whole rows of a stored matrix."""
        found = self.find(weight)
        if found is None or weight.ndim != 2 or found[1].ndim not in (2, 3):
            return None
        name, whole = found
        offset = int(weight.storage_offset() - whole.storage_offset())
        expert = None
        if whole.ndim == 3:
            expert, offset = divmod(offset, int(whole.stride(0)))
        stored = whole.stride()[-2:]
        for transposed, strides in ((False, stored), (True, stored[::-1])):
            rows, columns = whole.shape[-2:] if not transposed else whole.shape[:-3:-1]
            if weight.stride() == strides and weight.shape[1] == columns:
                first, rest = divmod(offset, int(strides[0])) if strides[0] else (0, offset)
                if rest or first + len(weight) > rows:
                    continue
                return Part(
                    name, expert, None if len(weight) == rows else (first, first + len(weight)), transposed
                )
        return None


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Watched(TorchFunctionMode):
    """While active, call ``see`` with every product with a parameter, before it is computed. If ``see``
    returns a tensor, this replaces the product's outputs.
    """

    def __init__(
        self,
        parameters: Parameters,
        see: Callable[[Product], Tensor | None],
        after: Callable[[Product, Tensor], None] | None = None,
    ) -> None:
        """
        Args:
            after: called with each product and the result of its call (see ``Product.outputs_in``).
        """
        super().__init__()
        self.parameters, self.see, self.after = parameters, see, after

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        taken = _operands(func, args, kwargs)
        products = [] if taken is None else self._products(*taken)
        given = [
            _as_taken(product, result) for product in products if (result := self.see(product)) is not None
        ]
        if products and len(given) == len(products):
            return given[0] if products[0].batched is None else torch.stack(given)
        outputs = self.otherwise(func, args, kwargs)
        if self.after is not None and products:
            for product in products:
                self.after(product, outputs)
        return outputs

    def otherwise(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call whose result ``see`` does not replace."""
        return func(*args, **kwargs)

    def _products(self, inputs: Any, weight: Any, bias: Any) -> list[Product]:
        """The products in a call. ``weight`` is [R, C], or [E, R, C] for inputs [E, n, C]."""
        if not isinstance(inputs, Tensor) or not isinstance(weight, Tensor):
            return []
        if self.parameters.find(weight) is None:
            if self.parameters.find(inputs) is None or inputs.ndim != 2 or weight.ndim < 2:
                return []
            return [replace(product, turned=True) for product in self._products(weight, inputs, None)]
        if weight.ndim == 3 and inputs.ndim == 3 and len(weight) == len(inputs):
            each = [self._products(x, w, None) for x, w in zip(inputs, weight, strict=True)]
            return [replace(own[0], batched=number) for number, own in enumerate(each)] if all(each) else []
        part = self.parameters.part(weight)
        if part is None or inputs.shape[-1] != weight.shape[1]:
            return []
        added = None if bias is None else self.parameters.find(bias)
        return [Product(part, inputs, len(weight), None if added is None else added[0])]


def _as_taken(product: Product, outputs: Tensor) -> Tensor:
    return outputs.transpose(-1, -2) if product.turned else outputs


def _operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any] | None:
    """Inputs, weight as [..., R, C], and bias of a call that is a product, else None."""
    if func in _OUTPUTS_FIRST:
        values = [
            *args,
            *(kwargs[name] for name in ("input", "weight", "bias")[len(args) :] if name in kwargs),
        ]
        return values[0], values[1], values[2] if len(values) > 2 else None
    if func in _PLAIN and len(args) == 2:
        return args[0], _turned(args[1]), None
    if func in _ADDED and len(args) == 3:
        return args[1], _turned(args[2]), args[0]
    return None


def _turned(weight: Any) -> Any:
    return weight.transpose(-1, -2) if isinstance(weight, Tensor) and weight.ndim > 1 else weight
