"""Least squares on a mask and the search for a better mask. Oracles: torch.linalg.lstsq,
enumeration of all masks, ADMM written out.
"""

import functools
import itertools
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from rules import PLAIN, hessian_of, lsq, rule
from tiny import curved_gram

from pipeline_lib.masks.select import select, select_n_of_m
from pipeline_lib.masks.settings import Group, Pattern, Score
from pipeline_lib.solve.factor import factorise, layer_error
from pipeline_lib.solve.lsq import Search, _alternate, _penalties, admm, affordable, solve
from pipeline_lib.solve.sweep import sweep

SCORES: tuple[Score, ...] = get_args(Score)
GROUPS: tuple[Group, ...] = get_args(Group)
ADMM = lsq(200, 1e-10, mask_iterations=200)  # ρ of 0.1 to begin with


def normal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def activations(
    columns: int, seed: int, tokens: int = 60, dead: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """X [tokens, C] and H = E[X Xᵀ] in float64, nothing damped."""
    x = curved_gram(columns, seed, tokens)[0].double()
    x[:, dead] = 0
    return x, x.T @ x / tokens


def masks(rows: int, columns: int, seed: int) -> dict[str, torch.Tensor]:
    scores = normal(rows, columns, seed)
    uneven = scores > 0.3
    uneven[0], uneven[1] = True, False
    return {
        "2:4": select_n_of_m(scores, 2, 4),
        "1:4": select_n_of_m(scores, 1, 4),
        "uneven": uneven,
        "all": scores < 99,
        "none": scores > 99,
    }


def by_lstsq(target: torch.Tensor, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Row by row, the weights on the mask whose outputs X w come nearest to X w₀; the smallest such
    weights.
    """
    out = torch.zeros_like(target)
    for r in range(len(target)):
        kept = mask[r].nonzero()[:, 0]
        if len(kept):
            out[r, kept] = torch.linalg.lstsq(x[:, kept], x @ target[r], driver="gelsd").solution
    return out


def energy(target: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """E of every row, in float64."""
    difference = (target - weight).double()
    return torch.einsum("ri,ij,rj->r", difference, hessian.double(), difference)


@pytest.mark.parametrize("name", ["2:4", "1:4", "uneven", "all", "none"])
@pytest.mark.parametrize("dead", [(), (0, 7)])
def test_solve_is_least_squares(name: str, dead: tuple[int, ...]) -> None:
    """Oracle: torch.linalg.lstsq on the activations of the kept inputs; always-zero inputs keep the
    0 they start with.
    """
    x, hessian = activations(12, seed=1, dead=dead)
    target, mask = normal(7, 12, seed=2), masks(7, 12, seed=3)[name]
    start = normal(7, 12, seed=4)
    start[:, dead] = 0
    found, taken, _ = solve(target, mask, hessian, start, lsq(100, 1e-12))
    torch.testing.assert_close(found, by_lstsq(target, mask, x), rtol=1e-6, atol=1e-9)
    assert not found[~mask].any()
    assert (taken == 0) == (name == "none")


def test_solve_stops_at_its_tolerance() -> None:
    """Oracle: the reduction that the gradient promises for each weight alone, relative to E at the
    start. One iteration less is not enough. E is reported.
    """
    _, hessian = activations(24, seed=5)
    target, mask = normal(9, 24, seed=6), masks(9, 24, seed=7)["uneven"]
    start = torch.zeros_like(target)

    def promised(weight: torch.Tensor) -> torch.Tensor:
        return (((target - weight) @ hessian * mask).square() / hessian.diagonal()).sum(1)

    whole = energy(target, start, hessian)
    for tolerance in (1e-1, 1e-3, 1e-8):
        found, taken, error = solve(target, mask, hessian, start, lsq(1000, tolerance))
        assert promised(found).sum() <= tolerance * whole.sum() * (1 + 1e-6)
        torch.testing.assert_close(error, energy(target, found, hessian).sum())
        less, fewer, _ = solve(target, mask, hessian, start, lsq(taken - 1, tolerance))
        assert fewer == taken - 1
        assert promised(less).sum() > tolerance * whole.sum()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("case", ["unstructured-block", "unstructured-row", "unstructured-matrix", "2:4-row"])
def test_solve_never_loses_to_the_sweep(score: Score, case: str) -> None:
    """On the sweep's own masks, in float32, whatever the iterations: E of no row grows (but for
    rounding), the layer error falls clearly.
    """
    text, group = case.split("-")
    pattern = Pattern.parse(text)
    for seed in range(6):
        _, gram = curved_gram(32, seed)
        weight = normal(24, 32, seed).float()
        factorisation = factorise(gram, 0.01, "mean", "x")
        hessian = hessian_of(factorisation, gram)
        swept, mask, _ = sweep(weight, factorisation, kept=384, rule=rule(score, pattern, group, 16))  # type: ignore[arg-type]
        before = energy(weight, swept, hessian)
        for iterations in (0, 1, 5, 100):
            found, *_ = solve(weight, mask, hessian, swept, lsq(iterations, 1e-6))
            assert not found[~mask].any()
            assert (energy(weight, found, hessian) <= before * (1 + 1e-5)).all()
        assert layer_error(weight, found, gram) < 0.95 * layer_error(weight, swept, gram)


def test_more_iterations_are_better() -> None:
    """E of every row falls with every iteration (14 kept weights need 14); none leaves the start as
    it is, and an empty row has none to take.
    """
    _, hessian = activations(28, seed=8)
    target, mask = normal(5, 28, seed=9), masks(5, 28, seed=10)["2:4"]
    mask[2] = False
    start = normal(5, 28, seed=11)
    runs = [solve(target, mask, hessian, start, lsq(i, 1e-9))[0] for i in range(13)]
    assert torch.equal(runs[0], start * mask)
    fall = torch.stack([energy(target, run, hessian) for run in runs]).diff(dim=0)
    assert (fall[:, [0, 1, 3, 4]] < 0).all()
    assert not fall[:, 2].any()


@pytest.mark.parametrize("rows", [1, 4, 11, 1000])
def test_rows_at_a_time_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for rounding, which conjugate gradients let grow: hence only 4 iterations."""
    _, hessian = activations(20, seed=12)
    target, mask = normal(11, 20, seed=13), masks(11, 20, seed=14)["uneven"]
    start = torch.zeros_like(target)
    monkeypatch.setattr("pipeline_lib.solve.lsq.ROWS", 5)
    expected, taken, _ = solve(target, mask, hessian, start, lsq(4, 1e-9))
    monkeypatch.setattr("pipeline_lib.solve.lsq.ROWS", rows)
    found, again, _ = solve(target, mask, hessian, start, lsq(4, 1e-9))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert again == taken == 4


def test_scales_of_inputs_do_not_matter() -> None:
    """W₀ D⁻¹ with D H D takes the same steps, to the last bit for powers of two: that is what the
    preconditioner is for.
    """
    _, gram = curved_gram(24, seed=15)
    target, mask = normal(6, 24, seed=16).float(), masks(6, 24, seed=17)["2:4"]
    d = 2.0 ** torch.randint(-6, 7, (24,), generator=torch.Generator().manual_seed(15))
    start = torch.zeros_like(target)
    for iterations in (3, 50):
        plain, taken, _ = solve(target, mask, gram, start, lsq(iterations, 1e-3))
        scaled, again, _ = solve(target / d, mask, d[:, None] * gram * d, start, lsq(iterations, 1e-3))
        assert torch.equal(scaled * d, plain)
        assert again == taken


def test_solved_rows_stand_still() -> None:
    """A row that starts at its minimum stays there, finite, while others go on; what the start
    holds off the mask does not count.
    """
    _, hessian = activations(16, seed=18)
    target, mask = normal(6, 16, seed=19), masks(6, 16, seed=20)["2:4"]
    best, *_ = solve(target, mask, hessian, torch.zeros_like(target), lsq(200, 1e-13))
    start = best + normal(6, 16, seed=21) * ~mask
    start[3:] = 0
    found, *_ = solve(target, mask, hessian, start, lsq(200, 1e-9))
    assert torch.equal(found[:3], best[:3])
    torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-7)
    exact = solve(target, mask | ~mask, hessian, target, lsq(200, 0.0))
    assert torch.equal(exact[0], target)
    assert exact[1] == 0


def test_an_indefinite_hessian_moves_no_row_beyond_its_start() -> None:
    """The undamped Gram of fewer tokens than inputs is singular, and rounded to float32 has
    eigenvalues just below 0: E falls for ever along them. What comes back is finite, and E no
    larger in absolute value than where a row started; other rows are solved all the same.
    """
    for seed in range(8):
        x = curved_gram(24, seed, tokens=8)[0]
        gram = (x.T @ x / 8).double()
        target, mask = normal(16, 24, seed), masks(16, 24, seed)["uneven"]
        mask[2:4] = torch.arange(24) < 5
        start = torch.zeros_like(target)
        found, *_ = solve(target, mask, gram, start, lsq(300, 0.0))
        assert torch.isfinite(found).all()
        assert (energy(target, found, gram).abs() <= energy(target, start, gram) * (1 + 1e-6)).all()
        torch.testing.assert_close(found[2:4], by_lstsq(target, mask, x.double())[2:4], rtol=1e-3, atol=1e-3)


def test_solve_leaves_its_inputs_alone() -> None:
    _, hessian = activations(8, seed=22)
    inputs = normal(3, 8, seed=23), masks(3, 8, seed=24)["2:4"], hessian, normal(3, 8, seed=25)
    before = [tensor.clone() for tensor in inputs]
    solve(*inputs, lsq(10, 1e-6))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


# The mask


def literal_admm(
    target: torch.Tensor,
    mask: torch.Tensor,
    hessian: torch.Tensor,
    start: torch.Tensor,
    kept: int,
    penalties: list[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1 of 2406.07831 on Ĥ = S⁻¹HS⁻¹ with unit diagonal, a linear system solved per
    iteration (each with its ρ), masks by sorting the matrix. The dual starts as the gradient off
    the mask.
    """
    s = hessian.diagonal().sqrt()
    unit = hessian / s[:, None] / s
    goal, d = target * s, start * s
    v = (goal - d) @ unit * ~mask
    support = mask
    for rho in penalties:
        b = torch.linalg.solve(
            unit + rho * torch.eye(len(s), dtype=s.dtype), (unit @ goal.T - v.T + rho * d.T)
        ).T
        d = b + v / rho
        support = torch.zeros_like(mask)
        support.view(-1)[d.abs().flatten().argsort(descending=True)[:kept]] = True
        d = d * support
        v = v + rho * (b - d)
    return d / s, support


def searched(pick: Callable[[torch.Tensor], torch.Tensor], independence: float = 1.0) -> Search:
    return Search(pick, independence)


@pytest.mark.parametrize("spectral", [0, 16])
@pytest.mark.parametrize("steps", [1, 2, 8, 9])
def test_admm_equals_algorithm_1(steps: int, spectral: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: ``literal_admm``, whichever way inverses are taken. ρ is in the middle of 0.1 · 0.5 …
    1, or doubles around it after five of nine.
    """
    monkeypatch.setattr("pipeline_lib.solve.lsq.SPECTRAL", spectral)
    monkeypatch.setattr("pipeline_lib.solve.lsq.ROWS", 7)
    _, hessian = activations(16, seed=26)
    target = normal(10, 16, seed=27)
    mask = rule("obs", PLAIN, "row", 16).mask(target.square(), 64)
    start = 0.7 * target * mask
    pick = functools.partial(rule("obs", PLAIN, "matrix", 16).mask, kept=64)
    middle = 0.05**0.5
    penalties = [middle] * steps if steps < 9 else [middle / 2**0.5] * 5 + [middle * 2**0.5] * 4
    expected, support = literal_admm(target, mask, hessian, start, 64, penalties)
    found, chosen, taken = _alternate(
        target, mask, hessian, start, searched(pick, 0.5), lsq(0, 0.0, mask_iterations=steps)
    )
    assert torch.equal(chosen, support)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert taken == steps
    assert not torch.equal(support, mask)


def test_penalties_reach_from_the_first_to_the_last_where_there_are_iterations_for_it() -> None:
    penalties, every = _penalties(0.05, 45)
    assert (len(penalties), every) == (8, 6)
    assert penalties[0] == pytest.approx(0.05)
    assert penalties[-1] == pytest.approx(1)
    assert max(b / a for a, b in itertools.pairwise(penalties)) == pytest.approx(20 ** (1 / 7))
    assert _penalties(1.0, 45)[0] == [1.0]
    for iterations in range(1, 60):
        found, every = _penalties(0.01, iterations)
        assert (len(found) - 1) * every < iterations
        assert all(b / a <= 2 * (1 + 1e-9) for a, b in itertools.pairwise(found))
        assert found[0] * found[-1] == pytest.approx(0.01)  # around the middle


def test_iterations_cost_no_more_than_some_passes_of_the_tokens() -> None:
    params = lsq(100, 1e-3, mask_iterations=45)
    assert affordable(params, None, 4096) == params
    assert affordable(params, 10**6, 4096) == params
    few = affordable(params, 8192, 4096)
    assert (few.iterations, few.mask_iterations) == (12, 12)
    least = affordable(params, 3, 4096)
    assert (least.iterations, least.mask_iterations) == (6, 6)
    assert affordable(lsq(2, 1e-3), 3, 4096).iterations == 2


def test_a_search_in_bfloat16_finds_as_good_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refit is float32: what the search loses by rounding is below a hundredth of the error.
    Correlated inputs, many seeds.
    """
    monkeypatch.setattr("pipeline_lib.core.products.bfloat16_is_faster", lambda: True)
    errors: dict[str, float] = {"float32": 0.0, "bfloat16": 0.0}
    for seed in range(6):
        _, gram = curved_gram(96, seed, tokens=400)
        weight = normal(64, 96, seed).float()
        factorisation = factorise(gram, 0.01, "mean", "x")
        hessian = hessian_of(factorisation, gram)
        swept, mask, _ = sweep(weight, factorisation, kept=64 * 48, rule=rule("obs", PLAIN, "block", 32))
        pick = functools.partial(rule("obs", PLAIN, "block", 32).mask, kept=64 * 48)
        for dtype in errors:
            params = lsq(100, 1e-3, mask_iterations=30, mask_penalty=0.6).model_copy(
                update={"mask_dtype": dtype}
            )
            found, support, facts = admm(
                weight, mask, hessian, swept, searched(pick, factorisation.independence), params
            )
            assert int(support.sum()) == 64 * 48
            assert not found[~support].any()
            errors[dtype] += float(facts["error"]) / float(energy(weight, swept, hessian).sum())
    assert errors["float32"] < 0.9 * 6
    assert errors["bfloat16"] == pytest.approx(errors["float32"], rel=0.01)
    assert errors["bfloat16"] != errors["float32"]


def test_independence_of_inputs() -> None:
    """It is 1 without correlation, and 1 − ρ² for two inputs with correlation ρ. Inputs that are
    always zero do not count.
    """
    gram = torch.eye(6)
    assert factorise(gram, 1e-9, "mean", "x").independence == pytest.approx(1)
    gram[0, 1] = gram[1, 0] = 0.6
    gram[5] = gram[:, 5] = 0
    assert factorise(gram, 1e-9, "mean", "x").independence == pytest.approx(
        (2 * (1 - 0.36) + 3) / 5, rel=1e-5
    )
    assert factorise(torch.zeros(6, 6), 0.01, "mean", "x").independence == 1


@pytest.mark.parametrize(
    "case", ["unstructured-block", "unstructured-row", "unstructured-matrix", "2:4-row", "1:4-row"]
)
def test_admm_keeps_exact_counts_and_never_loses(case: str) -> None:
    """Against ``solve`` on the sweep's mask, many seeds in float32: never worse, on the whole much
    better; counts as the variant's own.
    """
    text, group = case.split("-")
    pattern = Pattern.parse(text)
    gains = []
    for seed in range(8):
        _, gram = curved_gram(24, seed)
        weight = normal(20, 24, seed).float()
        factorisation = factorise(gram, 0.01, "mean", "x")
        hessian = hessian_of(factorisation, gram)
        kept = 20 * 24 * pattern.n // pattern.m if pattern.m else 187
        swept, mask, _ = sweep(weight, factorisation, kept=kept, rule=rule("obs", pattern, group, 10))  # type: ignore[arg-type]
        start, *_ = solve(weight, mask, hessian, swept, lsq(200, 1e-10))
        pick = functools.partial(rule("obs", pattern, group, 10).mask, kept=kept)  # type: ignore[arg-type]
        found, support, facts = admm(weight, mask, hessian, start, searched(pick), ADMM)
        assert torch.equal(support.sum(), torch.tensor(kept))
        if pattern.m:
            assert (support.view(-1, pattern.m).sum(1) == pattern.n).all()
        elif group == "row":
            assert support.sum(1).max() - support.sum(1).min() <= 1
        elif group == "block":
            assert [int(part.sum()) for part in support.split(10, 1)] == [
                int(part.sum()) for part in mask.split(10, 1)
            ]
        assert not found[~support].any()
        fitted, *_ = solve(weight, support, hessian, torch.zeros_like(weight), lsq(200, 1e-10))
        torch.testing.assert_close(found, fitted, rtol=1e-3, atol=1e-3)
        old, new = (float(energy(weight, w, hessian).sum()) for w in (start, found))
        assert new <= old * (1 + 1e-5)
        assert facts["gain"] == pytest.approx(1 - new / old, abs=1e-4)
        assert float(facts["error"]) == pytest.approx(new, rel=1e-4)
        assert facts["swapped"] == float((support != mask).double().mean())
        gains.append(facts["gain"])
    assert sum(gains) / len(gains) > 0.1


def best_of_all(target: torch.Tensor, hessian: torch.Tensor, kept: int) -> torch.Tensor:
    """E of every row on the best of all its masks, by trying each."""
    best = torch.full((len(target),), float("inf"), dtype=torch.float64)
    for subset in itertools.combinations(range(target.shape[1]), kept):
        mask = torch.zeros_like(target, dtype=torch.bool)
        mask[:, subset] = True
        part = hessian[list(subset)]
        weight = torch.zeros_like(target)
        weight[:, subset] = torch.linalg.solve(part[:, subset], part @ target.T).T
        best = torch.minimum(best, energy(target, weight, hessian))
    return best


def test_admm_comes_near_the_best_mask_of_all() -> None:
    """Oracle: all 70 masks of 4 of 8 per row. It closes most of the way from the sweep's refitted
    mask to the optimum, and never passes it.
    """
    closed = []
    for seed in range(5):
        _, hessian = activations(8, seed)
        target = normal(12, 8, seed)
        swept, mask, _ = sweep(
            target, factorise(hessian, 1e-9, "mean", "x"), kept=48, rule=rule("obs", PLAIN, "row", 8)
        )
        start, *_ = solve(target, mask, hessian, swept, lsq(100, 1e-10))
        pick = functools.partial(rule("obs", PLAIN, "row", 8).mask, kept=48)
        found, _, _ = admm(target, mask, hessian, start, searched(pick), ADMM)
        old, new, best = (
            float(e.sum())
            for e in (
                energy(target, start, hessian),
                energy(target, found, hessian),
                best_of_all(target, hessian, 4),
            )
        )
        assert best * (1 - 1e-9) <= new <= old
        closed.append((old - new) / (old - best))
    assert sum(closed) / len(closed) > 0.5


@pytest.mark.parametrize(
    "pick", [lambda scores: select(-scores, 40, "row", 8), lambda scores: select(-scores, 40, "matrix", 8)]
)
def test_a_worse_mask_is_refused(pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """If what is chosen are the worst places, the old mask and its weights come back."""
    _, hessian = activations(8, seed=29)
    target = normal(10, 8, seed=30)
    mask = select(target.square() * hessian.diagonal(), 40, "row", 8)
    start, *_ = solve(target, mask, hessian, target, lsq(100, 1e-9))
    found, chosen, facts = admm(target, mask, hessian, start, searched(pick), ADMM)
    assert torch.equal(found, start)
    assert torch.equal(chosen, mask)
    assert facts["swapped"] == facts["gain"] == 0


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_admm_with_nothing_to_choose(density: float) -> None:
    """All or no weights kept: finite, the same mask, and an end long before the iterations are used up."""
    _, hessian = activations(8, seed=31)
    target = normal(4, 8, seed=32)
    kept = int(32 * density)
    mask = torch.full((4, 8), bool(density))
    pick = functools.partial(rule("obs", PLAIN, "row", 8).mask, kept=kept)
    found, chosen, facts = admm(target, mask, hessian, target * mask, searched(pick), ADMM)
    assert torch.equal(chosen, mask)
    torch.testing.assert_close(found, target * mask, rtol=1e-9, atol=1e-12)
    assert facts["iterations"] < 50


@pytest.mark.parametrize("damped", [True, False])
def test_dead_inputs_take_no_places(damped: bool) -> None:
    """Their columns of W₀ are 0: with enough others to choose from none is kept, damped (H_mm is
    then a stand-in) or not (H_mm = 0).
    """
    _, hessian = activations(12, seed=33, dead=(1, 4))
    if damped:
        hessian = hessian_of(factorise(hessian, 0.01, "mean", "x"), hessian)
    target = normal(6, 12, seed=34)
    target[:, [1, 4]] = 0
    mask = select(target.square() * hessian.diagonal(), 30, "row", 12)
    start, *_ = solve(target, mask, hessian, target, lsq(100, 1e-9))
    pick = functools.partial(rule("obs", PLAIN, "row", 12).mask, kept=30)
    found, chosen, facts = admm(target, mask, hessian, start, searched(pick), ADMM)
    assert facts["swapped"] > 0
    assert torch.isfinite(found).all()
    assert not chosen[:, [1, 4]].any()
