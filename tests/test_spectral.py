"""Norms and the regulariser of 2602.21652, Eq. 8. Oracles: torch.linalg and autograd through the
singular value decomposition.
"""

import math

import pytest
import torch

from pipeline_lib.fit.settings import Order, SpectralParams
from pipeline_lib.fit.spectral import Norm, regulariser

ORDERS: list[tuple[Order, int | str]] = [("spectral", 2), ("frobenius", "fro"), ("nuclear", "nuc")]


def params(order: Order, alpha: float = 1.0, iterations: int = 50) -> SpectralParams:
    return SpectralParams(weight=1.0, alpha=alpha, order=order, iterations=iterations)


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("order", "oracle"), ORDERS)
@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (1, 5), (5, 1)])
def test_norm_equals_linalg(order: Order, oracle: int | str, shape: tuple[int, int]) -> None:
    """Oracle: torch.linalg.matrix_norm, for the first matrix and for one that has changed since."""
    norm = Norm(matrix(*shape), params(order))
    assert float(norm.initial) == pytest.approx(
        float(torch.linalg.matrix_norm(matrix(*shape), oracle)), rel=1e-5
    )
    changed = matrix(*shape, seed=1)
    assert float(norm(changed)) == pytest.approx(float(torch.linalg.matrix_norm(changed, oracle)), rel=1e-3)
    assert float(norm.relative(3 * matrix(*shape))) == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize(("order", "oracle"), ORDERS)
def test_gradient_equals_autograd_through_the_decomposition(order: Order, oracle: int | str) -> None:
    """Oracle: autograd through torch.linalg.svdvals (spectral: u vᵀ of the largest singular value)."""
    weight = matrix(6, 9, seed=2).requires_grad_(True)
    norm = Norm(weight, params(order, iterations=100))
    (found,) = torch.autograd.grad(norm(weight), weight)
    values = torch.linalg.svdvals(weight)
    expected = {"spectral": values.max(), "frobenius": values.square().sum().sqrt(), "nuclear": values.sum()}[
        order
    ]
    (gradient,) = torch.autograd.grad(expected, weight)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)


def test_power_iteration_follows_a_slowly_changing_matrix() -> None:
    """One iteration per call is enough if the matrix changes little between calls, because the
    iteration continues from its last vector.
    """
    weight, step = matrix(8, 8, seed=3), 0.01 * matrix(8, 8, seed=4)
    norm = Norm(weight, params("spectral", iterations=1))
    for _ in range(60):
        weight = weight + step
        found = float(norm(weight))
    assert found == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-2)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0, -1.0])
def test_regulariser_is_its_formula(alpha: float) -> None:
    """Oracle: exp(−α · mean ‖W̃‖/‖W‖), with ‖W̃‖ = 2‖W‖ and ‖W‖: a mean of 1.5."""
    weights = [matrix(4, 5, seed=5), matrix(7, 3, seed=6)]
    settings = params("spectral", alpha)
    norms = [Norm(weight, settings) for weight in weights]
    assert float(regulariser(norms, [2 * weights[0], weights[1]], settings)) == pytest.approx(
        math.exp(-1.5 * alpha), rel=1e-5
    )


def test_regulariser_falls_as_norms_grow_and_does_not_underflow() -> None:
    """Relative norms: a hundred matrices of norm 1000 still give a gradient (exp(−Σ‖W‖) would be
    exactly 0).
    """
    settings = params("frobenius")
    weights = [1000 * matrix(4, 4, seed=number).float() for number in range(100)]
    norms = [Norm(weight, settings) for weight in weights]
    scale = torch.ones((), requires_grad=True)
    value = regulariser(norms, [scale * weight for weight in weights], settings)
    (gradient,) = torch.autograd.grad(value, scale)
    assert float(gradient) == pytest.approx(-math.exp(-1), rel=1e-5)


def test_a_zero_matrix_does_not_poison_the_mean() -> None:
    """A matrix that a mask emptied has no norm to keep: its ratio must be finite."""
    settings = params("spectral")
    weights = [torch.zeros(3, 3), matrix(3, 3).float()]
    norms = [Norm(weight, settings) for weight in weights]
    assert math.isfinite(float(regulariser(norms, weights, settings)))


@pytest.mark.parametrize("order", ["spectral", "frobenius", "nuclear"])
def test_rescaled_is_relative_of_the_scaled_matrix(order: Order) -> None:
    """Oracle: the scaled matrix itself, value and gradient."""
    weight, random = matrix(6, 9, seed=5), torch.Generator().manual_seed(6)
    scales = [
        torch.randn(size, generator=random, dtype=torch.float64).requires_grad_(True) for size in (6, 9)
    ]
    expected = Norm(weight, params(order)).relative(weight * (scales[0][:, None] + scales[1]).exp())
    found = Norm(weight, params(order)).rescaled(weight, scales[0], scales[1])
    for a, b in zip(
        (found, *torch.autograd.grad(found, scales)),
        (expected, *torch.autograd.grad(expected, scales)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
