"""Which library multiplies: float32 stays float32."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline_lib.core import products
from pipeline_lib.models.whole import load_model
from tests.tiny import make_model


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    flags = torch.backends.mkldnn.matmul
    before = flags.fp32_precision
    yield
    flags.fp32_precision = before


def in_bfloat16(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.bfloat16() @ b.bfloat16()).float()


def wrong_when_large(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return in_bfloat16(a, b) if len(a) > 500 else a @ b


@pytest.mark.parametrize(("product", "good"), [(torch.mm, True), (in_bfloat16, False), (wrong_when_large, False)])
def test_rounding_inside_products_is_noticed(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], good: bool) -> None:
    """Oracle: products of bfloat16 factors, which have 8 bits; also where a library rounds large products only."""
    with products.rounding(False):
        assert products.exact(product) == good


def test_what_is_chosen_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: float64, at other shapes than those tried; and where oneDNN does round, it is not asked."""
    chosen = products.choose()
    assert torch.backends.mkldnn.matmul.fp32_precision == ("bf16" if chosen else "ieee")
    for rows, inner, columns in [(1, 300, 7), (33, 17, 129), (128, 2048, 256)]:
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        wanted = a.double() @ b.double()
        assert float((a @ b - wanted).abs().max() / wanted.abs().max()) < products.FLOAT32
    monkeypatch.setattr(products, "exact", lambda: False)
    assert not products.choose()
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


def test_rounding_is_put_back() -> None:
    flags = torch.backends.mkldnn.matmul
    flags.fp32_precision = "ieee"
    with pytest.raises(RuntimeError), products.rounding(True):
        assert flags.fp32_precision == "bf16"
        raise RuntimeError
    assert flags.fp32_precision == "ieee"


def test_attention_is_left_to_mkl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel runs with rounding off and gives what transformers' own function gives; around it the setting stays."""
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
