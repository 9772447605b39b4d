"""The library for float32 products on the CPU, and the rounding of inputs of float32 products on a
GPU.

torch uses MKL, which does not use AVX-512 on AMD's processors and reaches half of their speed.
oneDNN, which torch also contains, uses it, but torch calls it for float32 only if it may round to
bfloat16 internally. It rounds only on processors with matrix units for bfloat16 (AMX). So it is
enabled, tested, and disabled again unless its products are as exact as float32's.

On a GPU, products have full float32 precision (``ieee``) unless ``model.products`` says otherwise,
and then only in ``rounded``.

Fits, mask searches and distillation ask for bfloat16 because it is faster. On a CPU without
instructions for it, it is slower, so they compute in float32 there.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

# rows, inner, columns of the products that are tried
SHAPES = ((64, 192, 64), (200, 1000, 130), (512, 512, 512))
FLOAT32 = 1e-5  # relative error; bfloat16's is above 1e-3
Products = Literal["float32", "tf32", "bfloat16"]

_flags: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
_gpu: Any = torch.backends.cuda.matmul
_gpu_others: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn)  # type: ignore[attr-defined]


@contextmanager
def rounding(allowed: bool) -> Iterator[None]:
    """Set for this context whether oneDNN may round inside float32 products, and so whether it is
    used for them.
    """
    before = _flags.fp32_precision
    _flags.fp32_precision = "bf16" if allowed else "ieee"
    try:
        yield
    finally:
        _flags.fp32_precision = before


def exact(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.mm) -> bool:
    """Whether ``product`` of float32 matrices is as exact as float32 allows."""
    random = torch.Generator().manual_seed(0)
    for rows, inner, columns in SHAPES:
        a, b = torch.randn(rows, inner, generator=random), torch.randn(inner, columns, generator=random)
        wanted = a.double() @ b.double()
        if float((product(a, b) - wanted).abs().max() / wanted.abs().max()) > FLOAT32:
            return False
    return True


def enable_onednn() -> bool:
    """Enable oneDNN for float32 products in this process if it is exact, and return whether it is
    enabled.
    """
    with rounding(True):
        good = torch.backends.mkldnn.is_available() and exact()
    _flags.fp32_precision = "bf16" if good else "ieee"
    return good


def onednn_is_enabled() -> bool:
    """Whether oneDNN computes float32 products in this process."""
    return bool(_flags.fp32_precision == "bf16")


def bfloat16_is_faster() -> bool:
    """Whether this CPU has instructions for bfloat16 products; without them these are slower than
    float32's.
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def affords(device: torch.device, asked: str) -> bool:
    """Whether products are in bfloat16: it is asked for, and this device has instructions for it."""
    return asked == "bfloat16" and (device.type != "cpu" or bfloat16_is_faster())


def mixed(device: torch.device, asked: str) -> AbstractContextManager[Any]:
    """A context whose products are in bfloat16 if ``affords``. The state is one of this thread."""
    return torch.autocast(device.type, torch.bfloat16, enabled=affords(device, asked))


def exact_on_gpu() -> None:
    """Forbid rounding of the inputs of float32 products on a GPU in this process (torch's default for
    convolutions is TF32).
    """
    for flags in (_gpu, *_gpu_others):
        flags.fp32_precision = "ieee"


@contextmanager
def rounded(device: torch.device, products: Products) -> Iterator[None]:
    """Let float32 products on a GPU round their inputs in this context: to TF32 (10 bits after the
    point) or, in forward passes, to bfloat16 (7 bits).

    torch has no bfloat16 setting for float32 products on a GPU, so autocast is used. It also rounds
    the results, but not norms, softmax and in-place additions to an accumulator, whose sums are
    TF32's. Nothing changes for a CPU, or for ``float32``.
    """
    if device.type != "cuda" or products == "float32":
        yield
        return
    before = _gpu.fp32_precision
    _gpu.fp32_precision = "tf32"
    try:
        with torch.autocast("cuda", torch.bfloat16) if products == "bfloat16" else nullcontext():
            yield
    finally:
        _gpu.fp32_precision = before
