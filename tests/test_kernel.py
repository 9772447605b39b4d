"""The sweep's kernel for GPUs, run by Triton's interpreter on the CPU. Oracle: the plain loop over
columns, on the same inputs.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline_lib.masks.rule import Rule
from pipeline_lib.masks.settings import Group, Pattern
from pipeline_lib.solve import eliminate
from pipeline_lib.solve.factor import Factorisation, factorise
from pipeline_lib.solve.grid import Grid, Scheme
from pipeline_lib.solve.sweep import quantise, sweep

ROWS, COLUMNS = 37, 96  # no multiple of a tile
PATTERNS = ("unstructured", "2:4", "3:8", "1:16")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The columns of each launch, while the sweep takes this machine for a GPU."""
    pytest.importorskip("triton", reason="Triton is not installed for this system")
    from pipeline_lib.solve import kernel

    assert type(kernel._eliminate).__name__ == "InterpretedFunction"
    seen: list[int] = []
    plain = kernel.eliminate

    def counted(columns: torch.Tensor, *rest: Any) -> None:
        seen.append(len(columns))
        plain(columns, *rest)

    monkeypatch.setattr(kernel, "eliminate", counted)
    monkeypatch.setattr(eliminate, "fused", lambda device: device.type == "cpu")
    yield seen


def problem(seed: int = 0) -> tuple[torch.Tensor, Factorisation]:
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, COLUMNS, generator=random) @ torch.randn(COLUMNS, COLUMNS, generator=random)
    return torch.randn(ROWS, COLUMNS, generator=random), factorise(
        inputs.T @ inputs / 400, 0.01, "mean", "here"
    )


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eliminate, "fused", lambda device: False)


def swept(pattern: str, group: Group, block: int, grid: Grid | None) -> tuple[torch.Tensor, ...]:
    weight, factorisation = problem()
    importance = torch.linspace(0.5, 2, COLUMNS)
    rule = Rule("isc", Pattern.parse(pattern), group, block, importance)
    kept = weight.numel() * rule.pattern.n // rule.pattern.m if rule.pattern.m else weight.numel() * 2 // 5
    return sweep(weight, factorisation, kept, rule, grid)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("group", "block"), [("block", 32), ("row", 32), ("matrix", 48)])
def test_the_same_weights_and_masks(
    pattern: str, group: Group, block: int, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to rounding, for N:M chosen within the kernel and for masks given to it; one launch per
    column block.
    """
    weight, mask, lost = swept(pattern, group, block, None)
    assert launches == [block] * (COLUMNS // block)
    plainly(monkeypatch)
    expected, chosen, error = swept(pattern, group, block, None)
    assert torch.equal(mask, chosen)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lost, error, rtol=1e-5, atol=0)
    assert not weight[~mask].view(torch.int32).any()


@pytest.mark.parametrize(
    ("pattern", "width", "symmetric"),
    [
        ("unstructured", 16, True),
        ("unstructured", None, False),
        ("2:4", 32, True),
        ("3:8", 24, False),
        ("2:4", 18, True),
        ("1:16", 24, True),
    ],
)
def test_the_same_grid(
    pattern: str, width: int | None, symmetric: bool, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stays is rounded within the kernel; a launch ends where a group of the grid starts. Some
    groups tear N:M groups apart.
    """
    scheme = Scheme(4, width, symmetric, torch.float32)
    grids = [Grid((ROWS, COLUMNS), scheme, torch.device("cpu")) for _ in range(2)]
    weight, mask, _ = swept(pattern, "block", 32, grids[0])
    assert launches
    plainly(monkeypatch)
    expected, chosen, _ = swept(pattern, "block", 32, grids[1])
    # a rounding apart at a tie of the grid may turn one weight, and what comes after it
    assert (mask != chosen).sum() <= 2
    assert not weight[~mask].any()
    same = (weight - expected).abs() < 1e-4
    assert same.float().mean() > 0.98
    torch.testing.assert_close(grids[0].scale, grids[1].scale, rtol=1e-2, atol=1e-3)
    assert float(grids[0].error) == pytest.approx(float(grids[1].error), rel=0.05)


def test_quantised_on_a_mask_in_an_order(launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns in another order than stored, the grid's groups scattered over it."""
    order = torch.cat(
        [
            32 * block + torch.randperm(32, generator=torch.Generator().manual_seed(int(block)))
            for block in (2, 0, 1)
        ]
    )
    scheme = Scheme(8, 16, True, torch.float32)
    weight, factorisation = problem()
    hessian = torch.linalg.inv(factorisation.upper.T @ factorisation.upper)[order][:, order]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    factorisation = replace(factorisation, upper=upper, order=order)
    mask = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) < 0.5
    grids = [Grid((ROWS, COLUMNS), scheme, torch.device("cpu")) for _ in range(2)]
    found = quantise(weight, mask, factorisation, grids[0], 32)
    assert launches
    plainly(monkeypatch)
    expected = quantise(weight, mask, factorisation, grids[1], 32)
    assert ((found - expected).abs() < 1e-4).float().mean() > 0.98
    assert not found[~mask].any()


def test_wide_blocks_take_several_launches(launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch holds its columns in registers: at most 128."""
    swept("unstructured", "block", 96, None)
    assert launches == [96]
    launches.clear()
    monkeypatch.setattr(eliminate, "WIDEST", 32)
    swept("unstructured", "block", 96, None)
    assert sorted(launches) == [24, 24, 24, 24]
