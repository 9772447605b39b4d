"""Folding leaves the model's function alone. Oracle: the logits of the whole model in transformers,
before and after.
"""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import (
    ALL_FAMILIES,
    discovered,
    load_full,
    load_tensors,
    make_config,
    noting,
    power_of_two_factors,
    random_factors,
    token_rows,
)
from transformers import PreTrainedModel

from pipeline_lib.models.architecture import Coupling, Layout, Tie
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint
from pipeline_lib.models.folding import fold, site_factor
from pipeline_lib.models.stream import BlockModel, tapped

ROWS = token_rows(2, 12)
TABLES = {family: discovered(make_config(family)) for family in ALL_FAMILIES}
COUPLINGS = [(family, coupling.name) for family, table in TABLES.items() for coupling in table.couplings]
MISTAKES = [  # every tie left out; the others once in each coupling
    (family, coupling.name, number, mistake)
    for family, table in TABLES.items()
    for coupling in table.couplings
    for number, tie in enumerate(coupling.ties)
    for mistake in (
        "dropped",
        *(["power", "index"] if number == 0 else []),
        *(["positions"] if tie.positions else []),
    )
]
UNROTATED = ("opt", "opt-post", "gpt2", "gpt2-relu", "bloom")


@pytest.fixture(params=ALL_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family of the table and every kind of config, instead of the few that other tests run on."""
    return str(request.param)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(ROWS).logits
    return out


@cache
def dense_logits(path: Path, dtype: torch.dtype) -> torch.Tensor:
    return logits(load_full(path, dtype))


@cache
def shared_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A whole model whose blocks are overwritten by each test."""
    return load_full(path, dtype)


def folded_logits(
    checkpoint: Checkpoint, factors: dict[str, torch.Tensor], dtype: torch.dtype, table: Layout | None = None
) -> torch.Tensor:
    """Logits in ``dtype`` after folding every block in ``dtype``."""
    model = shared_model(checkpoint.path, dtype)
    for block in range(checkpoint.architecture.depth):
        tensors = {name: tensor.to(dtype) for name, tensor in checkpoint.block(block).items()}
        load_tensors(
            model, checkpoint, block, fold(tensors, table or checkpoint.architecture.layouts[0], factors)
        )
    return logits(model)


def sizes(checkpoint: Checkpoint, only: str | None = None) -> dict[str, int]:
    return {c.name: c.size for c in checkpoint.architecture.layouts[0].couplings if only in (None, c.name)}


def lost_precision(checkpoint: Checkpoint, factors: dict[str, torch.Tensor]) -> float:
    """By how much Gemma's 1 + w magnifies rounding: w is stored, and of 1 + w = d (1 + w₀) ≪ 1 the
    unit's last bit is all that is left.

    0 where no tie has an offset: nothing at all is lost.
    """
    kept = [
        float(
            (tie.offset + tensors[tie.parameter].double())
            .mul(factors[coupling.name][torch.tensor(tie.index)])
            .min()
        )
        for coupling in checkpoint.architecture.layouts[0].couplings
        for tie in coupling.ties
        if tie.offset and coupling.name in factors
        for tensors in map(checkpoint.block, range(checkpoint.architecture.depth))
    ]
    return max(1, 1 / min(kept)) if kept else 0


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the logits' own scale."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def assert_folds_exactly(
    checkpoint: Checkpoint, factors: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Bit for bit; with Gemma's norms to one rounding of w, magnified."""
    folded, dense = folded_logits(checkpoint, factors, dtype), dense_logits(checkpoint.path, dtype)
    if lost := lost_precision(checkpoint, factors):
        assert 0 < gap(folded, dense) < torch.finfo(dtype).eps * lost
    else:
        assert torch.equal(folded, dense)


@pytest.mark.parametrize(("family", "coupling"), COUPLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_powers_of_two_fold_bit_for_bit(
    model_paths: dict[str, Path], family: str, coupling: str, dtype: torch.dtype
) -> None:
    """Oracle: the unfolded logits, to the last bit, since powers of two round nowhere."""
    checkpoint = open_checkpoint(model_paths[family])
    assert_folds_exactly(checkpoint, power_of_two_factors(sizes(checkpoint, coupling), seed=1), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_couplings_at_once_fold_bit_for_bit(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Oracle: the unfolded logits; each matrix takes up to three factors here (q: norm, Q/K; v:
    norm, v/o).
    """
    assert_folds_exactly(checkpoint, power_of_two_factors(sizes(checkpoint), seed=2), dtype)


@pytest.mark.parametrize(("family", "coupling"), COUPLINGS)
def test_random_factors_keep_the_logits(model_paths: dict[str, Path], family: str, coupling: str) -> None:
    """Oracle: the unfolded logits, to rounding, for factors over three orders of magnitude.

    float64: 1e-9 for the families that compute in float64 throughout. RMSNorm and BLOOM's softmax
    cast to float32, where a double's last bit can tip a value to the neighbouring float32 (6e-8
    relative): errors below about 1e-7 are beyond what can be asked of them. bfloat16: three times
    what bfloat16 itself costs the unfolded model. Gemma's norms: as much more as they magnify the
    rounding.
    """
    checkpoint = open_checkpoint(model_paths[family])
    factors = random_factors(sizes(checkpoint, coupling), seed=3)
    lost = max(1.0, lost_precision(checkpoint, factors))
    exact = dense_logits(checkpoint.path, torch.float64)
    double = family.startswith(("opt", "gpt"))
    assert gap(folded_logits(checkpoint, factors, torch.float64), exact) < (1e-9 if double else 3e-7 * lost)
    single = dense_logits(checkpoint.path, torch.float32)
    assert gap(folded_logits(checkpoint, factors, torch.float32), single) < 1e-5
    half = dense_logits(checkpoint.path, torch.bfloat16)
    own_rounding = gap(half, single)
    assert gap(folded_logits(checkpoint, factors, torch.bfloat16), single) < 3 * own_rounding * lost


@pytest.mark.parametrize(("family", "coupling", "number", "mistake"), MISTAKES)
def test_a_wrong_tie_would_be_caught(
    model_paths: dict[str, Path], family: str, coupling: str, number: int, mistake: str
) -> None:
    """The oracle above has power: one tie with the wrong power, a shifted index, on shifted entries
    or left out moves the logits.
    """
    checkpoint = open_checkpoint(model_paths[family])
    table = checkpoint.architecture.layouts[0]
    right = next(c for c in table.couplings if c.name == coupling)
    tie = right.ties[number]
    entries = checkpoint.block(0)[tie.parameter].shape[tie.axis]
    wrong: dict[str, tuple[Tie, ...]] = {
        "power": (dataclasses.replace(tie, power=-tie.power),),
        "index": (dataclasses.replace(tie, index=(*tie.index[1:], tie.index[0])),),
        "dropped": (),
        "positions": (
            dataclasses.replace(tie, positions=tuple((i - 1) % entries for i in tie.positions or ())),
        ),
    }
    ties = (*right.ties[:number], *wrong[mistake], *right.ties[number + 1 :])
    changed = tuple(dataclasses.replace(c, ties=ties) if c is right else c for c in table.couplings)
    factors = random_factors({coupling: right.size}, seed=4, decades=1.5)
    moved = gap(
        folded_logits(checkpoint, factors, torch.float32, dataclasses.replace(table, couplings=changed)),
        dense_logits(checkpoint.path, torch.float32),
    )
    if (
        coupling == "q_k"
        and family in UNROTATED
        and tie.parameter.endswith("bias")
        and tie.power > 0
        and mistake != "positions"
    ):
        # Without rotation q·(k_j + b) shifts all of a query's logits alike, and the softmax cannot
        # tell: K's bias does nothing.
        assert moved < 1e-5
    else:
        assert moved > 1e-4


def test_fold_checks_shapes_and_leaves_its_input_alone(checkpoint: Checkpoint) -> None:
    tensors = checkpoint.block(0)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    coupling = checkpoint.architecture.layouts[0].couplings[0]
    with pytest.raises(ValueError, match="takes factors of shape"):
        fold(tensors, checkpoint.architecture.layouts[0], {coupling.name: torch.ones(coupling.size + 1)})
    fold(tensors, checkpoint.architecture.layouts[0], random_factors(sizes(checkpoint), seed=5))
    assert all(torch.equal(tensors[name], before[name]) for name in before)
    assert fold(tensors, checkpoint.architecture.layouts[0], {}).keys() == tensors.keys()


def test_fold_rounds_once_and_honours_an_offset() -> None:
    """Oracle: the product by hand. Gemma keeps its norm weight as 1 + w, so 2·(1 + w) − 1 is
    stored; bfloat16 rounds only at the end.
    """
    weight = torch.tensor([0.25, -0.5], dtype=torch.bfloat16)
    table = Layout((), (), (Coupling("c", 2, (Tie("w", 0, (1, 0), 1, offset=1.0),)),))
    folded = fold({"w": weight}, table, {"c": torch.tensor([3.0, 1.3])})["w"]
    exact = torch.tensor([1.25 * torch.tensor(1.3).item() - 1, 0.5 * 3 - 1], dtype=torch.float64)
    assert folded.dtype == torch.bfloat16
    assert torch.equal(folded, exact.to(torch.bfloat16))


def test_factors_of_ties_cancel(checkpoint: Checkpoint) -> None:
    """Every coupling divides as well as multiplies, its indices stay in range and reach every
    factor, and its parameters exist.
    """
    shapes = {name: tensor.shape for name, tensor in checkpoint.block(0).items()}
    for coupling in checkpoint.architecture.layouts[0].couplings:
        assert {tie.power for tie in coupling.ties} == {1, -1}
        for tie in coupling.ties:
            assert len(tie.entries(torch.empty(shapes[tie.parameter]))) == len(tie.index)
            assert set(tie.index) == set(range(coupling.size))


def test_table_names_exist_and_cover_every_linear(checkpoint: Checkpoint) -> None:
    """Oracle: the stored names. Each 2-D parameter of a block is one logical matrix, and its bias
    is named where there is one.
    """
    tensors = checkpoint.block(0)
    matrices = checkpoint.architecture.layouts[0].matrices
    assert {m.parameter for m in matrices} == {name for name, tensor in tensors.items() if tensor.ndim == 2}
    assert len({m.label for m in matrices}) == len(matrices)
    assert {
        tie.parameter for c in checkpoint.architecture.layouts[0].couplings for tie in c.ties
    } <= tensors.keys()
    stored = {name: tensor.numel() for name, tensor in tensors.items() if tensor.ndim == 2}
    for matrix in matrices:
        stored[matrix.parameter] -= matrix.view(tensors[matrix.parameter]).numel()
        assert (matrix.bias in tensors) == (matrix.bias is not None)
        assert matrix.bias is None or len(matrix.bias_view(tensors[matrix.bias])) == len(
            matrix.view(tensors[matrix.parameter])
        )
        assert (matrix.parameter.replace(".weight", ".bias") in tensors) == (matrix.bias is not None)
        assert matrix.site in {site.name for site in checkpoint.architecture.layouts[0].sites}
    assert set(stored.values()) == {0}, "every weight belongs to exactly one logical matrix"


def test_sites_capture_what_their_consumers_see(checkpoint: Checkpoint) -> None:
    """Oracle: hooks on every consumer. All consumers of a site get the tensor that the site's
    module gets, of len(index) channels.
    """
    model = BlockModel(checkpoint, torch.float32, torch.device("cpu"))
    stream = model.embed(ROWS, 2)
    block = model.block(0)
    table = checkpoint.architecture.layouts[0]
    seen: dict[str, torch.Tensor] = {}
    modules = {matrix.parameter: matrix.parameter.removesuffix(".weight") for matrix in table.matrices}
    sites: dict[str, torch.Tensor] = {}
    for name, path in modules.items():

        def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
            seen[name] = inputs[0].reshape(-1, inputs[0].shape[-1])

        block.get_submodule(path).register_forward_pre_hook(hook)
    with tapped(block, table.sites, noting(sites)):
        model.advance(block, 0, stream)
    for site in table.sites:
        captured = sites[site.name]
        assert captured.shape == (ROWS.numel(), len(site.index))
        for matrix in table.consumers(site.name):
            assert torch.equal(seen[matrix.parameter], captured)
            assert checkpoint.matrix_shape(0, matrix)[1] == len(site.index)


def test_site_factor_is_what_the_activations_are_multiplied_by(checkpoint: Checkpoint) -> None:
    """Oracle: the activations of the folded block: X' = D X to the last bit for powers of two, X' =
    X where nothing scales a site.

    Gemma's norms, as above: to a few of float32's last bits, magnified.
    """
    model = BlockModel(checkpoint, torch.float32, torch.device("cpu"))
    factors = power_of_two_factors(sizes(checkpoint), seed=6)
    table = checkpoint.architecture.layouts[0]
    captured: list[dict[str, torch.Tensor]] = []
    for chosen in ({}, factors):
        stream = model.embed(ROWS, 2)
        block = model.block(0, fold(checkpoint.block(0), table, chosen))
        captured.append({})
        with tapped(block, table.sites, noting(captured[-1])):
            model.advance(block, 0, stream)
    scaled, lost = 0, lost_precision(checkpoint, factors)
    for site in table.sites:
        factor = site_factor(table, site.name, factors)
        scaled += factor is not None
        expected = captured[0][site.name] * (1 if factor is None else factor)
        torch.testing.assert_close(
            captured[1][site.name], expected, rtol=4 * torch.finfo(torch.float32).eps * lost, atol=1e-5 * lost
        )
        assert site_factor(table, site.name, {}) is None
    # Q/K factors scale no site; every other coupling scales one
    assert scaled == len(factors) - ("q_k" in factors)
