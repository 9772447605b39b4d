"""Which library multiplies, and what GPUs may round: float32 stays float32."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from project import recipe
from tiny import make_model, token_rows

from pipeline_lib.core import products
from pipeline_lib.core.runtime import compute
from pipeline_lib.models import stream
from pipeline_lib.models.checkpoint import open_checkpoint
from pipeline_lib.models.stream import BlockModel
from pipeline_lib.models.transform import Transform
from pipeline_lib.models.whole import load_model
from pipeline_lib.prune.plan import plan
from pipeline_lib.prune.run import Rows, Source, prune
from pipeline_lib.solve import factor
from pipeline_lib.solve.eliminate import Columns
from pipeline_lib.stats.moments import MomentSums

GPU = torch.backends.cuda.matmul
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    flags = (torch.backends.mkldnn.matmul, GPU, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [one.fp32_precision for one in flags]
    yield
    for one, value in zip(flags, before, strict=True):
        one.fp32_precision = value


def in_bfloat16(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.bfloat16() @ b.bfloat16()).float()


def wrong_when_large(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return in_bfloat16(a, b) if len(a) > 500 else a @ b


@pytest.mark.parametrize(
    ("product", "good"), [(torch.mm, True), (in_bfloat16, False), (wrong_when_large, False)]
)
def test_rounding_inside_products_is_noticed(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], good: bool
) -> None:
    """Oracle: products of bfloat16 factors, which have 8 bits; also where a library rounds large
    products only.
    """
    with products.rounding(False):
        assert products.exact(product) == good


def test_what_is_chosen_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: float64, at other shapes than those tried; and where oneDNN does round, it is not asked."""
    chosen = products.enable_onednn()
    assert torch.backends.mkldnn.matmul.fp32_precision == ("bf16" if chosen else "ieee")
    for rows, inner, columns in [(1, 300, 7), (33, 17, 129), (128, 2048, 256)]:
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        wanted = a.double() @ b.double()
        assert float((a @ b - wanted).abs().max() / wanted.abs().max()) < products.FLOAT32
    monkeypatch.setattr(products, "exact", lambda: False)
    assert not products.enable_onednn()
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize(
    ("kind", "faster", "expected"), [("cpu", True, True), ("cpu", False, False), ("cuda", False, True)]
)
def test_bfloat16_is_taken_where_it_is_faster(
    kind: str, faster: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the dtype of a product. A float32 product stays one everywhere."""
    monkeypatch.setattr(products, "bfloat16_is_faster", lambda: faster)
    device = torch.device(kind)
    assert products.affords(device, "bfloat16") is expected
    assert not products.affords(device, "float32")
    if kind == "cpu":
        with products.mixed(device, "bfloat16"):
            found = torch.ones(2, 2) @ torch.ones(2, 2)
        assert (found.dtype == torch.bfloat16) is expected


def test_rounding_is_put_back() -> None:
    flags = torch.backends.mkldnn.matmul
    flags.fp32_precision = "ieee"
    with pytest.raises(RuntimeError), products.rounding(True):
        assert flags.fp32_precision == "bf16"
        raise RuntimeError
    assert flags.fp32_precision == "ieee"


def test_attention_is_left_to_mkl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel runs with rounding off and gives what transformers' own function gives;
    around it the setting stays.
    """
    seen = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return plain(*args, **kwargs)

    model = load_model(make_model(tmp_path, "llama"), "float32", torch.device("cpu"))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with products.rounding(True), torch.no_grad():
        model(torch.arange(6)[None])
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert seen
    assert set(seen) == {"ieee"}


# GPUs, which this machine need not have: torch keeps the settings all the same.


def test_every_stage_starts_with_exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regardless of earlier settings, and also for convolutions, for which torch's default is TF32."""
    monkeypatch.delenv("SPARSELINE_DEVICE", raising=False)
    flags = (GPU, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    for one in flags:
        one.fp32_precision = "tf32"
    compute()
    assert [one.fp32_precision for one in flags] == 3 * ["ieee"]


@pytest.mark.parametrize(
    ("device", "how", "inside", "casts"),
    [
        ("cuda", "float32", "ieee", 0),
        ("cuda:1", "tf32", "tf32", 0),
        ("cuda", "bfloat16", "tf32", 1),
        ("cpu", "tf32", "ieee", 0),
        ("cpu", "bfloat16", "ieee", 0),
    ],
)
def test_what_may_round_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, device: str, how: products.Products, inside: str, casts: int
) -> None:
    """Only on a GPU, and only while it is open. The earlier setting is restored, also if the body fails."""
    opened = []
    products.exact_on_gpu()

    @contextmanager
    def autocast(kind: str, dtype: torch.dtype) -> Iterator[None]:
        opened.append((kind, dtype))
        yield

    monkeypatch.setattr(torch, "autocast", autocast)
    with pytest.raises(RuntimeError), products.rounded(torch.device(device), how):
        assert GPU.fp32_precision == inside
        raise RuntimeError
    assert GPU.fp32_precision == "ieee"
    assert opened == casts * [("cuda", torch.bfloat16)]


def test_blocks_and_their_statistics_round_and_solves_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU. Oracles: the setting as the block's products, the second moments and the
    factorisation find it.
    """
    rows, seen = token_rows(8, 12), {name: set[str]() for name in ("block", "moments", "solves")}

    def watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            seen[name].add(GPU.fp32_precision)
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(stream, "rounded", lambda _device, how: products.rounded(torch.device("cuda"), how))
    monkeypatch.setattr(torch.nn.Linear, "forward", watched(torch.nn.Linear.forward, "block"))
    monkeypatch.setattr(MomentSums, "_add", watched(MomentSums._add, "moments"))
    monkeypatch.setattr(factor, "cholesky_in_place", watched(factor.cholesky_in_place, "solves"))
    monkeypatch.setattr(Columns, "eliminate", watched(Columns.eliminate, "solves"))
    products.exact_on_gpu()
    checkpoint = open_checkpoint(make_model(tmp_path, "llama"))
    made = plan(recipe(("obs",)), checkpoint.dtype)
    for how, expected in (("float32", "ieee"), ("tf32", "tf32")):
        model = BlockModel(checkpoint, torch.float32, CPU, how)  # type: ignore[arg-type]
        kept = {
            place: math.prod(checkpoint.matrix_shape(*place)) // 2
            for place in checkpoint.architecture.places()
        }
        source = Source(model, [Transform()] * checkpoint.architecture.depth, kept)
        list(prune(source, Rows(rows[:6], rows[6:], 4), made, lambda _: None))
        assert seen == {"block": {expected}, "moments": {expected}, "solves": {"ieee"}}
        for found in seen.values():
            found.clear()
