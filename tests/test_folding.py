"""Folding leaves the model's function alone. Oracle: the logits of the whole model in transformers, before and after."""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, load_full, load_tensors, make_config, power_of_two_factors, random_factors, token_rows
from transformers import PreTrainedModel

from pipeline_lib.models.architecture import Architecture, Coupling, Tie, architecture
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint
from pipeline_lib.models.folding import fold, site_factor
from pipeline_lib.models.stream import BlockModel, tapped

ROWS = token_rows(2, 12)
COUPLINGS = [(family, coupling.name) for family in FAMILIES for coupling in architecture(make_config(family)).couplings]
TIES = [
    (family, coupling.name, number)
    for family in FAMILIES
    for coupling in architecture(make_config(family)).couplings
    for number in range(len(coupling.ties))
]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(ROWS).logits
    return out


@cache
def dense_logits(path: Path, dtype: torch.dtype) -> torch.Tensor:
    return logits(load_full(path, dtype))


def folded_logits(
    checkpoint: Checkpoint, factors: dict[str, torch.Tensor], dtype: torch.dtype, table: Architecture | None = None
) -> torch.Tensor:
    """Logits in ``dtype`` after folding every block in ``dtype``."""
    model = load_full(checkpoint.path, dtype)
    for block in range(checkpoint.architecture.depth):
        tensors = {name: tensor.to(dtype) for name, tensor in checkpoint.block(block).items()}
        load_tensors(model, checkpoint, block, fold(tensors, table or checkpoint.architecture, factors))
    return logits(model)


def sizes(checkpoint: Checkpoint, only: str | None = None) -> dict[str, int]:
    return {c.name: c.size for c in checkpoint.architecture.couplings if only in (None, c.name)}


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the logits' own scale."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


@pytest.mark.parametrize(("family", "coupling"), COUPLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_powers_of_two_fold_bit_for_bit(model_paths: dict[str, Path], family: str, coupling: str, dtype: torch.dtype) -> None:
    """Oracle: the unfolded logits, to the last bit, since powers of two round nowhere."""
    checkpoint = open_checkpoint(model_paths[family])
    factors = power_of_two_factors(sizes(checkpoint, coupling), seed=1)
    assert torch.equal(folded_logits(checkpoint, factors, dtype), dense_logits(checkpoint.path, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_couplings_at_once_fold_bit_for_bit(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Oracle: the unfolded logits; each matrix takes up to three factors here (q: norm, Q/K; v: norm, v/o)."""
    factors = power_of_two_factors(sizes(checkpoint), seed=2)
    assert torch.equal(folded_logits(checkpoint, factors, dtype), dense_logits(checkpoint.path, dtype))


@pytest.mark.parametrize(("family", "coupling"), COUPLINGS)
def test_random_factors_keep_the_logits(model_paths: dict[str, Path], family: str, coupling: str) -> None:
    """Oracle: the unfolded logits, to rounding, for factors over three orders of magnitude.

    float64: 1e-9 for OPT, which computes in float64 throughout. Llama's RMSNorm casts its input to float32, where a double's last
    bit can tip a value to the neighbouring float32 (6e-8 relative): errors below about 1e-7 are beyond what can be asked of it.
    bfloat16: three times what bfloat16 itself costs the unfolded model.
    """
    checkpoint = open_checkpoint(model_paths[family])
    factors = random_factors(sizes(checkpoint, coupling), seed=3)
    exact = dense_logits(checkpoint.path, torch.float64)
    assert gap(folded_logits(checkpoint, factors, torch.float64), exact) < (1e-9 if family.startswith("opt") else 3e-7)
    single = dense_logits(checkpoint.path, torch.float32)
    assert gap(folded_logits(checkpoint, factors, torch.float32), single) < 1e-5
    half = dense_logits(checkpoint.path, torch.bfloat16)
    own_rounding = gap(half, single)
    assert gap(folded_logits(checkpoint, factors, torch.bfloat16), single) < 3 * own_rounding


@pytest.mark.parametrize(("family", "coupling", "number"), TIES)
@pytest.mark.parametrize("mistake", ["power", "index", "dropped"])
def test_a_wrong_tie_would_be_caught(model_paths: dict[str, Path], family: str, coupling: str, number: int, mistake: str) -> None:
    """The oracle above has power: one tie with the wrong power, a shifted index or left out moves the logits."""
    checkpoint = open_checkpoint(model_paths[family])
    table = checkpoint.architecture
    right = next(c for c in table.couplings if c.name == coupling)
    tie = right.ties[number]
    wrong: dict[str, tuple[Tie, ...]] = {
        "power": (dataclasses.replace(tie, power=-tie.power),),
        "index": (dataclasses.replace(tie, index=(*tie.index[1:], tie.index[0])),),
        "dropped": (),
    }
    ties = (*right.ties[:number], *wrong[mistake], *right.ties[number + 1 :])
    changed = tuple(dataclasses.replace(c, ties=ties) if c is right else c for c in table.couplings)
    factors = random_factors({coupling: right.size}, seed=4, decades=1.5)
    moved = gap(
        folded_logits(checkpoint, factors, torch.float32, dataclasses.replace(table, couplings=changed)),
        dense_logits(checkpoint.path, torch.float32),
    )
    if tie.parameter == "self_attn.k_proj.bias" and family.startswith("opt"):
        # Without rotation q·(k_j + b) shifts all of a query's logits alike, and the softmax cannot tell: K's bias does nothing.
        assert moved < 1e-5
    else:
        assert moved > 1e-3


def test_fold_checks_shapes_and_leaves_its_input_alone(checkpoint: Checkpoint) -> None:
    tensors = checkpoint.block(0)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    coupling = checkpoint.architecture.couplings[0]
    with pytest.raises(ValueError, match="takes factors of shape"):
        fold(tensors, checkpoint.architecture, {coupling.name: torch.ones(coupling.size + 1)})
    fold(tensors, checkpoint.architecture, random_factors(sizes(checkpoint), seed=5))
    assert all(torch.equal(tensors[name], before[name]) for name in before)
    assert fold(tensors, checkpoint.architecture, {}).keys() == tensors.keys()


def test_fold_rounds_once_and_honours_an_offset() -> None:
    """Oracle: the product by hand. Gemma keeps its norm weight as 1 + w, so 2·(1 + w) − 1 is stored; bfloat16 rounds only at the end."""
    weight = torch.tensor([0.25, -0.5], dtype=torch.bfloat16)
    table = Architecture("x", "layers", 1, 2, (), (), (Coupling("c", 2, (Tie("w", 0, (1, 0), 1, offset=1.0),)),))
    folded = fold({"w": weight}, table, {"c": torch.tensor([3.0, 1.3])})["w"]
    exact = torch.tensor([1.25 * torch.tensor(1.3).item() - 1, 0.5 * 3 - 1], dtype=torch.float64)
    assert folded.dtype == torch.bfloat16
    assert torch.equal(folded, exact.to(torch.bfloat16))


def test_factors_of_ties_cancel(checkpoint: Checkpoint) -> None:
    """Every coupling divides as well as multiplies, its indices stay in range and reach every factor, and its parameters exist."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.block(0).items()}
    for coupling in checkpoint.architecture.couplings:
        assert {tie.power for tie in coupling.ties} == {1, -1}
        for tie in coupling.ties:
            assert len(tie.index) == shapes[tie.parameter][tie.axis]
            assert set(tie.index) == set(range(coupling.size))


def test_table_names_exist_and_cover_every_linear(checkpoint: Checkpoint) -> None:
    """Oracle: the stored names. Each 2-D parameter of a block is one logical matrix, and its bias is named where there is one."""
    tensors = checkpoint.block(0)
    matrices = checkpoint.architecture.matrices
    assert {m.parameter for m in matrices} == {name for name, tensor in tensors.items() if tensor.ndim == 2}
    assert len({m.label for m in matrices}) == len(matrices)
    norms = {tie.parameter for c in checkpoint.architecture.couplings for tie in c.ties if "norm" in tie.parameter}
    assert norms <= tensors.keys()
    for matrix in matrices:
        assert (matrix.bias in tensors) == (matrix.bias is not None)
        assert (matrix.parameter.replace(".weight", ".bias") in tensors) == (matrix.bias is not None)
        assert matrix.site in {site.name for site in checkpoint.architecture.sites}


def test_sites_capture_what_their_consumers_see(checkpoint: Checkpoint) -> None:
    """Oracle: hooks on every consumer. All consumers of a site get the tensor that the site's module gets, of len(index) channels."""
    model = BlockModel(checkpoint, torch.float32, torch.device("cpu"))
    stream = model.embed(ROWS, 2)
    block = model.block(0)
    table = checkpoint.architecture
    seen: dict[str, torch.Tensor] = {}
    modules = {matrix.label: matrix.label for matrix in table.matrices} | {f"site {site.name}": site.module for site in table.sites}
    with tapped(block, modules, seen.__setitem__):
        model.advance(block, 0, stream)
    for site in table.sites:
        captured = seen[f"site {site.name}"]
        assert captured.shape == (ROWS.numel(), len(site.index))
        for matrix in table.consumers(site.name):
            assert torch.equal(seen[matrix.label], captured)
            assert checkpoint.block(0)[matrix.parameter].shape[1] == len(site.index)


def test_site_factor_is_what_the_activations_are_multiplied_by(checkpoint: Checkpoint) -> None:
    """Oracle: the activations of the folded block: X' = D X to the last bit for powers of two, X' = X where nothing scales a site."""
    model = BlockModel(checkpoint, torch.float32, torch.device("cpu"))
    factors = power_of_two_factors(sizes(checkpoint), seed=6)
    table = checkpoint.architecture
    captured: list[dict[str, torch.Tensor]] = []
    for chosen in ({}, factors):
        stream = model.embed(ROWS, 2)
        block = model.block(0, fold(checkpoint.block(0), table, chosen))
        captured.append({})
        with tapped(block, {site.name: site.module for site in table.sites}, captured[-1].__setitem__):
            model.advance(block, 0, stream)
    scaled = 0
    for site in table.sites:
        factor = site_factor(table, site.name, factors)
        scaled += factor is not None
        expected = captured[0][site.name] * (1 if factor is None else factor)
        assert torch.equal(captured[1][site.name], expected)
        assert site_factor(table, site.name, {}) is None
    assert scaled == (4 if table.family == "llama" or "attention_norm" in factors else 2)


def test_options_of_a_config_change_the_table() -> None:
    """What a config switches off is not offered: GELU carries no factor, post-norm and affine-free norms absorb none."""
    names = {c.name for c in architecture(make_config("opt", activation_function="gelu")).couplings}
    assert names == {"v_o", "q_k", "attention_norm", "mlp_norm"}
    assert {c.name for c in architecture(make_config("opt-post")).couplings} == {"v_o", "q_k", "fc1_fc2"}
    assert {c.name for c in architecture(make_config("opt", layer_norm_elementwise_affine=False)).couplings} == {"v_o", "q_k", "fc1_fc2"}
    assert architecture(make_config("opt", enable_bias=False)).matrices[0].bias is None


def test_rotated_pairs_and_grouped_queries_share_a_factor() -> None:
    """Oracle: the rotary layout i ↔ i + size/2 and the 2 query heads per key head of the tiny Llama (size 8)."""
    q_k = next(c for c in architecture(make_config("llama")).couplings if c.name == "q_k")
    ties = {tie.parameter: tie for tie in q_k.ties}
    keys, queries = ties["self_attn.k_proj.weight"].index, ties["self_attn.q_proj.weight"].index
    assert q_k.size == 2 * 4
    for head in range(2):
        for i in range(4):
            assert keys[head * 8 + i] == keys[head * 8 + i + 4] == head * 4 + i
    assert queries == tuple(keys[(head // 2) * 8 + i] for head in range(4) for i in range(8))
