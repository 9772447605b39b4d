"""Scores and the OBS sweep. Oracles: formulas by loops, explicit inverses in float64, least squares
on the final mask.
"""

import functools
from itertools import accumulate
from typing import get_args

import pytest
import torch
from rules import PLAIN, hessian_of, lsq, rule
from tiny import curved_gram

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.masks.scores import saliency
from pipeline_lib.masks.select import select, select_n_of_m
from pipeline_lib.masks.settings import DampingOf, Group, Pattern, Score
from pipeline_lib.solve.factor import AVERAGED, Factorisation, energy, factorise, layer_error
from pipeline_lib.solve.lsq import Search, admm, solve
from pipeline_lib.solve.order import column_losses, rose_order
from pipeline_lib.solve.sweep import sweep, target_weight

SCORES: tuple[Score, ...] = get_args(Score)
DAMPINGS: tuple[DampingOf, ...] = get_args(DampingOf)


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def damped(gram: torch.Tensor, damping: float, of: DampingOf) -> torch.Tensor:
    """H in float64; always-zero inputs count for no mean, and are damped by that of the others."""
    hessian = gram.double().clone()
    diagonal = hessian.diagonal().clone()
    mean = diagonal[diagonal > 0].mean()
    for m in range(len(gram)):
        hessian[m, m] += damping * (mean if of == "mean" or diagonal[m] == 0 else diagonal[m])
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


def by_loops(
    score: Score, weight: torch.Tensor, gram: torch.Tensor, hessian: torch.Tensor, inverse: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros(weight.shape, dtype=torch.float64)
    for r in range(weight.shape[0]):
        for c in range(weight.shape[1]):
            out[r, c] = scored(
                score, float(weight[r, c]), float(gram[c, c]), float(hessian[c, c]), float(inverse[c])
            )
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
    torch.testing.assert_close(
        found.inverse_diagonal.double(), torch.linalg.inv(hessian).diagonal(), rtol=1e-3, atol=1e-6
    )
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


@pytest.mark.parametrize("score", SCORES)
def test_every_score_is_the_square_times_a_factor_per_input(score: Score) -> None:
    """Induction assumes this of every score. Oracle: the score of weights of 1."""
    weight, (_, gram) = weights(4, 12, seed=4), curved_gram(12, seed=4)
    curvature = factorise(gram, 0.01, "mean", "here").whole()
    factor = saliency(score, torch.ones(1, 12), curvature)
    torch.testing.assert_close(saliency(score, weight, curvature), weight.square() * factor)


def test_isc_lies_between_obd_and_twice_obd() -> None:
    """1/[H⁻¹]_mm ≤ H_mm for positive definite H, so ISC is between OBD and 2·OBD (the digest of
    2310.09499).
    """
    weight, (_, gram) = weights(4, 12, seed=4), curved_gram(12, seed=4)
    curvature = factorise(gram, 0.01, "mean", "here").whole()
    obd, isc = saliency("obd", weight, curvature), saliency("isc", weight, curvature)
    assert (isc >= obd * (1 - 1e-5)).all()
    assert (isc <= 2 * obd * (1 + 1e-5)).all()
    assert isc.sum() > 1.01 * obd.sum()


# The sweep


def keep_best(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """The ``kept`` largest of a matrix, by sorting a list."""
    order = sorted(
        (-float(scores[r, c]), r, c) for r in range(scores.shape[0]) for c in range(scores.shape[1])
    )
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for _, r, c in order[:kept]:
        mask[r, c] = True
    return mask


def literal_sweep(
    weight: torch.Tensor,
    gram: torch.Tensor,
    hessian: torch.Tensor,
    score: Score,
    quotas: list[int],
    width: int | list[int],
    pattern: Pattern,
) -> tuple[torch.Tensor, torch.Tensor]:
    """OBS column by column as 2310.09499's Eq. 3 says, in float64, inverting H[m:, m:] anew for every column.

    The mask of each ``width`` columns is chosen when the sweep reaches them; for N:M that width is
    M, compared within rows.
    """
    widths = [width] * -(-weight.shape[1] // width) if isinstance(width, int) else width
    starts = [0, *accumulate(widths)]
    w, columns = weight.double().clone(), weight.shape[1]
    inverses = [torch.linalg.inv(hessian[m:, m:]) for m in range(columns)]
    mask = torch.zeros(w.shape, dtype=torch.bool)
    for m in range(columns):
        if m in starts:
            index = starts.index(m)
            stop = min(starts[index + 1], columns)
            inverse = torch.stack([inverses[c][0, 0] for c in range(m, stop)])
            part = by_loops(
                score, w[:, m:stop], gram[m:stop, m:stop].double(), hessian[m:stop, m:stop], inverse
            )
            if pattern.m:
                mask[:, m:stop] = torch.cat([keep_best(row[None], pattern.n) for row in part])
            else:
                mask[:, m:stop] = keep_best(part, quotas[index])
        for r in range(w.shape[0]):
            if not mask[r, m]:
                w[r, m:] -= w[r, m] / inverses[m][0, 0] * inverses[m][0]
                w[r, m] = 0
    return w, mask


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("at_once", [7, 12, 512])
@pytest.mark.parametrize(
    ("block", "quotas"), [(20, [60]), (64, [60]), (8, [24, 24, 12]), (5, [15, 15, 15, 15])]
)
def test_sweep_equals_literal_obs_in_blocks(
    score: Score, at_once: int, block: int, quotas: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: ``literal_sweep``; one block that holds all columns, a short last block, and several
    whole ones; errors passed on far at once or not.
    """
    monkeypatch.setattr("pipeline_lib.solve.eliminate.AT_ONCE", at_once)
    weight, (_, gram) = weights(6, 20, seed=5), curved_gram(20, seed=5)
    expected, mask = literal_sweep(
        weight, gram, damped(gram, 0.01, "mean"), score, quotas, min(block, 20), PLAIN
    )
    found, chosen, _ = sweep(
        weight, factorise(gram, 0.01, "mean", "here"), kept=60, rule=rule(score, PLAIN, "block", block)
    )
    assert torch.equal(chosen, mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("at_once", [10, 512])
@pytest.mark.parametrize(("text", "block"), [("2:4", 4), ("2:4", 128), ("1:4", 6), ("4:8", 8), ("3:8", 12)])
def test_sweep_equals_literal_obs_for_n_of_m(
    score: Score, at_once: int, text: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: ``literal_sweep`` with groups of M; the column block rounds up to whole groups."""
    monkeypatch.setattr("pipeline_lib.solve.eliminate.AT_ONCE", at_once)
    pattern = Pattern.parse(text)
    weight, (_, gram) = weights(5, 24, seed=6), curved_gram(24, seed=6)
    expected, mask = literal_sweep(
        weight, gram, damped(gram, 0.01, "diagonal"), score, [], pattern.m, pattern
    )
    found, chosen, _ = sweep(
        weight,
        factorise(gram, 0.01, "diagonal", "here"),
        5 * 24 * pattern.n // pattern.m,
        rule(score, pattern, "row", block),
    )
    assert torch.equal(chosen, mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("group", ["row", "matrix"])
def test_sweep_with_a_mask_chosen_beforehand(group: Group) -> None:
    """Oracle: the mask from the whole matrix's scores; then literal OBS for that mask, whatever the
    lazy block's width.
    """
    weight, (_, gram) = weights(4, 18, seed=7), curved_gram(18, seed=7)
    factorisation = factorise(gram, 0.01, "mean", "here")
    mask = select(saliency("obs", weight, factorisation.whole()), 30, group, 128)
    inverse = torch.linalg.inv(damped(gram, 0.01, "mean"))
    expected = weight.double().clone()
    # Gaussian elimination of column m from the inverse: another road to the trailing inverses
    for m in range(18):
        for r in range(4):
            if not mask[r, m]:
                expected[r] -= expected[r, m] / inverse[m, m] * inverse[m]
        inverse = inverse - torch.outer(inverse[:, m], inverse[m]) / inverse[m, m]
    for block in (1, 7, 18, 128):
        found, chosen, _ = sweep(weight, factorisation, kept=30, rule=rule("obs", PLAIN, group, block))
        assert torch.equal(chosen, mask)
        torch.testing.assert_close(found.double(), expected.masked_fill(~mask, 0), rtol=1e-2, atol=1e-3)


def least_squares(weight: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """For each row the best weights on its mask: Ŵ_S = W G_{:S} (G_SS)⁻¹."""
    out = torch.zeros(weight.shape, dtype=torch.float64)
    for r in range(len(weight)):
        kept = mask[r].nonzero()[:, 0]
        out[r, kept] = torch.linalg.solve(
            gram.double()[kept][:, kept], gram.double()[kept] @ weight[r].double()
        )
    return out


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_sweep_lies_between_least_squares_and_no_compensation(score: Score, sparsity: float) -> None:
    """Oracles: least squares on the sweep's own mask bounds its error below; the same mask without
    updates bounds it above.
    """
    weight, (_, gram) = weights(12, 32, seed=8), curved_gram(32, seed=8)
    kept = round((1 - sparsity) * weight.numel())
    found, mask, _ = sweep(
        weight, factorise(gram, 0.01, "mean", "x"), kept=kept, rule=rule(score, PLAIN, "block", 16)
    )
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


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("common", [0.0, 5.0])
def test_energy_of_a_large_matrix_is_exact_enough(
    common: float, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: float64. Also of inputs that nearly all say the same, with an outlier, and on a CPU
    that has products of bfloat16.
    """
    monkeypatch.setattr("pipeline_lib.core.products.bfloat16_is_faster", lambda: faster)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(512, AVERAGED, generator=random) + common * torch.randn(512, 1, generator=random)
    x[:, 7] *= 30
    weight, gram = torch.randn(300, AVERAGED, generator=random), x.T @ x / 512
    expected = float((weight.double() @ x.T.double()).square().sum() / 512)
    assert float(energy(weight, gram)) == pytest.approx(expected, rel=1e-3 if faster else 1e-6)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("of", DAMPINGS)
def test_dead_inputs_cost_nothing_and_change_nothing(score: Score, of: DampingOf) -> None:
    """Oracle: the problem without the always-zero inputs."""
    dead = [0, 5, 11]
    alive = [c for c in range(12) if c not in dead]
    x, _ = curved_gram(12, seed=10)
    x[:, dead] = 0
    gram = x.T @ x / len(x)
    weight = weights(4, 12, seed=10)
    factorisation = factorise(gram, 0.01, of, "here")
    assert factorisation.dead.nonzero()[:, 0].tolist() == dead
    found, mask, _ = sweep(weight, factorisation, kept=18, rule=rule(score, PLAIN, "block", 12))
    assert torch.isfinite(found).all()
    assert not found[:, dead].any()
    assert int(mask.sum()) == 18
    small = factorise(gram[alive][:, alive], 0.01, of, "here")
    expected, chosen, _ = sweep(weight[:, alive], small, kept=18, rule=rule(score, PLAIN, "block", 9))
    assert torch.equal(mask[:, alive], chosen)
    torch.testing.assert_close(found[:, alive], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1e2])
@pytest.mark.parametrize("of", DAMPINGS)
@pytest.mark.parametrize("folded", [False, True])
def test_the_scale_of_the_activations_changes_nothing(scale: float, of: DampingOf, folded: bool) -> None:
    """All inputs are multiplied by one number, and a tenth of them are always zero. Oracle: the
    results for the original inputs: sweep, curvature, masks without the sweep, ADMM.
    """
    x, _ = curved_gram(20, seed=40)
    x[:, [3, 17]] = 0
    factor = torch.linspace(0.3, 3, 20) if folded else None
    x = x if factor is None else x * factor
    weight = weights(8, 20, seed=40)
    rules = {score: rule(score, PLAIN, "block", 10) for score in SCORES}
    found: list[dict[str, torch.Tensor]] = []
    for number in (1.0, scale):
        gram = (number * x).T @ (number * x) / len(x)
        factorised = factorise(gram, 0.1, of, "x", factor)
        one = {
            f"{score} {part}": t
            for score in SCORES
            for part, t in enumerate(sweep(weight, factorised, 80, rules[score])[:2])
        }
        one |= {score: rules[score].mask(saliency(score, weight, factorised.whole()), 80) for score in SCORES}
        one["diagonal"] = factorised.diagonal / number**2
        target, hessian = weight.masked_fill(factorised.dead, 0), hessian_of(factorised, gram)
        mask = one["obs 1"]
        start, *_ = solve(target, mask, hessian, weight * mask, lsq(50, 1e-4))
        how = lsq(50, 1e-4, mask_iterations=20, mask_penalty=1.0)
        search = Search(functools.partial(rules["obs"].mask, kept=80), 1.0)
        one["admm"], one["admm mask"], _ = admm(target, mask, hessian, start, search, how)
        found.append(one)
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_shifted_inputs_that_were_constant_are_dead() -> None:
    """Taken without its mean a constant input is zero but for rounding, which can be below zero.
    Oracle: the exact zero.
    """
    x, _ = curved_gram(6, seed=41)
    x[:, 2] = 0
    gram = x.T @ x / len(x)
    expected = factorise(gram, 0.01, "diagonal", "x")
    gram[2, 2] = -1e-9
    found = factorise(gram, 0.01, "diagonal", "x")
    assert found.damping == 0.01
    assert found.dead.nonzero().flatten().tolist() == [2]
    torch.testing.assert_close(found.upper, expected.upper)


def test_all_inputs_dead() -> None:
    """Nothing ever comes in: finite, and exactly as many kept as asked."""
    found, mask, _ = sweep(
        weights(3, 8),
        factorise(torch.zeros(8, 8), 0.01, "mean", "x"),
        kept=12,
        rule=rule("isc", PLAIN, "block", 4),
    )
    assert not found.any()
    assert int(mask.sum()) == 12


@pytest.mark.parametrize("of", DAMPINGS)
def test_damping_is_raised_for_a_singular_gram_and_reported(of: DampingOf) -> None:
    """One token gives a Gram of rank 1: 1e-12 is below float32's rounding, so the damping must
    rise, and the result be finite.
    """
    x = weights(1, 30, seed=11)
    found = factorise(x.T @ x, 1e-12, of, "here")
    assert 1e-12 < found.damping <= 1
    torch.testing.assert_close(
        found.diagonal.double(), damped(x.T @ x, found.damping, of).diagonal(), rtol=1e-5, atol=0
    )
    weight, mask, _ = sweep(weights(5, 30, seed=12), found, kept=75, rule=rule("isc", PLAIN, "block", 8))
    assert torch.isfinite(weight).all()
    assert int(mask.sum()) == 75


def test_the_smallest_damping_that_works_is_taken() -> None:
    """A well-conditioned Gram keeps the damping that was asked for."""
    _, gram = curved_gram(10, seed=13)
    assert factorise(gram, 1e-6, "mean", "here").damping == 1e-6


def test_an_indefinite_matrix_is_refused() -> None:
    """No second moment has negative eigenvalues like this: no damping up to 1 helps, and the site
    is named.
    """
    with pytest.raises(
        SparselineError, match=r"layers\.3 mlp_input cannot be factorised even with damping 1"
    ):
        factorise(torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.01, "mean", "layers.3 mlp_input")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gram_with_nan_is_refused(value: float) -> None:
    _, gram = curved_gram(6, seed=14)
    gram[2] = gram[:, 2] = value  # as an input makes it that is not finite
    with pytest.raises(
        SparselineError, match=r"second moment of layers\.1 attention_input contains NaN or infinity"
    ):
        factorise(gram, 0.01, "mean", "layers.1 attention_input")


@pytest.mark.parametrize("score", ["wanda", "obd", "obs", "isc"])
def test_diagonal_damping_makes_masks_blind_to_factors(score: Score) -> None:
    """W' = W D⁻¹ with G' = D G D: no mask moves, swept or not (2602.21652's digest, "What we must
    decide", 1).

    Powers of two, so that ties in rounding cannot decide; the compensated weights come out scaled
    to the last bit too.
    """
    weight, (_, gram) = weights(8, 32, seed=15), curved_gram(32, seed=15)
    d = 2.0 ** torch.randint(-5, 6, (32,), generator=torch.Generator().manual_seed(15))
    other, scaled = (
        factorise(gram, 0.01, "diagonal", "x"),
        factorise(d[:, None] * gram * d, 0.01, "diagonal", "x"),
    )
    for group in get_args(Group):
        a = select(saliency(score, weight, other.whole()), 100, group, 8)
        assert torch.equal(a, select(saliency(score, weight / d, scaled.whole()), 100, group, 8))
    swept = [
        sweep(w, f, kept=128, rule=rule(score, PLAIN, "block", 8))
        for w, f in ((weight, other), (weight / d, scaled))
    ]
    assert torch.equal(swept[0][1], swept[1][1])
    assert torch.equal(swept[0][0], swept[1][0] * d)


@pytest.mark.parametrize("score", ["magnitude", "obs"])
def test_the_invariance_test_has_power(score: Score) -> None:
    """The same factors do move the masks of Magnitude, and of OBS under damping by the mean diagonal."""
    weight, (_, gram) = weights(8, 32, seed=15), curved_gram(32, seed=15)
    d = 2.0 ** torch.randint(-5, 6, (32,), generator=torch.Generator().manual_seed(15))
    of: DampingOf = "mean"
    a = select(saliency(score, weight, factorise(gram, 0.01, of, "x").whole()), 100, "matrix", 8)
    b = select(
        saliency(score, weight / d, factorise(d[:, None] * gram * d, 0.01, of, "x").whole()), 100, "matrix", 8
    )
    assert not torch.equal(a, b)


@pytest.mark.parametrize("group", get_args(Group))
def test_importance_multiplies_the_scores_by_its_square(group: Group) -> None:
    """Oracle: Magnitude of W·diag(u) chooses the same mask as Magnitude of W with importance u; the
    weights are W's.
    """
    weight, (_, gram) = weights(6, 16, seed=16), curved_gram(16, seed=16)
    u = torch.rand(16, generator=torch.Generator().manual_seed(16)) + 0.2
    # A diagonal G leaves nothing to compensate: the kept weights stay as they are.
    factorisation = factorise(torch.diag(gram.diagonal()), 0.01, "mean", "x")
    found, mask, _ = sweep(weight, factorisation, kept=40, rule=rule("magnitude", PLAIN, group, 4, u))
    _, expected, _ = sweep(weight * u, factorisation, kept=40, rule=rule("magnitude", PLAIN, group, 4))
    assert torch.equal(mask, expected)
    _, plain, _ = sweep(weight, factorisation, kept=40, rule=rule("magnitude", PLAIN, group, 4))
    assert not torch.equal(mask, plain)
    torch.testing.assert_close(found, weight * mask, rtol=1e-5, atol=1e-6)


def test_importance_reaches_the_groups_of_n_of_m() -> None:
    """Oracle: selection by hand from |W|·u."""
    weight, (_, gram) = weights(4, 12, seed=17), curved_gram(12, seed=17)
    u = torch.rand(12, generator=torch.Generator().manual_seed(17)) + 0.1
    factorisation = factorise(torch.diag(gram.diagonal()), 0.01, "mean", "x")
    _, mask, _ = sweep(weight, factorisation, kept=24, rule=rule("magnitude", Pattern(2, 4), "row", 4, u))
    assert torch.equal(mask, select_n_of_m((weight * u).abs(), 2, 4))


def test_sweep_leaves_its_input_alone() -> None:
    weight, (_, gram) = weights(4, 8, seed=18), curved_gram(8, seed=18)
    before = weight.clone()
    sweep(weight, factorise(gram, 0.01, "mean", "x"), kept=16, rule=rule("obs", PLAIN, "block", 4))
    assert torch.equal(weight, before)


# The order of the columns


def ordered(gram: torch.Tensor, order: torch.Tensor, damping: float = 0.01) -> Factorisation:
    return factorise(gram, damping, "mean", "here", ordering=lambda curvature: order)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("block", "met"),
    # of 20 columns: the short last block first, in between, none
    [(20, [0]), (8, [2, 0, 1]), (8, [1, 2, 0]), (5, [3, 1, 0, 2])],
)
def test_ordered_sweep_is_the_sweep_of_ordered_columns(score: Score, block: int, met: list[int]) -> None:
    """Oracle: ``literal_sweep`` of explicitly permuted W and H, blocks and their quotas permuted
    with them, and its result permuted back.
    """
    weight, (_, gram) = weights(6, 20, seed=5), curved_gram(20, seed=5)
    random = torch.Generator().manual_seed(block)
    parts = torch.arange(20).split(block)
    order = torch.cat([parts[i][torch.randperm(len(parts[i]), generator=random)] for i in met])
    assert not torch.equal(order, torch.arange(20))
    widths = [len(parts[i]) for i in met]
    hessian = damped(gram, 0.01, "mean")[order][:, order]
    expected, mask = literal_sweep(
        weight[:, order], gram[order][:, order], hessian, score, [3 * w for w in widths], widths, PLAIN
    )
    found, chosen, _ = sweep(weight, ordered(gram, order), kept=60, rule=rule(score, PLAIN, "block", block))
    assert torch.equal(chosen[:, order], mask)
    torch.testing.assert_close(found[:, order].double(), expected, rtol=1e-2, atol=1e-3)
    assert [int(part.sum()) for part in chosen.split(block, 1)] == [3 * len(part) for part in parts]
    assert not torch.equal(
        found,
        sweep(weight, ordered(gram, torch.arange(20)), kept=60, rule=rule(score, PLAIN, "block", block))[0],
    )


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("text", "block"), [("2:4", 4), ("1:4", 6), ("3:8", 12)])
def test_ordered_sweep_for_n_of_m(score: Score, text: str, block: int) -> None:
    """Oracle: ``literal_sweep`` of permuted inputs; N are kept of every M of the matrix's own columns."""
    pattern = Pattern.parse(text)
    weight, (_, gram) = weights(5, 24, seed=6), curved_gram(24, seed=6)
    order = rose_order(torch.arange(24.0), block, pattern.m, 0.0)
    assert order is not None
    assert not torch.equal(order, torch.arange(24))
    hessian = damped(gram, 0.01, "mean")[order][:, order]
    expected, mask = literal_sweep(
        weight[:, order], gram[order][:, order], hessian, score, [], pattern.m, pattern
    )
    kept = 5 * 24 * pattern.n // pattern.m
    found, chosen, _ = sweep(weight, ordered(gram, order), kept=kept, rule=rule(score, pattern, "row", block))
    assert torch.equal(chosen[:, order], mask)
    torch.testing.assert_close(found[:, order].double(), expected, rtol=1e-2, atol=1e-3)
    assert (chosen.reshape(-1, pattern.m).sum(1) == pattern.n).all()


@pytest.mark.parametrize("group", ["row", "matrix"])
def test_ordered_sweep_with_a_mask_chosen_beforehand(group: Group) -> None:
    """The mask, chosen with importance, is the one of any other order; oracle of the weights: OBS
    for it on permuted inputs.
    """
    weight, (_, gram) = weights(4, 18, seed=7), curved_gram(18, seed=7)
    # any order will do: no blocks are compared
    order = torch.randperm(18, generator=torch.Generator().manual_seed(7))
    u = torch.rand(18, generator=torch.Generator().manual_seed(8)) + 0.2
    factorisation = ordered(gram, order)
    mask = select(
        saliency("obs", weight, factorise(gram, 0.01, "mean", "x").whole()) * u.square(), 30, group, 128
    )
    inverse = torch.linalg.inv(damped(gram, 0.01, "mean"))
    expected = weight.double().clone()
    for m in order.tolist():
        for r in range(4):
            if not mask[r, m]:
                expected[r] -= expected[r, m] / inverse[m, m] * inverse[m]
        inverse = inverse - torch.outer(inverse[:, m], inverse[m]) / inverse[m, m]
    found, chosen, _ = sweep(weight, factorisation, kept=30, rule=rule("obs", PLAIN, group, 128, u))
    assert torch.equal(chosen, mask)
    torch.testing.assert_close(found.double(), expected.masked_fill(~mask, 0), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("group", get_args(Group))
def test_left_to_right_as_an_order_changes_no_bit(group: Group) -> None:
    """Oracle: the sweep without an order. Also with inputs that are always zero; the selection
    weights are reordered with the columns.
    """
    weight, (x, _) = weights(6, 16, seed=19), curved_gram(16, seed=19)
    x[:, [3, 9]] = 0
    gram = x.T @ x / len(x)
    u = torch.rand(16, generator=torch.Generator().manual_seed(19)) + 0.2
    results = []
    for order in (None, torch.arange(16), torch.arange(15, -1, -1)):
        factorisation = factorise(gram, 0.01, "mean", "x", ordering=lambda curvature, order=order: order)  # type: ignore[misc]
        results.append(sweep(weight, factorisation, kept=40, rule=rule("isc", PLAIN, group, 4, u)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])
    flipped = factorise(gram.flip(0, 1), 0.01, "mean", "x")
    if group == "block":
        found, mask, _ = sweep(weight.flip(1), flipped, kept=40, rule=rule("isc", PLAIN, group, 4, u.flip(0)))
        assert torch.equal(mask.flip(1), results[2][1])
        torch.testing.assert_close(found.flip(1), results[2][0], rtol=1e-3, atol=1e-4)


def test_an_ordered_factorisation_is_that_of_ordered_columns() -> None:
    """Oracle: explicit inverses in float64; what is handed to the ordering, and ``whole``, are in
    the matrix's own order.
    """
    _, gram = curved_gram(11, seed=20)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(20))
    seen = []
    found = factorise(gram, 0.02, "mean", "here", ordering=lambda curvature: seen.append(curvature) or order)  # type: ignore[func-returns-value]
    hessian = damped(gram, 0.02, "mean")
    torch.testing.assert_close(
        seen[0].inverse_diagonal.double(), torch.linalg.inv(hessian).diagonal(), rtol=1e-3, atol=1e-6
    )
    assert torch.equal(found.whole().inverse_diagonal, seen[0].inverse_diagonal)
    assert torch.equal(found.whole().diagonal, factorise(gram, 0.02, "mean", "here").diagonal)
    torch.testing.assert_close(hessian_of(found, gram).double(), hessian, rtol=1e-5, atol=1e-6)
    permuted = hessian[order][:, order]
    torch.testing.assert_close(
        (found.upper.T @ found.upper).double(), torch.linalg.inv(permuted), rtol=1e-3, atol=1e-4
    )
    trailing = torch.stack([torch.linalg.inv(permuted[m:, m:])[0, 0] for m in range(11)])
    torch.testing.assert_close(found.trailing().inverse_diagonal.double(), trailing, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.trailing().diagonal.double(), permuted.diagonal(), rtol=1e-5, atol=0)
    assert torch.equal(found.trailing().second_moment, gram.diagonal()[order])


@pytest.mark.parametrize(
    ("text", "block", "order"),
    [("unstructured", 4, [0, 4, 1, 2, 3, 5, 6, 7]), ("2:4", 8, [0, 4, 1, 2, 3, 5, 6, 7])],
)
def test_an_order_that_tears_apart_what_is_compared_is_refused(
    text: str, block: int, order: list[int]
) -> None:
    _, gram = curved_gram(8, seed=21)
    with pytest.raises(ValueError, match=r"tears apart 4 that belong together"):
        sweep(
            weights(3, 8),
            ordered(gram, torch.tensor(order)),
            kept=12,
            rule=rule("obs", Pattern.parse(text), "block", block),
        )


@pytest.mark.parametrize(
    ("columns", "block", "m"), [(24, 8, 0), (20, 8, 0), (24, 8, 4), (20, 6, 4), (16, 128, 8), (7, 3, 0)]
)
def test_rose_order_has_two_levels(columns: int, block: int, m: int) -> None:
    """Oracle: sorted lists. Blocks by falling mean loss, in each the columns (groups of M, whole)
    by falling loss.
    """
    # with ties
    losses = torch.randint(0, 6, (columns,), generator=torch.Generator().manual_seed(columns + block)).float()
    values, unit = losses.tolist(), m or 1
    width = -(-block // unit) * unit
    blocks = [list(range(start, min(start + width, columns))) for start in range(0, columns, width)]
    blocks.sort(key=lambda b: -sum(values[c] for c in b) / len(b))
    expected = []
    for b in blocks:
        units = [b[i : i + unit] for i in range(0, len(b), unit)]
        units.sort(key=lambda g: -sum(values[c] for c in g))
        expected += [c for g in units for c in g]
    order = rose_order(losses, block, m, 0.0)
    assert order is not None
    assert order.tolist() == expected


def test_rose_order_only_where_the_site_is_columnar() -> None:
    """The relative range of the block losses decides; a short last block is compared by its mean.
    One block is never columnar.
    """
    losses = torch.tensor([1.0, 3, 3, 3, 0, 3, 2, 1, 8, 8, 8, 5])  # blocks of 4: 10, 6 and 29
    assert rose_order(losses, 4, 0, 23 / 29 + 1e-6) is None
    order = rose_order(losses, 4, 0, 23 / 29 - 1e-6)
    assert order is not None
    assert order.tolist() == [8, 9, 10, 11, 1, 2, 3, 0, 5, 6, 7, 4]
    short = torch.tensor([4.0, 4, 4, 4, 4, 4, 4, 3])  # blocks of 3: means 4, 4 and 3.5, sums 12, 12 and 7
    assert rose_order(short, 3, 0, 0.2) is None
    assert rose_order(short, 3, 0, 0.1) is not None
    assert rose_order(torch.arange(8.0), 128, 0, 0.5) is None


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("text", "group"),
    [("unstructured", "row"), ("unstructured", "matrix"), ("unstructured", "block"), ("2:4", "row")],
)
def test_column_losses_by_loops(score: Score, text: str, group: Group) -> None:
    """Oracle: w²/[H⁻¹]_mm of the weights that go, added up one by one; the mask from the variant's
    own score, group and importance.
    """
    pattern = Pattern.parse(text)
    weight, (x, _) = weights(6, 16, seed=22), curved_gram(16, seed=22)
    x[:, 5] = 0
    gram = x.T @ x / len(x)
    u = torch.rand(16, generator=torch.Generator().manual_seed(22)) + 0.2
    alive = weight.clone()
    alive[:, 5] = 0
    curvature = factorise(gram, 0.01, "mean", "x").whole()
    scores = saliency(score, alive, curvature) * u.square()
    mask = select_n_of_m(scores, 2, 4) if pattern.m else select(scores, 48, group, 6)
    assert torch.equal(mask, rule(score, pattern, group, 6).mask(scores, 48))
    inverse = torch.linalg.inv(damped(gram, 0.01, "mean")).diagonal()
    expected = torch.zeros(16, dtype=torch.float64)
    for r in range(6):
        for c in range(16):
            if not mask[r, c] and c != 5:
                expected[c] += float(weight[r, c]) ** 2 / float(inverse[c])
    found = column_losses(weight, curvature, kept=48, rule=rule(score, pattern, group, 6, u))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-9)


def test_large_losses_first_lowers_the_error_of_a_columnar_matrix() -> None:
    """What ROSE is for: large columns at the end leave nothing to make up for them; swept first,
    they cost less.
    """
    errors: dict[bool, float] = {False: 0.0, True: 0.0}
    for seed in range(5):
        weight, (_, gram) = weights(24, 32, seed=seed), curved_gram(32, seed=seed, spread=0.1)
        weight[:, 24:] *= 6
        for reorder in errors:
            how = rule("obs", PLAIN, "block", 8)
            found = factorise(
                gram,
                0.01,
                "mean",
                "x",
                ordering=lambda c, w=weight, r=reorder, k=how: (
                    rose_order(column_losses(w, c, 384, k), 8, 0, 0.5) if r else None
                ),  # type: ignore[misc]
            )
            assert (found.order is not None) == reorder
            errors[reorder] += layer_error(weight, sweep(weight, found, 384, how)[0], gram)
    assert errors[True] < 0.9 * errors[False]


# The target


def streams(
    columns: int, seed: int, dead: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense and pruned inputs X_d, X [tokens, C] in float64, G = E[X Xᵀ] and C = E[X_d Xᵀ];
    ``dead`` inputs are zero in X only.
    """
    dense = curved_gram(columns, seed, tokens=60)[0].double()
    pruned = 0.8 * dense + 0.5 * curved_gram(columns, seed + 100, tokens=60)[0].double()
    pruned[:, dead] = 0
    return dense, pruned, pruned.T @ pruned / 60, dense.T @ pruned / 60


@pytest.mark.parametrize("order", [None, [3, 1, 0, 2, 7, 5, 4, 6]])
def test_aim_is_w_for_equal_streams_and_for_share_zero(order: list[int] | None) -> None:
    """To the last bit, so that everything after it is what it was without."""
    weight, (_, gram) = weights(5, 8, seed=23), curved_gram(8, seed=23)
    _, cross = curved_gram(8, seed=24)
    factorisation = (
        factorise(gram, 0.01, "mean", "x") if order is None else ordered(gram, torch.tensor(order))
    )
    assert torch.equal(target_weight(weight, torch.zeros_like(gram), factorisation, 1.0), weight)
    assert torch.equal(target_weight(weight, cross - gram, factorisation, 0.0), weight)
    assert not torch.equal(target_weight(weight, cross - gram, factorisation, 0.5), weight)


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("reorder", [False, True])
def test_aim_by_an_explicit_inverse(share: float, reorder: bool) -> None:
    """Oracle: W + share·W (C − G) H⁻¹ with torch.linalg.inv, in the matrix's own order whatever the
    sweep's.
    """
    _, _, gram, cross = streams(12, seed=25)
    weight = weights(5, 12, seed=25).double()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(25))
    factorisation = ordered(gram, order) if reorder else factorise(gram, 0.01, "mean", "x")
    expected = weight + share * weight @ (cross - gram) @ torch.linalg.inv(damped(gram, 0.01, "mean"))
    torch.testing.assert_close(
        target_weight(weight, cross - gram, factorisation, share), expected, rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dead", [(), (2, 9)])
def test_aim_meets_the_outputs_of_the_dense_stream(share: float, dead: tuple[int, ...]) -> None:
    """Oracle: torch.linalg.lstsq of the outputs W (X + share·(X_d − X)) on the kept inputs X, row
    by row, without damping to speak of.

    Inputs that are always zero in the pruned stream alone are among those: what they did is made up
    for by the others.
    """
    dense, pruned, gram, cross = streams(12, seed=26, dead=dead)
    weight = weights(6, 12, seed=26).double()
    mask = select_n_of_m(weights(6, 12, seed=27), 2, 4)
    mask[0] = True
    factorisation = factorise(gram, 1e-9, "diagonal", "x")
    target = target_weight(weight, cross - gram, factorisation, share)
    start = torch.zeros_like(weight)
    target[:, dead] = 0
    found, *_ = solve(target, mask, hessian_of(factorisation, gram), start, lsq(200, 1e-12))
    outputs = (pruned + share * (dense - pruned)) @ weight.T
    for r in range(6):
        kept = [c for c in mask[r].nonzero()[:, 0].tolist() if c not in dead]
        expected = torch.linalg.lstsq(pruned[:, kept], outputs[:, r], driver="gelsd").solution
        torch.testing.assert_close(found[r, kept], expected, rtol=1e-5, atol=1e-7)
    assert not found[:, dead].any()


def test_the_error_of_the_target_is_that_of_the_outputs() -> None:
    """Oracle: E‖Ŵ X − W X_d‖² + ‖(Ŵ − W) Λ^½‖² from the activations: its difference between any two
    Ŵ is that of tr((Ŵ − W₀) H (Ŵ − W₀)ᵀ).
    """
    dense, pruned, gram, cross = streams(10, seed=28)
    weight, factorisation = weights(4, 10, seed=28).double(), factorise(gram, 0.1, "mean", "x")
    target, hessian = target_weight(weight, cross - gram, factorisation, 1.0), hessian_of(factorisation, gram)
    ridge = hessian.diagonal() - gram.diagonal()

    def outputs(new: torch.Tensor) -> float:
        return float(
            (pruned @ new.T - dense @ weight.T).square().sum() / len(dense)
            + ((new - weight).square() * ridge).sum()
        )

    def squared(new: torch.Tensor) -> float:
        return float((((new - target) @ hessian) * (new - target)).sum())

    one, other = weights(4, 10, seed=29).double(), weights(4, 10, seed=30).double()
    assert outputs(one) - outputs(other) == pytest.approx(squared(one) - squared(other), rel=1e-8)
    relative = layer_error(target, one, hessian.float()) / layer_error(target, other, hessian.float())
    assert relative == pytest.approx(squared(one) / squared(other), rel=1e-4)


@pytest.mark.parametrize("score", SCORES)
def test_the_sweep_from_the_target_comes_nearer_to_the_dense_outputs(score: Score) -> None:
    """Swept from W₀ the outputs on the pruned stream are nearer to the dense ones than swept from
    W, clearly and with either mask.
    """
    dense, pruned, gram, cross = (tensor.float() for tensor in streams(24, seed=31))
    weight = weights(16, 24, seed=31)
    factorisation = factorise(gram, 0.01, "mean", "x")
    errors = []
    for share in (0.0, 1.0):
        start = target_weight(weight, cross - gram, factorisation, share)
        found, _, _ = sweep(start, factorisation, kept=192, rule=rule(score, PLAIN, "block", 8))
        errors.append(float((pruned @ found.T - dense @ weight.T).square().sum()))
    assert errors[1] < 0.9 * errors[0]
