"""Run a model with only the shapes of its parameters in memory: every product returns random outputs
of the right shape.

The outputs of products do not depend on their inputs, so the run shows what a block computes between
its products.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipeline_lib.models.products import Parameters, Part, Product, Watched

Tensor = torch.Tensor


@dataclass
class Changes:
    """Changes to one run: some outputs of products and some vector parameters are scaled."""

    rows: Mapping[Part, Tensor] = field(default_factory=dict)  # factors [R] of a product's outputs
    # parameter [d] -> factors f [d] and offset: w becomes (w + offset) f − offset
    vectors: Mapping[str, tuple[Tensor, float]] = field(default_factory=dict)
    # parts whose outputs are four times as large for one token, the middle one
    one: frozenset[Part] = frozenset()


class Hollow(Watched):
    """While active, parameters on the meta device act as random numbers. Without ``Changes``, equal
    calls give equal results.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(Parameters(parameters), self._outputs)
        self.changes = Changes()
        self.seen: list[Product] | None = []  # None: not kept
        self.parts: set[Part] = set()
        self.touched: set[str] = set()
        self._real: dict[str, Tensor] = {}
        self._times: dict[Part, int] = {}

    def begin(self, changes: Changes | None = None, keep: bool = True) -> None:
        """Begin a new run. With ``keep=False``, for a whole model, products are not kept, because their
        inputs would take memory in proportion to depth.
        """
        self.changes, self.seen, self._times = changes or Changes(), [] if keep else None, {}

    def _outputs(self, product: Product) -> Tensor:
        """Normally distributed outputs. They depend only on the part and its number of uses in this run."""
        self.parts.add(product.part)
        if self.seen is not None:
            self.seen.append(product)
        self.touched |= {product.part.parameter} | ({product.bias} if product.bias else set())
        part, shape = product.part, (*product.inputs.shape[:-1], product.size)
        times = self._times[part] = self._times.get(part, 0) + 1
        made = _normal(f"{part} {times}", shape).to(product.inputs.dtype)
        if part in self.changes.rows:
            made = made * self.changes.rows[part]
        if part in self.changes.one:
            tokens = made.view(-1, shape[-1])
            tokens[len(tokens) // 2 :][:1] *= 4
        return made

    def otherwise(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(func, "__name__", "") == "__get__" and getattr(func.__self__, "__name__", "") == "device":
            return torch.device("cpu")  # for a parameter on the meta device, too
        hollow = [value for value in _tensors((args, kwargs)) if value.is_meta]
        if not hollow:
            return func(*args, **kwargs)
        self.touched |= {found[0] for value in hollow if (found := self.parameters.find(value)) is not None}
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].ndim == 0:  # one expert
            return self.otherwise(func, (args[0], int(args[1])), kwargs)
        if func is nn.functional.embedding and args[1].is_meta:
            return _normal(
                f"embedding {tuple(args[1].shape)} {self._number(args[0])}",
                (*args[0].shape, args[1].shape[1]),
            )
        if all(value.is_meta for value in _tensors((args, kwargs))):
            result = func(*args, **kwargs)
            if all(self.parameters.find(value) is not None for value in _tensors(result)):
                return result  # a view, or no tensor
        return func(*_replaced(args, self._numbers), **_replaced(kwargs, self._numbers))

    @staticmethod
    def _number(ids: Tensor) -> int:
        return zlib.crc32(ids.contiguous().numpy().tobytes())

    def _numbers(self, tensor: Tensor) -> Tensor:
        """Random numbers that replace a parameter or a view of one. Those of vectors are positive, have
        few bits, and follow the changes.
        """
        found = self.parameters.find(tensor)
        if found is None:
            return _normal(f"{tuple(tensor.shape)}", tuple(tensor.shape)).to(tensor.dtype)
        name, whole = found
        if name not in self._real:
            made = _normal(name, tuple(whole.shape))
            self._real[name] = (0.5 + (made.sigmoid() * 256).round() / 256 if whole.ndim == 1 else made).to(
                whole.dtype
            )
        real = self._real[name]
        if name in self.changes.vectors:
            factor, offset = self.changes.vectors[name]
            real = (real + offset) * factor - offset
        return real.as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset() - whole.storage_offset()
        )


def _normal(seed: str, shape: tuple[int, ...]) -> Tensor:
    random = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return torch.randn(shape, generator=random)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [tensor for part in value for tensor in _tensors(part)]


def _replaced(value: Any, by: Any) -> Any:
    if isinstance(value, Tensor):
        return by(value) if value.is_meta else value
    if isinstance(value, dict):
        return {name: _replaced(part, by) for name, part in value.items()}
    return type(value)(_replaced(part, by) for part in value) if type(value) in (tuple, list) else value
