"""Balanced starts of pairs of matrices. Oracle: norms of the folded entries, summed over the
table's ties, in every family.
"""

from typing import Any

import pytest
import torch
from tiny import ALL_FAMILIES, block_statistics

from pipeline_lib.induce.scale import ScaleParams, starting_factors
from pipeline_lib.models.architecture import Coupling
from pipeline_lib.models.checkpoint import Checkpoint
from pipeline_lib.models.folding import fold
from pipeline_lib.stats.moments import SiteStatistics

Tensors = dict[str, torch.Tensor]
NORMS = ("attention_norm", "mlp_norm")


@pytest.fixture(params=ALL_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def statistics(checkpoint: Checkpoint) -> dict[str, SiteStatistics]:
    return block_statistics(checkpoint)[0]


def scaling(pairs: str = "balance", **changes: Any) -> ScaleParams:
    values = {
        "start": "second_moment",
        "monotone": "identity",
        "power": 0.5,
        "limit": 50.0,
        "pairs": pairs,
        "shift": "none",
    }
    return ScaleParams.model_validate({**values, **changes})


def norms(coupling: Coupling, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared norms of the matrices' entries behind each factor, on the multiplied and on the
    divided side, one entry after another.
    """
    sides = torch.zeros(2, coupling.size, dtype=torch.float64)
    for tie in coupling.ties:
        tensor = tensors[tie.parameter].double()
        if tensor.ndim == 2:
            for place, index in zip(tie.positions or range(len(tie.index)), tie.index, strict=True):
                sides[0 if tie.power > 0 else 1, index] += tensor.select(tie.axis, place).square().sum()
    return sides[0], sides[1]


def balanced_names(checkpoint: Checkpoint, pairs: str) -> set[str]:
    names = {coupling.name for coupling in checkpoint.architecture.layouts[0].couplings} - set(NORMS)
    return names if pairs == "balance" else names & {"q_k"}


@pytest.mark.parametrize("pairs", ["balance", "inputs"])
def test_pairs_start_with_equal_norms(
    checkpoint: Checkpoint, statistics: dict[str, SiteStatistics], pairs: str
) -> None:
    """Once everything is folded both sides' norms have one ratio over all of a pair's channels (its
    geometric mean is 1, not the ratio's).
    """
    table, tensors = checkpoint.architecture.layouts[0], checkpoint.block(0)
    factors = starting_factors(table, tensors, statistics, scaling(pairs))
    assert factors.keys() == {coupling.name for coupling in table.couplings}
    wanted = balanced_names(checkpoint, pairs)
    norm_factors = {name: factor for name, factor in factors.items() if name in NORMS}
    for coupling in table.couplings:
        assert abs(float(factors[coupling.name].log().mean())) < 1e-4
        if coupling.name in wanted:
            up, down = norms(
                coupling, fold(tensors, table, norm_factors | {coupling.name: factors[coupling.name]})
            )
            ratio = up / down
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0)
            before, after = norms(coupling, fold(tensors, table, norm_factors))
            assert float((before / after).log().std()) > 0.01  # not balanced as it was
    # per-head norms: no Q/K pair
    assert wanted or (checkpoint.architecture.family, pairs) == ("qwen3", "inputs")


def test_a_dead_unit_takes_no_factor(checkpoint: Checkpoint, statistics: dict[str, SiteStatistics]) -> None:
    """Rows of zeros on one side: the factor is that of an already balanced channel, all are finite,
    and folding keeps zeros zero.

    Oracle: log of the factor is minus the mean of what the other channels need, as geometric mean 1
    leaves it.
    """
    table, tensors = checkpoint.architecture.layouts[0], checkpoint.block(0)
    for coupling in table.couplings:
        if coupling.name in NORMS:
            continue
        for power in (1, -1):
            dead = {name: tensor.clone() for name, tensor in tensors.items()}
            for tie in coupling.ties:
                if tie.power == power and dead[tie.parameter].ndim == 2:
                    for place, index in zip(tie.positions or range(len(tie.index)), tie.index, strict=True):
                        if index == 0:
                            dead[tie.parameter].select(tie.axis, place).zero_()
            factors = starting_factors(table, dead, statistics, scaling())
            norm_factors = {name: factor for name, factor in factors.items() if name in NORMS}
            up, down = norms(coupling, fold(dead, table, norm_factors))
            assert float((up, down)[0 if power > 0 else 1][0]) == 0
            needed = (down[1:] / up[1:]).log() / 4
            expected = torch.cat([torch.zeros(1, dtype=torch.float64), needed])
            torch.testing.assert_close(
                factors[coupling.name].double().log(), expected - expected.mean(), rtol=1e-3, atol=1e-3
            )
            folded = fold(dead, table, factors)
            assert all(bool(torch.isfinite(tensor).all()) for tensor in folded.values())


def test_all_zero_matrices_start_at_one(
    checkpoint: Checkpoint, statistics: dict[str, SiteStatistics]
) -> None:
    """Oracle: 1 everywhere: nothing to balance."""
    table = checkpoint.architecture.layouts[0]
    tensors = {name: tensor * (tensor.ndim == 1) for name, tensor in checkpoint.block(0).items()}
    factors = starting_factors(table, tensors, statistics, scaling())
    for name in balanced_names(checkpoint, "balance"):
        assert torch.equal(factors[name], torch.ones_like(factors[name]))
