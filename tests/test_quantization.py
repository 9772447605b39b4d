"""Quantisation. Oracles: every level of a grid by enumeration, GPTQ and SparseGPT written out
column by column in float64 with explicit inverses, and the stored weights themselves, read back.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from project import WANDA, build, change_params, make_workspace, recipe
from rules import PLAIN, rule
from tiny import all_tensors, curved_gram, make_model, module_of, token_rows

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.fit.scales import Scales
from pipeline_lib.masks.scores import saliency
from pipeline_lib.masks.select import select
from pipeline_lib.masks.settings import Group, Pattern
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.checkpoint import open_checkpoint
from pipeline_lib.models.stream import BlockModel
from pipeline_lib.models.transform import Transform
from pipeline_lib.prune.plan import plan
from pipeline_lib.prune.run import Rows, Source, prune
from pipeline_lib.prune.window import Block
from pipeline_lib.recipe.settings import Recipe
from pipeline_lib.solve.factor import factorise, layer_error
from pipeline_lib.solve.grid import Grid, Scheme, scheme
from pipeline_lib.solve.order import rose_order
from pipeline_lib.solve.settings import QuantizationParams
from pipeline_lib.solve.size import packed_bits
from pipeline_lib.solve.sweep import quantise, sweep

CPU = torch.device("cpu")
FOUR = Scheme(4, 8, True, torch.float32)
SCHEMES = [
    FOUR,
    replace(FOUR, symmetric=False),
    Scheme(3, 7, True, torch.float32),  # ragged, and astride column blocks
    Scheme(3, 5, False, torch.float32),
    Scheme(2, None, False, torch.float32),
    Scheme(8, 16, True, torch.bfloat16),
]


def weights(rows: int, columns: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    return spread * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def levels(scheme: Scheme, scale: float, zero: float) -> torch.Tensor:
    """Every weight that a group can hold, in float64."""
    least, most = (
        (-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1)
        if scheme.symmetric
        else (0, 2**scheme.bits - 1)
    )
    return scale * (torch.arange(least, most + 1, dtype=torch.float64) - zero)


def ranged(scheme: Scheme, row: torch.Tensor) -> tuple[float, float]:
    """Scale and zero point of one group as the formulas have them, number by number."""
    low, high = min(0.0, float(row.min())), max(0.0, float(row.max()))
    width = 2 * max(-low, high) if scheme.symmetric else high - low
    scale = float(torch.tensor(width / (2**scheme.bits - 1) if width else 1.0).to(scheme.dtype))
    zero = 0.0 if scheme.symmetric else float(min(max(round(-low / scale), 0), 2**scheme.bits - 1))
    return scale, zero


def nearest(weight: float, scheme: Scheme, scale: float, zero: float) -> float:
    grid = levels(scheme, scale, zero)
    return float(grid[(grid - weight).abs().argmin()])


# The grid


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_finds_the_nearest_level(scheme: Scheme) -> None:
    """Oracle: all levels of every group, tried one by one; scales by the formulas."""
    weight = weights(9, 19, seed=1)
    weight[0, :8], weight[1, 4:16], weight[2] = 0, weight[1, 4:16].abs(), -weight[2].abs()
    grid = Grid(weight.shape, scheme, CPU)
    found = grid.nearest(weight)
    width = scheme.group or 19
    assert grid.scale.shape == (9, -(-19 // min(width, 19)))
    whole = Grid(weight.shape, replace(scheme), CPU).nearest(weight)
    for group, (part, own, full) in enumerate(
        zip(*(t.split(width, dim=1) for t in (weight, found, whole)), strict=True)
    ):
        assert ((own - part).square().sum(1) <= (full - part).square().sum(1)).all()
        for r in range(9):
            scale, zero = float(grid.scale[r, group]), float(grid.zero[r, group])
            assert (scale, zero) == pytest.approx(ranged(scheme, part[r]), rel=1e-6)
            assert scale > 0
            for w, q in zip(part[r].tolist(), own[r].tolist(), strict=True):
                possible = levels(scheme, scale, zero)
                assert float((possible - q).abs().min()) < 1e-6 * scale
                assert abs(w - q) <= abs(w - nearest(w, scheme, scale, zero)) + 1e-6 * scale
    assert float(grid.error) == pytest.approx(
        float((weight - found).square().sum() / weight.square().sum()), rel=1e-5
    )


@settings(max_examples=200, deadline=None)
@given(
    bits=st.integers(2, 8),
    group=st.one_of(st.none(), st.integers(1, 40)),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 33),
    spread=st.sampled_from([1e-6, 1e-3, 1.0, 50.0]),
    seed=st.integers(0, 99),
)
def test_codes_come_back_from_what_is_stored(
    bits: int,
    group: int | None,
    symmetric: bool,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    spread: float,
    seed: int,
) -> None:
    """Rounded to the checkpoint's dtype and read back, every weight gives its code, and code and
    scale give it back to the bit; zeros are +0.
    """
    how = QuantizationParams(
        bits=bits, group=group or "row", symmetric=symmetric, scales="checkpoint", refit=[]
    )
    if bits == 8 and not symmetric and dtype == torch.bfloat16:
        with pytest.raises(
            SparselineError, match=r"bfloat16 .* asymmetric codes of 8 bits; set quantization.symmetric"
        ):
            scheme(how, dtype)
        return
    chosen = scheme(how, dtype)
    assert chosen is not None
    weight = weights(rows, columns, seed, spread) * (weights(rows, columns, seed + 1) > -0.5)
    weight = weight.abs() if seed % 2 else weight  # all codes on one side of zero
    grid = Grid(weight.shape, chosen, CPU)
    found = grid.nearest(weight)
    stored = found.to(dtype)
    tensors = grid.tensors("x")
    assert tensors["x.scale"].dtype == torch.float32
    assert torch.equal(tensors["x.scale"].to(dtype).float(), tensors["x.scale"])
    assert tensors.keys() == ({"x.scale"} if symmetric else {"x.scale", "x.zero_point"})
    width = min(group or columns, columns)
    scale = tensors["x.scale"].repeat_interleave(width, 1)[:, :columns]
    zero = (
        0 if symmetric else tensors["x.zero_point"].to(torch.int32).repeat_interleave(width, 1)[:, :columns]
    )
    codes = (stored.float() / scale).round().to(torch.int32) + zero
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    assert low <= int(codes.min()) <= int(codes.max()) <= high
    assert torch.equal((scale * (codes - zero)).to(dtype).view(torch.uint8), stored.view(torch.uint8))
    assert torch.equal(grid.steps(stored), grid.steps(found))
    assert not stored[weight == 0].view(torch.uint8).any()


def test_scales_are_never_rounded_to_nothing() -> None:
    """Float16 has no number between 0 and 6e-8: weights below it are 0, but scales are not. Oracle:
    finite codes.
    """
    grid = Grid((1, 4), replace(FOUR, group=None, dtype=torch.float16), CPU)
    found = grid.nearest(torch.tensor([[1e-9, -1e-9, 0, 2e-9]]))
    assert float(grid.scale) == 2**-24
    assert not found.any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [8, 5, "row"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_sizes_by_counting(bits: int, group: Any, symmetric: bool) -> None:
    """Oracle: a loop over kept weights, mask bits and groups."""
    how = QuantizationParams(bits=bits, group=group, symmetric=symmetric, scales="checkpoint", refit=[])
    groups = 6 * len(range(0, 19, 19 if group == "row" else group))
    scales = sum(16 + (0 if symmetric else bits) for _ in range(groups))
    assert packed_bits((6, 19), 50, how) == 6 * 19 + sum(bits for _ in range(50)) + scales
    assert packed_bits((6, 19), 6 * 19, how) == sum(bits for _ in range(6 * 19)) + scales
    assert packed_bits((6, 19), 50, how.model_copy(update={"bits": None})) == 6 * 19 + 16 * 50


def test_half_of_the_weights_at_four_bits_take_less_than_three_and_a_quarter() -> None:
    """Groups of 128, scales and mask included: 1 + 2 + 16/128 bits."""
    how = QuantizationParams(bits=4, group=128, symmetric=True, scales="checkpoint", refit=[])
    assert packed_bits((4096, 4096), 4096 * 4096 // 2, how) / 4096**2 == 3.125


# The sweep


def literal(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: Scheme,
    mask: torch.Tensor | None,
    choose_at: Mapping[int, tuple[int, int]],
    order: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseGPT with quantisation (2301.00774, Algorithm 1 and Section 3.5) as GPTQ's first form:
    one column after the other, in float64, the inverse of what is left of H anew for every column,
    no blocks.

    Args:
        mask: given; or None, where the best by w²/[H⁻¹]_mm are chosen on the way.
        choose_at: column -> how many columns from there are chosen from then, and how many of them
            a row keeps; 0: of all rows together, half.
        order: the columns as they are taken.
    """
    order = order or list(range(weight.shape[1]))
    place = {c: i for i, c in enumerate(order)}
    w = weight.double().clone()
    chosen = torch.ones_like(w, dtype=torch.bool) if mask is None else mask.clone()
    width = scheme.group or weight.shape[1]
    scales: dict[int, list[tuple[float, float]]] = {}
    for i, m in enumerate(order):
        left = order[i:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        if i in choose_at:
            count, each = choose_at[i]
            columns = order[i : i + count]
            trailing = [
                torch.linalg.inv(hessian[order[place[c] :]][:, order[place[c] :]])[0, 0] for c in columns
            ]
            scores = w[:, columns].square() / torch.stack(trailing)
            best = torch.zeros_like(scores, dtype=torch.bool)
            if each:
                best.scatter_(1, scores.argsort(1, descending=True)[:, :each], True)
            else:
                best.view(-1)[scores.flatten().argsort(descending=True)[: scores.numel() // 2]] = True
            chosen[:, columns] = best
        group = m // width
        # from all that is left of the group: pruned weights count as zeros as far as they are known
        if group not in scales:
            members = [c for c in order if c // width == group]
            scales[group] = [
                ranged(scheme, torch.where(row, part, 0))
                for part, row in zip(w[:, members], chosen[:, members], strict=True)
            ]
        for r in range(len(w)):
            new = nearest(float(w[r, m]), scheme, *scales[group][r]) if chosen[r, m] else 0.0
            w[r, left] -= (w[r, m] - new) / inverse[0, 0] * inverse[0]
            w[r, m] = new
    return w, chosen


def problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W, G and H = G with 1% of its mean diagonal, in float64, so that no rounding can go another way."""
    gram = curved_gram(columns, seed=seed)[1].double()
    return (
        weights(rows, columns, seed).double(),
        gram,
        gram + 0.01 * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64),
    )


WHOLE = [replace(scheme) for scheme in SCHEMES]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("block", [24, 8, 5])
def test_gptq_as_written_out(scheme: Scheme, block: int) -> None:
    """Nothing is pruned, all is rounded; groups within, astride and beyond the column blocks.
    Oracle: ``literal``.
    """
    weight, gram, hessian = problem(5, 24, seed=3)
    factorisation = factorise(gram, 0.01, "mean", "here")
    full = torch.ones_like(weight, dtype=torch.bool)
    expected, _ = literal(weight, hessian, scheme, full, {})
    grid = Grid(weight.shape, scheme, CPU)
    found, mask, _ = sweep(
        weight, factorisation, kept=weight.numel(), rule=rule("obs", PLAIN, "block", block), grid=grid
    )
    assert mask.all()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    again = Grid(weight.shape, scheme, CPU)
    assert torch.equal(quantise(weight, full, factorisation, again, block), found)
    assert torch.equal(again.scale, grid.scale)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("block", [24, 8, 6])
def test_joint_sweep_as_written_out(scheme: Scheme, block: int) -> None:
    """Half of every column block is pruned, what stays is rounded. Oracle: ``literal``."""
    weight, gram, hessian = problem(4, 24, seed=4)
    grid = Grid(weight.shape, scheme, CPU)
    factorisation = factorise(gram, 0.01, "mean", "here")
    found, mask, _ = sweep(weight, factorisation, kept=48, rule=rule("obs", PLAIN, "block", block), grid=grid)
    expected, chosen = literal(weight, hessian, scheme, None, dict.fromkeys(range(0, 24, block), (block, 0)))
    assert torch.equal(mask, chosen)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not found[~mask].view(torch.int64).any()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("text", "block"), [("2:4", 24), ("2:4", 6), ("3:8", 8)])
def test_joint_sweep_for_n_of_m_as_written_out(scheme: Scheme, text: str, block: int) -> None:
    """Masks are chosen M columns at a time, scales for whole groups before that. Oracle: ``literal``."""
    weight, gram, hessian = problem(4, 24, seed=5)
    pattern = Pattern.parse(text)
    grid = Grid(weight.shape, scheme, CPU)
    kept = 4 * 24 * pattern.n // pattern.m
    factorisation = factorise(gram, 0.01, "mean", "here")
    found, mask, _ = sweep(
        weight, factorisation, kept=kept, rule=rule("obs", pattern, "row", block), grid=grid
    )
    expected, chosen = literal(
        weight, hessian, scheme, None, dict.fromkeys(range(0, 24, pattern.m), (pattern.m, pattern.n))
    )
    assert torch.equal(mask, chosen)
    assert (mask.view(4, -1, pattern.m).sum(2) == pattern.n).all()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group", ["row", "matrix"])
def test_a_mask_that_is_there_before(scheme: Scheme, group: Group) -> None:
    """Chosen from the whole matrix, by the sweep or beforehand. Oracle: ``literal`` on that mask;
    no width of the column blocks changes it.
    """
    weight, gram, hessian = problem(4, 24, seed=6)
    factorisation = factorise(gram, 0.01, "mean", "here")
    mask = select(saliency("wanda", weight, factorisation.whole()), 40, group, 128)
    expected, _ = literal(weight, hessian, scheme, mask, {})
    for block in (1, 7, 24, 128):
        grid = Grid(weight.shape, scheme, CPU)
        found, chosen, _ = sweep(
            weight, factorisation, kept=40, rule=rule("wanda", PLAIN, group, block), grid=grid
        )
        assert torch.equal(chosen, mask)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            quantise(weight, mask, factorisation, Grid(weight.shape, scheme, CPU), block),
            expected,
            rtol=1e-6,
            atol=1e-6,
        )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_order_of_the_columns(scheme: Scheme) -> None:
    """Groups are those of the stored columns. A scale is computed when the sweep reaches the first
    column of its group. Oracle: ``literal`` in that order.
    """
    weight, gram, hessian = problem(4, 24, seed=7)
    factorisation = factorise(
        gram, 0.01, "mean", "here", None, lambda curvature: rose_order(curvature.second_moment, 6, 1, 0.0)
    )
    assert factorisation.order is not None
    order = factorisation.order.tolist()
    assert order != sorted(order)
    grid = Grid(weight.shape, scheme, CPU)
    found, mask, _ = sweep(weight, factorisation, kept=48, rule=rule("obs", PLAIN, "block", 6), grid=grid)
    expected, chosen = literal(weight, hessian, scheme, None, dict.fromkeys(range(0, 24, 6), (6, 0)), order)
    assert torch.equal(mask, chosen)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    again = quantise(weight, mask, factorisation, Grid(weight.shape, scheme, CPU), 6)
    torch.testing.assert_close(
        again, literal(weight, hessian, scheme, mask, {}, order)[0], rtol=1e-6, atol=1e-6
    )


def test_always_zero_inputs_and_whole_groups_of_zeros() -> None:
    """Dead columns become zero, and a group of them gets scale 1; nothing is NaN."""
    weight, gram, _ = problem(4, 24, seed=8)
    gram[8:16], gram[:, 8:16] = 0, 0
    for symmetric in (True, False):
        grid = Grid(weight.shape, replace(FOUR, symmetric=symmetric), CPU)
        found, _, _ = sweep(
            weight, factorise(gram, 0.01, "mean", "here"), 48, rule("obs", PLAIN, "block", 8), grid
        )
        assert torch.isfinite(found).all()
        assert not found[:, 8:16].view(torch.int64).any()
        assert (grid.scale[:, 1] == 1).all()
        assert (grid.zero[:, 1] == 0).all()


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compensation_beats_rounding_to_nearest_on_inputs_it_did_not_see(bits: int, symmetric: bool) -> None:
    """Oracle: the second moment of other inputs of the same kind."""
    x = curved_gram(48, seed=9, tokens=1200)[0]
    gram, unseen = (part.T @ part / len(part) for part in (x[:800], x[800:]))
    weight, scheme = weights(32, 48, seed=9), replace(FOUR, bits=bits, symmetric=symmetric, group=16)
    full = torch.ones_like(weight, dtype=torch.bool)
    swept = quantise(weight, full, factorise(gram, 0.01, "mean", "here"), Grid(weight.shape, scheme, CPU), 16)
    assert layer_error(weight, swept, unseen) < 0.8 * layer_error(
        weight, Grid(weight.shape, scheme, CPU).nearest(weight), unseen
    )


# Whole blocks

DEPTH = 2
FITTING, HELD_OUT = token_rows(32, 12, seed=1), token_rows(8, 12, seed=2)
LITTLE: dict[str, Any] = {"epochs": 2, "batch_rows": 4, "compute_dtype": "float32"}
AIMED: dict[str, Any] = {"statistics": "per_site", "dense_target": 1.0, "lsq": {"mask_iterations": 12}}


def params(
    steps: tuple[str, ...],
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    quantization: Any = None,
    **how: Any,
) -> Recipe:
    return recipe(
        steps,
        batch_rows=8,
        quantization={"bits": 4, "group": 20, **(quantization or {})},
        selection={"block": 16, "sparsity": sparsity, "pattern": pattern},
        reconstruction={
            "finetune_channels": LITTLE,
            **how,
            "finetune": {**LITTLE, **how.get("finetune", {})},
        },
    )


def pruned(
    path: Path, how: Recipe, transforms: list[Transform] | None = None
) -> tuple[BlockModel, dict[int, Block]]:
    model = BlockModel(open_checkpoint(path), torch.float32, CPU)
    shapes = {
        matrix: model.checkpoint.matrix_shape(0, matrix)
        for matrix in model.checkpoint.architecture.layouts[0].matrices
    }
    kept = {
        (i, m): round(rows * columns * (1 - how.selection.sparsity))
        for i in range(DEPTH)
        for m, (rows, columns) in shapes.items()
    }
    given, rows = (
        Source(model, transforms or [Transform()] * DEPTH, kept),
        Rows(FITTING, HELD_OUT, how.batch_rows),
    )
    found = dict(prune(given, rows, plan(how, model.checkpoint.dtype), lambda _: None))
    return model, found


def assert_on_grids(model: BlockModel, found: Mapping[int, Block], how: Recipe) -> None:
    """Every matrix's stored weights are scale·(q − zero point) with q in range, exactly zero off
    the mask, and as many kept as asked for.
    """
    chosen = scheme(how.quantization, model.checkpoint.dtype)
    assert chosen is not None
    for result in found.values():
        assert result.grids.keys() == set(model.checkpoint.architecture.layouts[0].matrices)
        for matrix, grid in result.grids.items():
            stored, mask = (
                matrix.view(result.tensors[matrix.parameter]),
                matrix.view(result.masks[matrix.parameter]),
            )
            assert stored.dtype == model.checkpoint.dtype
            tensors = grid.tensors(matrix.label)
            scale = tensors[f"{matrix.label}.scale"]
            assert torch.equal(scale.to(stored.dtype).float(), scale)
            columns = stored.shape[1]
            width = columns if chosen.group is None else chosen.group
            assert scale.shape == (len(stored), -(-columns // width))
            wide = scale.repeat_interleave(width, 1)[:, :columns]
            zero = (
                tensors.get(f"{matrix.label}.zero_point", torch.zeros_like(scale))
                .to(torch.int32)
                .repeat_interleave(width, 1)[:, :columns]
            )
            codes = (stored.float() / wide).round().to(torch.int32) + zero
            assert int(codes.min()) >= chosen.levels[0]
            assert int(codes.max()) <= chosen.levels[1]
            assert torch.equal((wide * (codes - zero)).to(stored.dtype), stored)
            assert len(codes.unique()) > 3  # not everything on one level
            assert not stored[~mask].contiguous().view(torch.uint8).any()
            assert int(mask.sum()) == round(stored.numel() * (1 - how.selection.sparsity))
            assert result.facts["matrices"][matrix.label]["rounding_error"] > 0


WAYS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    ((), {}),
    (("obs",), {}),
    (("obs",), {"reorder": 0.0}),
    (("lsq",), {}),
    (("obs", "lsq"), AIMED),
    (("obs", "finetune_channels"), {}),
    (("finetune_channels",), {"finetune_channels": {**LITTLE, "parts": ["factors"]}}),
    (("obs", "lsq", "finetune"), {**AIMED, "finetune": {"window": 2, "refresh_epochs": 1}}),
]


@pytest.mark.parametrize("family", ["llama-bias", "gpt2", "phi3"])
@pytest.mark.parametrize(("steps", "how"), WAYS)
def test_every_step_leaves_weights_on_their_grids(
    model_paths: dict[str, Path], family: str, steps: tuple[str, ...], how: dict[str, Any]
) -> None:
    """Fused and transposed matrices too. Oracle: the codes, read back from the weights."""
    settings = params(steps, quantization={"symmetric": family == "phi3"}, **how)
    model, found = pruned(model_paths[family], settings)
    assert_on_grids(model, found, settings)


@pytest.mark.parametrize(("dtype", "symmetric"), [(torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize("steps", [("obs",), ("obs", "finetune")])
def test_sixteen_bit_checkpoints(
    tmp_path: Path, dtype: torch.dtype, symmetric: bool, steps: tuple[str, ...]
) -> None:
    """The checkpoint's dtype represents the scales exactly, also after a fit, and each weight gives
    its code back.
    """
    settings = params(steps, quantization={"bits": 8, "symmetric": symmetric})
    model, found = pruned(make_model(tmp_path, "llama", DEPTH, dtype=dtype, tokenizer=False), settings)
    assert_on_grids(model, found, settings)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize(("bits", "group"), [(3, 8), (4, "row"), (2, 128)])
def test_patterns_bits_and_groups(model_paths: dict[str, Path], pattern: str, bits: int, group: Any) -> None:
    """Groups wider than a matrix are whole rows. Oracle: the codes, and N of every M."""
    settings = params(("obs",), pattern=pattern, quantization={"bits": bits, "group": group})
    model, found = pruned(model_paths["llama"], settings)
    assert_on_grids(model, found, settings)
    if pattern == "2:4":
        for result in found.values():
            assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in result.masks.values())


@pytest.mark.parametrize(
    ("steps", "how"), [((), {}), (("obs",), {}), (("obs", "finetune"), {}), (("obs", "lsq"), AIMED)]
)
def test_nothing_pruned(model_paths: dict[str, Path], steps: tuple[str, ...], how: dict[str, Any]) -> None:
    """Sparsity 0: RTN, GPTQ, and both with what comes after. Oracle: the codes; masks keep all."""
    settings = params(steps, 0.0, **how)
    model, found = pruned(model_paths["llama"], settings)
    assert_on_grids(model, found, settings)
    assert all(mask.all() for result in found.values() for mask in result.masks.values())


def test_rounding_to_nearest_is_just_that(model_paths: dict[str, Path]) -> None:
    """Oracle: the source's weights, each group's by itself."""
    model, found = pruned(model_paths["opt"], params((), 0.0))
    for index, result in found.items():
        source = model.checkpoint.block(index)
        for matrix in model.checkpoint.architecture.layouts[0].matrices:
            weight, stored = (matrix.view(tensors[matrix.parameter]) for tensors in (source, result.tensors))
            for part, own in zip(weight.split(20, dim=1), stored.split(20, dim=1), strict=True):
                scale = 2 * part.abs().amax(1, keepdim=True) / 15
                torch.testing.assert_close(
                    own, (part / scale).round().clamp(-8, 7) * scale, rtol=1e-5, atol=1e-7
                )


def test_zeros_are_counted_in_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is pruned, and of three-bit weights many are zero. Oracle: the tensors on disk,
    excluded matrices left aside.
    """
    only = {
        "selection": {"sparsity": 0.0, "score": "obs", "group": "block"},
        "reconstruction": {"steps": ["obs"]},
    }
    gptq = WANDA | only | {"quantization": {"bits": 3, "group": 16}}
    workspace = make_workspace(tmp_path / "project", variants={"gptq": gptq})
    change_params(workspace, "model.exclude", ["*.down_proj"])
    monkeypatch.chdir(workspace)
    build("prepare", "text calibration", "prune gptq")
    facts = json.loads(Path("build/facts/gptq.json").read_text(encoding="utf-8"))
    tensors = all_tensors(Path("build/prune/gptq/checkpoint"))
    for name, matrix in facts["matrices"].items():
        assert matrix["zeros"] == int((tensors[f"model.{name}.weight"] == 0).sum())
    assert (facts["sparsity"], facts["zeros"]) == (
        0,
        sum(matrix["zeros"] for matrix in facts["matrices"].values()),
    )
    assert facts["zeros"] > 0.1 * facts["prunable"]


def test_without_bits_there_are_no_grids(model_paths: dict[str, Path]) -> None:
    """Oracle: no group, symmetry or range changes a bit of the result."""
    results = []
    for group, symmetric in ((16, True), ("row", False)):
        settings = params(
            ("obs", "lsq", "finetune"),
            quantization={"bits": None, "group": group, "symmetric": symmetric},
            **AIMED,
        )
        _, found = pruned(model_paths["llama"], settings)
        assert not any(result.grids for result in found.values())
        assert all(
            "rounding_error" not in facts
            for result in found.values()
            for facts in result.facts["matrices"].values()
        )
        results.append(found)
    for index, result in results[0].items():
        assert result.facts == results[1][index].facts
        assert all(
            torch.equal(tensor, results[1][index].tensors[name]) for name, tensor in result.tensors.items()
        )


def test_after_least_squares_the_sweep_starts_from_its_weights(model_paths: dict[str, Path]) -> None:
    """Oracle: the unquantised run's weights and mask at the first site, put on the grid by
    ``quantise``; errors in order.
    """
    steps = ("obs", "lsq")
    model, found = pruned(model_paths["llama"], params(steps, **AIMED))
    _, plain = pruned(model_paths["llama"], params(steps, quantization={"bits": None}, **AIMED))
    table = model.checkpoint.architecture.layouts[0]
    first = table.consumers(table.sites[0].name)
    gram = torch.zeros(0)
    for matrix in first:
        weight, mask = (
            matrix.view(plain[0].tensors[matrix.parameter]),
            matrix.view(plain[0].masks[matrix.parameter]),
        )
        assert torch.equal(matrix.view(found[0].masks[matrix.parameter]), mask)
        if not len(gram):
            gram = second_moment(model, table.sites[0].name)
        grid = Grid(weight.shape, found[0].grids[matrix].scheme, CPU)
        expected = quantise(weight, mask, factorise(gram, 0.01, "mean", "here"), grid, 16)
        torch.testing.assert_close(
            matrix.view(found[0].tensors[matrix.parameter]), expected, rtol=1e-5, atol=1e-6
        )
    for facts in found[0].facts["matrices"].values():
        assert facts["unquantised_error"] < facts["layer_error"]


def second_moment(model: BlockModel, site: str) -> torch.Tensor:
    """G of a site of block 0, by hooks."""
    rows = torch.cat([FITTING, HELD_OUT])
    stream, block, taken = model.embed(rows, len(rows)), model.block(0), []
    module = block.get_submodule(module_of(model.checkpoint.architecture.layouts[0].site(site)))
    module.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].flatten(0, 1)))
    model.call(block, 0, stream.hidden[0])
    return taken[0].T @ taken[0] / len(taken[0])


@pytest.mark.parametrize("family", ["llama-bias", "gpt2"])
@pytest.mark.parametrize("refit", [["scales"], ["biases", "norms"], ["scales", "biases", "norms"]])
def test_what_is_fitted_again_after_quantising(
    model_paths: dict[str, Path], family: str, refit: list[str]
) -> None:
    """Oracle: the run that fits nothing again. In the first block codes and masks are its, and only
    what is named moves; the error on held-out rows falls.
    """
    how: dict[str, Any] = {
        "quantization": {"bits": 3, "symmetric": False},
        "finetune": {"epochs": 4, "rate": 0.01},
    }
    plain_how = params(("obs", "finetune"), **{**how, "quantization": {**how["quantization"], "refit": []}})
    model, plain = pruned(model_paths[family], plain_how)
    settings = params(("obs", "finetune"), **{**how, "quantization": {**how["quantization"], "refit": refit}})
    _, found = pruned(model_paths[family], settings)
    assert_on_grids(model, found, settings)
    assert "refit" not in plain[0].facts
    assert found[0].facts["refit"]["epochs"] > 0
    assert found[0].facts["refit"]["held_out_after"] < found[0].facts["refit"]["held_out_before"]
    assert found[0].facts["finetune"] == plain[0].facts["finetune"]
    matrices = model.checkpoint.architecture.layouts[0].matrices
    parameters = {matrix.parameter for matrix in matrices}
    for matrix in matrices:
        before, after = plain[0].grids[matrix], found[0].grids[matrix]
        steps = [
            grid.steps(matrix.view(run[0].tensors[matrix.parameter]))
            for grid, run in ((before, plain), (after, found))
        ]
        assert torch.equal(*steps)
        assert torch.equal(before.zero, after.zero)
        assert torch.equal(before.scale, after.scale) == ("scales" not in refit)
    biases = {matrix.bias for matrix in matrices}
    moved = {
        name for name in found[0].tensors if not torch.equal(found[0].tensors[name], plain[0].tensors[name])
    }
    assert bool(moved & parameters) == ("scales" in refit)
    assert bool(moved & biases) == ("biases" in refit)
    assert bool(moved - parameters - biases) == ("norms" in refit)


def test_a_fitted_block_is_quantised_towards_its_own_outputs(model_paths: dict[str, Path]) -> None:
    """Oracle: the same fit, rounded to nearest instead; and both blocks' errors on held-out rows,
    which the next fit starts from.
    """
    errors = {}
    for steps in (("lsq", "finetune"), ("obs", "lsq", "finetune")):
        settings = params(
            steps,
            0.3,
            quantization={"bits": 3, "refit": ["norms"]},
            lsq={"tolerance": 1e-6, "iterations": 400},
        )
        _, found = pruned(model_paths["llama"], settings)
        facts = found[0].facts
        assert all(one["quantised_error"] > 0 for one in facts["matrices"].values())
        errors[steps] = facts["refit"]["held_out_before"] - facts["finetune"]["held_out_after"]
    assert 0 < errors["obs", "lsq", "finetune"] < 0.8 * errors["lsq", "finetune"]


def test_shifts_go_into_the_biases(model_paths: dict[str, Path]) -> None:
    """Every linear of OPT has a bias, so that inputs can be centred. Oracle: with the shift, the
    mean of what quantisation changes vanishes at the first site.
    """
    model = BlockModel(open_checkpoint(model_paths["opt"]), torch.float32, CPU)
    table = model.checkpoint.architecture.layouts[0]
    site = table.sites[0].name
    rows = torch.cat([FITTING, HELD_OUT])
    stream, block, taken = model.embed(rows, len(rows)), model.block(0), []
    module = block.get_submodule(module_of(table.site(site)))
    module.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].flatten(0, 1)))
    model.call(block, 0, stream.hidden[0])
    mean = taken[0].mean(0)
    source = model.checkpoint.block(0)
    for steps, how in (
        (("obs",), {}),
        (("obs", "finetune_channels"), {"finetune_channels": {**LITTLE, "parts": ["norms"], "rate": 1e-9}}),
    ):
        shifts = [Transform(shifts={site: mean}), Transform()]
        settings = params(steps, 0.0, quantization={"bits": 3, "refit": []}, **how)
        _, found = pruned(model_paths["opt"], settings, shifts)
        for matrix in table.consumers(site):
            assert matrix.bias is not None
            changed = matrix.view(source[matrix.parameter]) - matrix.view(found[0].tensors[matrix.parameter])
            bias = matrix.bias_view(source[matrix.bias]) - matrix.bias_view(found[0].tensors[matrix.bias])
            assert float((changed @ mean).norm()) > 1e-3
            assert float((changed @ mean + bias).norm()) < 1e-4 * float((changed @ mean).norm()) + 1e-6


def test_scales_alone_give_the_weights_back(model_paths: dict[str, Path]) -> None:
    """Oracle: the block as it was; and twice the scales, twice the weights."""
    model, found = pruned(model_paths["phi3"], params(("obs",), quantization={"symmetric": False}))
    result = found[0]
    tensors = {name: tensor.float() for name, tensor in result.tensors.items()}
    scales = Scales(tensors, result.grids)
    free = scales.free()
    same, twice = (
        scales.joined({**tensors, **{name: by * scale for name, scale in free.items()}}) for by in (1, 2)
    )
    assert same.keys() == twice.keys() == tensors.keys()
    parameters: set[Matrix] = set(model.checkpoint.architecture.layouts[0].matrices)
    for name, tensor in tensors.items():
        assert torch.equal(same[name], tensor)
        assert torch.equal(
            twice[name], 2 * tensor if name in {matrix.parameter for matrix in parameters} else tensor
        )
    assert math.prod(scales.free()[f"{next(iter(result.grids)).label}.scale"].shape) > 1
