"""A simulated device in this machine's memory. Its operations refuse tensors of other devices, and
reads from it are counted.

Its tensors call themselves ``meta``, which torch knows without a GPU; what they hold lies behind
them. As with a GPU, an operation on tensors of both places fails, but for single numbers, indices
and copies.
"""

import traceback
from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
# Their results, or the sizes of their results, depend on values, or they look for errors: whoever
# asks waits for the device.
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
    aten.equal.default,
    aten.cholesky_inverse.out,
}


class There(torch.Tensor):
    """A tensor on the device."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "There":
        made: There = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        made.here = here
        return made

    def tolist(self) -> Any:
        """torch has none for subclasses; on a GPU it is a copy first, too."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the mode")


class _Made(TorchFunctionMode):
    """Tensors of given values, which torch does not hold on its own ``meta``: made here, then moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.new_tensor and isinstance(args[0], There):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(DEVICE)
        if (
            func in (torch.tensor, torch.as_tensor)
            and kwargs.get("device") == DEVICE
            and not isinstance(args[0], torch.Tensor)
        ):
            return func(*args, **kwargs | {"device": None}).to(DEVICE)
        return func(*args, **kwargs)


class Elsewhere(TorchDispatchMode):
    """While open, the device is there. ``reads`` counts what waited for it, by the line of the
    library that did; ``calls`` all operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> "Elsewhere":
        self._made = _Made()
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given: list[torch.Tensor] = []
        tree_map(lambda one: given.append(one) if isinstance(one, torch.Tensor) else None, (args, kwargs))
        there = [one for one in given if isinstance(one, There)]
        apart = [one for one in given if not isinstance(one, There) and one.device.type == "cpu" and one.ndim]
        to = kwargs.get("device")
        to = None if to is None else torch.device(to)
        self.calls[str(func)] += bool(there)
        if there and apart and func not in COPIES | INDEXED:
            raise RuntimeError(
                f"{func} got tensors of both places:"
                f" {[(type(one).__name__, tuple(one.shape)) for one in given]}"
            )
        masks = [one for one in given[1:] if func in INDEXED and one.dtype == torch.bool]
        leaves = bool(there) and (
            to == torch.device("cpu") or (func is aten.copy_.default and not isinstance(args[0], There))
        )
        if there and (func in WAITING or masks or leaves):
            self.reads[_line()] += 1
        wanted = bool(there) if to is None else to == DEVICE
        if to == DEVICE:
            kwargs["device"] = torch.device("cpu")
        if func is aten.copy_.default:
            wanted = isinstance(args[0], There)
        behind = {id(one.here): one for one in there}
        outside = args, kwargs
        args, kwargs = tree_map(lambda one: one.here if isinstance(one, There) else one, (args, kwargs))
        found = func(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():  # the shape that the outside sees
                func(*outside[0], **outside[1])

        def placed(one: Any) -> Any:
            if not isinstance(one, torch.Tensor):
                return one
            if id(one) in behind:
                return behind[id(one)]
            return There(one) if wanted else one

        return tree_map(placed, found)


def _line() -> str:
    """Who asked: the innermost line of the library."""
    for frame in reversed(traceback.extract_stack()):
        if "/pipeline_lib/" in frame.filename:
            return f"{frame.filename.rpartition('/pipeline_lib/')[2]}:{frame.lineno}"
    return "elsewhere"
