"""Scores and the OBS sweep. Oracles: formulas by loops, explicit inverses in float64, least squares on the final mask."""

from typing import get_args

import pytest
import torch
from tiny import curved_gram

from pipeline_lib.errors import SparselineError
from pipeline_lib.pruning.patterns import Group, Pattern, select, select_n_of_m
from pipeline_lib.pruning.scores import Score, saliency
from pipeline_lib.reconstruction.obs import DampingOf, factorise, layer_error, sweep

SCORES: tuple[Score, ...] = get_args(Score)
DAMPINGS: tuple[DampingOf, ...] = get_args(DampingOf)
PLAIN = Pattern.parse("unstructured")


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def damped(gram: torch.Tensor, damping: float, of: DampingOf) -> torch.Tensor:
    """H in float64; always-zero inputs count 1."""
    hessian = gram.double().clone()
    for m in range(len(gram)):
        if hessian[m, m] == 0:
            hessian[m, m] = 1
    diagonal = hessian.diagonal().clone()
    for m in range(len(gram)):
        hessian[m, m] += damping * (diagonal.mean() if of == "mean" else diagonal[m])
    return hessian


def scored(score: Score, weight: float, second_moment: float, hessian: float, inverse: float) -> float:
    """One weight's score as 2310.09499's table and 2306.11695 have it."""
    values: dict[str, float] = {
        "magnitude": abs(weight) ** 2,
        "wanda": (abs(weight) * second_moment**0.5) ** 2,
        "obd": weight**2 * hessian,
        "obs": weight**2 / inverse,
        "isc": weight**2 * hessian + weight**2 / inverse,
    }
    return values[score]


def by_loops(score: Score, weight: torch.Tensor, gram: torch.Tensor, hessian: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(weight.shape, dtype=torch.float64)
    for r in range(weight.shape[0]):
        for c in range(weight.shape[1]):
            out[r, c] = scored(score, float(weight[r, c]), float(gram[c, c]), float(hessian[c, c]), float(inverse[c]))
    return out


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("of", DAMPINGS)
def test_scores_by_loops_and_an_explicit_inverse(score: Score, of: DampingOf) -> None:
    """Oracle: the papers' formulas, weight by weight, with torch.linalg.inv in float64."""
    weight, (_, gram) = weights(5, 14), curved_gram(14, seed=1)
    hessian = damped(gram, 0.01, of)
    expected = by_loops(score, weight, gram, hessian, torch.linalg.inv(hessian).diagonal())
    found = saliency(score, weight, factorise(gram, 0.01, of, "here").whole())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("of", DAMPINGS)
def test_factorisation_is_the_inverse(of: DampingOf) -> None:
    """Oracle: explicit inverses in float64, of the whole H and of every trailing submatrix (U_mm²)."""
    _, gram = curved_gram(11, seed=2)
    hessian = damped(gram, 0.02, of)
    found = factorise(gram, 0.02, of, "here")
    upper = found.upper.double()
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(hessian), rtol=1e-3, atol=1e-4)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(found.diagonal.double(), hessian.diagonal(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.inverse_diagonal.double(), torch.linalg.inv(hessian).diagonal(), rtol=1e-3, atol=1e-6)
    trailing = torch.stack([torch.linalg.inv(hessian[m:, m:])[0, 0] for m in range(11)])
    torch.testing.assert_close(found.trailing().inverse_diagonal.double(), trailing, rtol=1e-3, atol=1e-6)
    assert found.damping == 0.02
    assert not found.dead.any()


def test_wanda_ranks_as_its_paper() -> None:
    """Oracle: |W_ij| · ‖X_j‖₂ from the raw activations (2306.11695, Eq. 1), ranked row by row by hand."""
    x, gram = curved_gram(16, seed=3)
    weight = weights(6, 16, seed=3)
    metric = weight.abs().double() * x.double().norm(dim=0)
    expected = torch.zeros(6, 16, dtype=torch.bool)
    for row in range(6):
        for column in sorted(range(16), key=lambda c: -float(metric[row, c]))[:7]:
            expected[row, column] = True
    found = select(saliency("wanda", weight, factorise(gram, 0.01, "mean", "here").whole()), 42, "row", 128)
    assert torch.equal(found, expected)


def test_isc_lies_between_obd_and_twice_obd() -> None:
    """1/[H⁻¹]_mm ≤ H_mm for positive definite H, so ISC is between OBD and 2·OBD (the digest of 2310.09499)."""
    weight, (_, gram) = weights(4, 12, seed=4), curved_gram(12, seed=4)
    curvature = factorise(gram, 0.01, "mean", "here").whole()
    obd, isc = saliency("obd", weight, curvature), saliency("isc", weight, curvature)
    assert (isc >= obd * (1 - 1e-5)).all()
    assert (isc <= 2 * obd * (1 + 1e-5)).all()
    assert isc.sum() > 1.01 * obd.sum()


# The sweep


def keep_best(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """The ``kept`` largest of a matrix, by sorting a list."""
    order = sorted((-float(scores[r, c]), r, c) for r in range(scores.shape[0]) for c in range(scores.shape[1]))
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for _, r, c in order[:kept]:
        mask[r, c] = True
    return mask


def literal_sweep(
    weight: torch.Tensor, gram: torch.Tensor, hessian: torch.Tensor, score: Score, quotas: list[int], width: int, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    """OBS column by column as 2310.09499's Eq. 3 says, in float64, inverting H[m:, m:] anew for every column.

    The mask of each ``width`` columns is chosen when the sweep reaches them; for N:M that width is M, compared within rows.
    """
    w, columns = weight.double().clone(), weight.shape[1]
    inverses = [torch.linalg.inv(hessian[m:, m:]) for m in range(columns)]
    mask = torch.zeros(w.shape, dtype=torch.bool)
    for m in range(columns):
        if m % width == 0:
            stop = min(m + width, columns)
            inverse = torch.stack([inverses[c][0, 0] for c in range(m, stop)])
            part = by_loops(score, w[:, m:stop], gram[m:stop, m:stop].double(), hessian[m:stop, m:stop], inverse)
            if pattern.m:
                mask[:, m:stop] = torch.cat([keep_best(row[None], pattern.n) for row in part])
            else:
                mask[:, m:stop] = keep_best(part, quotas[m // width])
        for r in range(w.shape[0]):
            if not mask[r, m]:
                w[r, m:] -= w[r, m] / inverses[m][0, 0] * inverses[m][0]
                w[r, m] = 0
    return w, mask


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("block", "quotas"), [(20, [60]), (64, [60]), (8, [24, 24, 12]), (5, [15, 15, 15, 15])])
def test_sweep_equals_literal_obs_in_blocks(score: Score, block: int, quotas: list[int]) -> None:
    """Oracle: ``literal_sweep``; one block that holds all columns, a short last block, and several whole ones."""
    weight, (_, gram) = weights(6, 20, seed=5), curved_gram(20, seed=5)
    expected, mask = literal_sweep(weight, gram, damped(gram, 0.01, "mean"), score, quotas, min(block, 20), PLAIN)
    found, chosen = sweep(weight, factorise(gram, 0.01, "mean", "here"), kept=60, score=score, pattern=PLAIN, group="block", block=block)
    assert torch.equal(chosen, mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("text", "block"), [("2:4", 4), ("2:4", 128), ("1:4", 6), ("4:8", 8), ("3:8", 12)])
def test_sweep_equals_literal_obs_for_n_of_m(score: Score, text: str, block: int) -> None:
    """Oracle: ``literal_sweep`` with groups of M; the column block rounds up to whole groups."""
    pattern = Pattern.parse(text)
    weight, (_, gram) = weights(5, 24, seed=6), curved_gram(24, seed=6)
    expected, mask = literal_sweep(weight, gram, damped(gram, 0.01, "diagonal"), score, [], pattern.m, pattern)
    found, chosen = sweep(
        weight,
        factorise(gram, 0.01, "diagonal", "here"),
        kept=5 * 24 * pattern.n // pattern.m,
        score=score,
        pattern=pattern,
        group="row",
        block=block,
    )
    assert torch.equal(chosen, mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("group", ["row", "matrix"])
def test_sweep_with_a_mask_chosen_beforehand(group: Group) -> None:
    """Oracle: the mask from the whole matrix's scores; then literal OBS for that mask, whatever the lazy block's width."""
    weight, (_, gram) = weights(4, 18, seed=7), curved_gram(18, seed=7)
    factorisation = factorise(gram, 0.01, "mean", "here")
    mask = select(saliency("obs", weight, factorisation.whole()), 30, group, 128)
    inverse = torch.linalg.inv(damped(gram, 0.01, "mean"))
    expected = weight.double().clone()
    for m in range(18):  # Gaussian elimination of column m from the inverse: another road to the trailing inverses
        for r in range(4):
            if not mask[r, m]:
                expected[r] -= expected[r, m] / inverse[m, m] * inverse[m]
        inverse = inverse - torch.outer(inverse[:, m], inverse[m]) / inverse[m, m]
    for block in (1, 7, 18, 128):
        found, chosen = sweep(weight, factorisation, kept=30, score="obs", pattern=PLAIN, group=group, block=block)
        assert torch.equal(chosen, mask)
        torch.testing.assert_close(found.double(), expected.masked_fill(~mask, 0), rtol=1e-2, atol=1e-3)


def least_squares(weight: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """For each row the best weights on its mask: Ŵ_S = W G_{:S} (G_SS)⁻¹."""
    out = torch.zeros(weight.shape, dtype=torch.float64)
    for r in range(len(weight)):
        kept = mask[r].nonzero()[:, 0]
        out[r, kept] = torch.linalg.solve(gram.double()[kept][:, kept], gram.double()[kept] @ weight[r].double())
    return out


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_sweep_lies_between_least_squares_and_no_compensation(score: Score, sparsity: float) -> None:
    """Oracles: least squares on the sweep's own mask bounds its error below; the same mask without updates bounds it above."""
    weight, (_, gram) = weights(12, 32, seed=8), curved_gram(32, seed=8)
    kept = round((1 - sparsity) * weight.numel())
    found, mask = sweep(weight, factorise(gram, 0.01, "mean", "x"), kept=kept, score=score, pattern=PLAIN, group="block", block=16)
    assert int(mask.sum()) == kept
    assert not found[~mask].any()
    error = layer_error(weight, found, gram)
    best = layer_error(weight, least_squares(weight, mask, gram).float(), gram)
    plain = layer_error(weight, weight.masked_fill(~mask, 0), gram)
    assert best * (1 - 1e-4) <= error <= plain
    assert error < 0.9 * plain


def test_layer_error_is_the_outputs_error() -> None:
    """Oracle: the outputs themselves, E‖(W − Ŵ) X‖² / E‖W X‖²."""
    weight, (x, gram) = weights(6, 10, seed=9), curved_gram(10, seed=9)
    pruned = weight * (weight.abs() > 0.5)
    expected = float(((weight - pruned) @ x.T).square().sum() / (weight @ x.T).square().sum())
    assert layer_error(weight, pruned, gram) == pytest.approx(expected, rel=1e-4)
    assert layer_error(weight, weight, gram) == 0
    assert layer_error(weight, torch.zeros_like(weight), gram) == pytest.approx(1)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("of", DAMPINGS)
def test_dead_inputs_cost_nothing_and_change_nothing(score: Score, of: DampingOf) -> None:
    """Oracle: the problem without the always-zero inputs ("diagonal"; with "mean" their stand-in of 1 enters the mean)."""
    dead = [0, 5, 11]
    alive = [c for c in range(12) if c not in dead]
    x, _ = curved_gram(12, seed=10)
    x[:, dead] = 0
    gram = x.T @ x / len(x)
    weight = weights(4, 12, seed=10)
    factorisation = factorise(gram, 0.01, of, "here")
    assert factorisation.dead.nonzero()[:, 0].tolist() == dead
    found, mask = sweep(weight, factorisation, kept=18, score=score, pattern=PLAIN, group="block", block=12)
    assert torch.isfinite(found).all()
    assert not found[:, dead].any()
    assert int(mask.sum()) == 18
    if of == "diagonal":
        small = factorise(gram[alive][:, alive], 0.01, of, "here")
        expected, chosen = sweep(weight[:, alive], small, kept=18, score=score, pattern=PLAIN, group="block", block=9)
        assert torch.equal(mask[:, alive], chosen)
        torch.testing.assert_close(found[:, alive], expected, rtol=1e-3, atol=1e-4)


def test_all_inputs_dead() -> None:
    """Nothing ever comes in: finite, and exactly as many kept as asked."""
    found, mask = sweep(
        weights(3, 8), factorise(torch.zeros(8, 8), 0.01, "mean", "x"), kept=12, score="isc", pattern=PLAIN, group="block", block=4
    )
    assert not found.any()
    assert int(mask.sum()) == 12


@pytest.mark.parametrize("of", DAMPINGS)
def test_damping_is_raised_for_a_singular_gram_and_reported(of: DampingOf) -> None:
    """One token gives a Gram of rank 1: 1e-12 is below float32's rounding, so the damping must rise, and the result be finite."""
    x = weights(1, 30, seed=11)
    found = factorise(x.T @ x, 1e-12, of, "here")
    assert 1e-12 < found.damping <= 1
    torch.testing.assert_close(found.diagonal.double(), damped(x.T @ x, found.damping, of).diagonal(), rtol=1e-5, atol=0)
    weight, mask = sweep(weights(5, 30, seed=12), found, kept=75, score="isc", pattern=PLAIN, group="block", block=8)
    assert torch.isfinite(weight).all()
    assert int(mask.sum()) == 75


def test_the_smallest_damping_that_works_is_taken() -> None:
    """A well-conditioned Gram keeps the damping that was asked for."""
    _, gram = curved_gram(10, seed=13)
    assert factorise(gram, 1e-6, "mean", "here").damping == 1e-6


def test_an_indefinite_matrix_is_refused() -> None:
    """No second moment has negative eigenvalues like this: no damping up to 1 helps, and the site is named."""
    with pytest.raises(SparselineError, match=r"layers\.3 mlp_input cannot be factorised even with damping 1"):
        factorise(torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.01, "mean", "layers.3 mlp_input")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gram_with_nan_is_refused(value: float) -> None:
    _, gram = curved_gram(6, seed=14)
    gram[2, 3] = value
    with pytest.raises(SparselineError, match=r"second moment of layers\.1 attention_input holds NaN or infinity"):
        factorise(gram, 0.01, "mean", "layers.1 attention_input")


@pytest.mark.parametrize("score", ["wanda", "obd", "obs", "isc"])
def test_diagonal_damping_makes_masks_blind_to_factors(score: Score) -> None:
    """W' = W D⁻¹ with G' = D G D: no mask moves, swept or not (2602.21652's digest, "What we must decide", 1).

    Powers of two, so that ties in rounding cannot decide; the compensated weights come out scaled to the last bit too.
    """
    weight, (_, gram) = weights(8, 32, seed=15), curved_gram(32, seed=15)
    d = 2.0 ** torch.randint(-5, 6, (32,), generator=torch.Generator().manual_seed(15))
    other, scaled = factorise(gram, 0.01, "diagonal", "x"), factorise(d[:, None] * gram * d, 0.01, "diagonal", "x")
    for group in get_args(Group):
        a = select(saliency(score, weight, other.whole()), 100, group, 8)
        assert torch.equal(a, select(saliency(score, weight / d, scaled.whole()), 100, group, 8))
    swept = [sweep(w, f, kept=128, score=score, pattern=PLAIN, group="block", block=8) for w, f in ((weight, other), (weight / d, scaled))]
    assert torch.equal(swept[0][1], swept[1][1])
    assert torch.equal(swept[0][0], swept[1][0] * d)


@pytest.mark.parametrize("score", ["magnitude", "obs"])
def test_the_invariance_test_has_power(score: Score) -> None:
    """The same factors do move the masks of Magnitude, and of OBS under damping by the mean diagonal."""
    weight, (_, gram) = weights(8, 32, seed=15), curved_gram(32, seed=15)
    d = 2.0 ** torch.randint(-5, 6, (32,), generator=torch.Generator().manual_seed(15))
    of: DampingOf = "mean"
    a = select(saliency(score, weight, factorise(gram, 0.01, of, "x").whole()), 100, "matrix", 8)
    b = select(saliency(score, weight / d, factorise(d[:, None] * gram * d, 0.01, of, "x").whole()), 100, "matrix", 8)
    assert not torch.equal(a, b)


@pytest.mark.parametrize("group", get_args(Group))
def test_importance_multiplies_the_scores_by_its_square(group: Group) -> None:
    """Oracle: Magnitude of W·diag(u) chooses the same mask as Magnitude of W with importance u; the weights are W's."""
    weight, (_, gram) = weights(6, 16, seed=16), curved_gram(16, seed=16)
    u = torch.rand(16, generator=torch.Generator().manual_seed(16)) + 0.2
    # A diagonal G leaves nothing to compensate: the kept weights stay as they are.
    factorisation = factorise(torch.diag(gram.diagonal()), 0.01, "mean", "x")
    found, mask = sweep(weight, factorisation, kept=40, score="magnitude", pattern=PLAIN, group=group, block=4, importance=u)
    _, expected = sweep(weight * u, factorisation, kept=40, score="magnitude", pattern=PLAIN, group=group, block=4)
    assert torch.equal(mask, expected)
    _, plain = sweep(weight, factorisation, kept=40, score="magnitude", pattern=PLAIN, group=group, block=4)
    assert not torch.equal(mask, plain)
    torch.testing.assert_close(found, weight * mask, rtol=1e-5, atol=1e-6)


def test_importance_reaches_the_groups_of_n_of_m() -> None:
    """Oracle: selection by hand from |W|·u."""
    weight, (_, gram) = weights(4, 12, seed=17), curved_gram(12, seed=17)
    u = torch.rand(12, generator=torch.Generator().manual_seed(17)) + 0.1
    factorisation = factorise(torch.diag(gram.diagonal()), 0.01, "mean", "x")
    _, mask = sweep(weight, factorisation, kept=24, score="magnitude", pattern=Pattern(2, 4), group="row", block=4, importance=u)
    assert torch.equal(mask, select_n_of_m((weight * u).abs(), 2, 4))


def test_sweep_leaves_its_input_alone() -> None:
    weight, (_, gram) = weights(4, 8, seed=18), curved_gram(8, seed=18)
    before = weight.clone()
    sweep(weight, factorise(gram, 0.01, "mean", "x"), kept=16, score="obs", pattern=PLAIN, group="block", block=4)
    assert torch.equal(weight, before)
