"""Hutchinson's traces. Oracle: the exact Hessian of small models, entry by entry."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from tiny import make_config, randomise, token_rows
from transformers import AutoModelForCausalLM

from pipeline_lib.models.architecture import Matrix
from pipeline_lib.sensitivity.hutchinson import SensitivityParams, probe_vector, summarise, traces

DISTRIBUTIONS = get_args(SensitivityParams.model_fields["distribution"].annotation)
# Logical matrices of both kinds that are more than a parameter: a slice of rows, and a transposed one.
MATRICES = {
    "first": ("one", Matrix("fc1", "one", "x")),
    "upper": ("two", Matrix("fc2", "two", "y", rows=(0, 2))),
    "lower": ("two", Matrix("fc2", "two", "y", rows=(2, 5))),
    "turned": ("one", Matrix("fc1", "one", "x", transposed=True)),
}


def params(distribution: str, probes: int, seed: int = 0) -> SensitivityParams:
    return SensitivityParams.model_validate({"probes": probes, "rows_per_probe": 1, "distribution": distribution, "seed": seed})


def small() -> tuple[dict[str, torch.Tensor], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Two layers under a cross-entropy: 4 inputs, 3 hidden units, 5 classes, 9 samples; float64."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, generator=random, dtype=torch.float64)
    labels = torch.randint(0, 5, (9,), generator=random)
    one = torch.randn(3, 4, generator=random, dtype=torch.float64)
    two = torch.randn(5, 3, generator=random, dtype=torch.float64)

    def loss(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(torch.tanh(x @ one.T) @ two.T, labels)

    return {"one": one.requires_grad_(True), "two": two.requires_grad_(True)}, loss


def exact_means() -> dict[str, float]:
    """Tr(H)/n of every logical matrix, from the whole Hessian."""
    parameters, loss = small()
    hessian = torch.autograd.functional.hessian(loss, (parameters["one"], parameters["two"]))
    one = hessian[0][0].reshape(12, 12).diagonal().reshape(3, 4)
    two = hessian[1][1].reshape(15, 15).diagonal().reshape(5, 3)
    return {"first": float(one.mean()), "upper": float(two[:2].mean()), "lower": float(two[2:].mean()), "turned": float(one.mean())}


def estimate(distribution: str, probes: int, seed: int = 0) -> dict[str, dict[str, float]]:
    parameters, loss = small()
    samples = traces(lambda _probe: loss(parameters["one"], parameters["two"]), parameters, MATRICES, params(distribution, probes, seed))
    return summarise(list(samples))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_estimates_are_within_four_standard_errors(distribution: str) -> None:
    """Oracle: the exact Hessian's trace. 400 probes pin it to a few per cent, so a wrong factor of 2 or 1/n would show."""
    found, exact = estimate(distribution, 400), exact_means()
    for name, value in exact.items():
        assert abs(found[name]["trace"] - value) < 4 * found[name]["stderr"]
    # The oracle has power: the matrix of the largest trace is known to a fifth of it.
    largest = max(exact, key=lambda name: exact[name])
    assert found[largest]["stderr"] < 0.2 * exact[largest]
    assert found["first"]["trace"] == pytest.approx(found["turned"]["trace"], rel=1e-12)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_standard_error_is_calibrated(distribution: str) -> None:
    """Oracle: z-scores (estimate − exact)/stderr over 60 independent seeds: spread 1, centre 0 within their own errors."""
    exact = exact_means()
    repeats = [estimate(distribution, 48, seed) for seed in range(1, 61)]
    z = torch.tensor([[(r[name]["trace"] - exact[name]) / r[name]["stderr"] for name in ("first", "upper", "lower")] for r in repeats])
    assert (z.std(0) > 0.75).all()
    assert (z.std(0) < 1.3).all()
    assert (z.mean(0).abs() < 0.5).all()


def test_rademacher_is_exact_for_a_diagonal_hessian() -> None:
    """Oracle: z_i² = 1, so Σ h_i w_i²/2 has the very trace Σ h_i at every probe; a Gaussian only in the mean."""
    w = torch.ones(2, 3, requires_grad=True)
    h = torch.arange(6.0).view(2, 3)
    matrices = {"w": ("w", Matrix("q", "w", "x"))}
    for sample in traces(lambda _probe: (h * w.square()).sum() / 2, {"w": w}, matrices, params("rademacher", 3)):
        assert sample["w"] == pytest.approx(2.5, rel=1e-6)
    gaussian = [s["w"] for s in traces(lambda _probe: (h * w.square()).sum() / 2, {"w": w}, matrices, params("gaussian", 3))]
    assert len(set(gaussian)) == 3


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_probe_vectors_are_white_and_keyed(distribution: str) -> None:
    """E[zzᵀ] = 1; the same for the same seed, name and probe, another for any other."""
    like = torch.zeros(200, 200)
    z = probe_vector("a", like, params(distribution, 2), 0)
    assert float(z.mean()) == pytest.approx(0, abs=0.02)
    assert float(z.square().mean()) == pytest.approx(1, abs=0.03)
    assert torch.equal(z, probe_vector("a", like, params(distribution, 9), 0))
    for other in (probe_vector("b", like, params(distribution, 2), 0), probe_vector("a", like, params(distribution, 2), 1)):
        assert abs(float((z * other).mean())) < 0.03
    assert abs(float((z * probe_vector("a", like, params(distribution, 2, seed=1), 0)).mean())) < 0.03
    if distribution == "rademacher":
        assert set(z.unique().tolist()) == {-1.0, 1.0}


def test_each_probe_gets_its_own_rows() -> None:
    """The loss is asked for probe 0, 1, 2, … once each, and the sample is that probe's."""
    asked: list[int] = []
    w = torch.ones(1, 1, requires_grad=True)

    def loss(probe: int) -> torch.Tensor:
        asked.append(probe)
        return (probe + 1) * w.square().sum() / 2

    samples = list(traces(loss, {"w": w}, {"w": ("w", Matrix("q", "w", "x"))}, params("rademacher", 4)))
    assert asked == [0, 1, 2, 3]
    assert [sample["w"] for sample in samples] == [1, 2, 3, 4]


def test_summary_by_hand() -> None:
    """Oracle: mean 2, sample variance 4, three probes: standard error 2/√3."""
    found = summarise([{"a": 0.0}, {"a": 2.0}, {"a": 4.0}])["a"]
    assert found["trace"] == 2
    assert found["stderr"] == pytest.approx(2 / 3**0.5)


def test_traces_through_attention_and_softmax() -> None:
    """Oracle: the exact Hessian diagonal of one matrix of a one-layer Llama, by one product per unit vector.

    The second derivative runs through attention, RMSNorm and the gate: what the fused kernel would refuse or get wrong.
    """
    model = AutoModelForCausalLM.from_config(
        make_config("llama", 1, hidden_size=8, intermediate_size=6, num_attention_heads=2, num_key_value_heads=1, vocab_size=11),
        attn_implementation="eager",
    )
    randomise(model, 0)
    rows = token_rows(2, 6) % 11
    parameters = {name: model.model.layers[0].get_parameter(name) for name in ("self_attn.q_proj.weight", "self_attn.v_proj.weight")}
    loss = model(rows, labels=rows, use_cache=False).loss
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    exact = {}
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        units = torch.eye(parameter.numel()).view(-1, *parameter.shape)
        rows_of_h = [torch.autograd.grad(gradient, parameter, unit, retain_graph=True)[0].flatten() for unit in units]
        exact[name] = float(torch.stack(rows_of_h).diagonal().mean())
    model.set_attn_implementation("sdpa")
    matrices = {name: (name, Matrix("q", name, "x")) for name in parameters}
    samples = traces(lambda _probe: model(rows, labels=rows, use_cache=False).loss, parameters, matrices, params("rademacher", 150))
    found = summarise(list(samples))
    for name, value in exact.items():
        assert abs(found[name]["trace"] - value) < 4 * found[name]["stderr"]
        assert found[name]["stderr"] < max(0.3 * abs(value), 1e-3)
