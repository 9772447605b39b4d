"""Which library multiplies float32 matrices on the CPU, and what float32 products on a GPU may
round their inputs to.

torch asks MKL, which leaves AVX-512 unused on AMD's processors: half of their speed. oneDNN, which
comes with torch as well, uses it, but torch turns to it for float32 only if it may round to
bfloat16 inside. It does that only where a processor has matrix units for it (AMX): so it is allowed
to, tried, and stopped again unless its products are float32's in every digit that counts.

On a GPU, products are float32's own (``ieee``) unless ``model.products`` says otherwise, and then
only in ``rounded``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
    """While open, whether oneDNN may round inside float32 products, so whether it is asked for them
    at all.
    """
    before = _flags.fp32_precision
    _flags.fp32_precision = "bf16" if allowed else "ieee"
    try:
        yield
    finally:
        _flags.fp32_precision = before


def exact(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.mm) -> bool:
    """Whether ``product`` of float32 matrices is as good as float32 allows."""
    random = torch.Generator().manual_seed(0)
    for rows, inner, columns in SHAPES:
        a, b = torch.randn(rows, inner, generator=random), torch.randn(inner, columns, generator=random)
        wanted = a.double() @ b.double()
        if float((product(a, b) - wanted).abs().max() / wanted.abs().max()) > FLOAT32:
            return False
    return True


def choose() -> bool:
    """Let oneDNN multiply float32 matrices in this process if that is exact; whether it does."""
    with rounding(True):
        good = torch.backends.mkldnn.is_available() and exact()
    _flags.fp32_precision = "bf16" if good else "ieee"
    return good


def bfloat16_is_faster() -> bool:
    """Whether this CPU has instructions of its own for products of bfloat16: without them these
    take longer than float32's.
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def exact_on_gpu() -> None:
    """Let no float32 product on a GPU round its inputs in this process: torch's default for
    convolutions is TF32.
    """
    for flags in (_gpu, *_gpu_others):
        flags.fp32_precision = "ieee"


@contextmanager
def rounded(device: torch.device, products: Products) -> Iterator[None]:
    """While open, float32 products on a GPU may round their inputs to TF32 (10 bits after the
    point) or, in forward passes, to bfloat16 (7 bits).

    torch has no bfloat16 setting for float32 products on a GPU: autocast does it, which rounds the
    results too, and leaves norms, softmax and whatever adds to an accumulator in place alone; those
    sums are TF32's then. Nothing changes for a CPU, or for ``float32``.
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
