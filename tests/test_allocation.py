"""Allocations from what was measured. Oracles: exact dynamic programming, counts by hand, and the
budget's own arithmetic.
"""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from project import WANDA, build, invoke, make_workspace
from safetensors.torch import load_file

from pipeline_lib.allocate.budget import Unit, allocate, ranks
from pipeline_lib.allocate.by_hand import by_hand, left
from pipeline_lib.allocate.methods import AllocationParams, counts
from pipeline_lib.allocate.predicted import Curve, hull, minimise
from pipeline_lib.core.counts import target
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.recipe import words
from pipeline_lib.recipe.variants import read

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)
METHODS = get_args(AllocationParams.model_fields["method"].annotation)
SPARSITY = st.integers(1, 99).map(lambda percent: percent / 100)
DENSITIES = np.array([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])


def params(method: str, **changes: Any) -> AllocationParams:
    shipped = {
        "method": method,
        "alpha": 0.1,
        "layer_sensitivity": "sum",
        "weighting": "trace",
        "temper": 1.0,
    }
    shipped |= {"density_bounds": (0.0, 1.0)}
    return AllocationParams.model_validate(shipped | changes)


def units_of(sizes: list[int], quanta: list[int] | None = None) -> list[Unit]:
    return [Unit(f"m{i}", i // 3, size, 1 if quanta is None else quanta[i]) for i, size in enumerate(sizes)]


def falling(seed: int, convex: bool = False) -> Curve:
    """A random curve from some loss at 0 down to 0 at 1; not convex unless asked for."""
    draw = np.random.default_rng(seed)
    if convex:
        return Curve(DENSITIES, 10 ** draw.uniform(-3, 1) * (1 - DENSITIES) ** draw.uniform(1, 6))
    return Curve(DENSITIES, np.sort(10 ** draw.uniform(-4, 1, len(DENSITIES)))[::-1] * (DENSITIES < 1))


def measured(units: list[Unit], seed: int) -> dict[str, dict[str, Any]]:
    """Entries of a variant's curves with random facts."""
    draw = np.random.default_rng(seed)
    found = {}
    for i, unit in enumerate(units):
        curve = falling(seed + i)
        found[unit.name] = {
            "sensitivity": float(10 ** draw.uniform(-4, 0)),
            "outliers": unit.block % 3,
            "median": unit.block % 2,
        }
        found[unit.name]["curve"] = {
            "density": list(curve.density),
            "frobenius": list(curve.loss),
            "kronecker": list(2 * curve.loss),
        }
    return found


# Every method


@PROPERTY
@given(
    st.sampled_from(METHODS),
    st.lists(st.integers(1, 50_000), min_size=1, max_size=20),
    SPARSITY,
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(["trace", "kronecker"]),
    st.sampled_from([1.0, 0.5]),
    st.integers(0, 99),
)
def test_every_method_meets_the_budget_within_bounds(
    method: str,
    sizes: list[int],
    sparsity: float,
    alpha: float,
    below: float,
    above: float,
    weighting: str,
    temper: float,
    seed: int,
) -> None:
    """Whatever shapes, targets and bounds: round((1 − p)·N) exactly and every density within them,
    or, where no counts do, the one sentence.
    """
    units = units_of(sizes)
    low, high = max(0.0, 1 - sparsity - below), min(1.0, 1 - sparsity + above)
    chosen = params(method, alpha=alpha, weighting=weighting, temper=temper, density_bounds=(low, high))
    if method == "predicted":  # which is bound by alpha, too
        low, high = max(low, 1 - sparsity - alpha), min(high, 1 - sparsity + alpha)
    least, most = (
        sum(int(f(round(bound * size, 9))) for size in sizes)
        for f, bound in ((np.ceil, low), (np.floor, high))
    )
    whole = all(np.ceil(round(low * size, 9)) <= np.floor(round(high * size, 9)) for size in sizes)
    if not (whole and least <= target(sparsity, sum(sizes)) <= most):
        with pytest.raises(SparselineError, match="No allocation with densities between"):
            counts(units, sparsity, chosen, measured(units, seed))
        return
    kept = counts(units, sparsity, chosen, measured(units, seed))
    assert sum(kept) == round((1 - sparsity) * sum(sizes))
    assert all(low - 1e-9 <= k / size <= high + 1e-9 for k, size in zip(kept, sizes, strict=True))


@PROPERTY
@given(
    st.sampled_from(METHODS),
    st.lists(st.tuples(st.integers(1, 400), st.sampled_from([4, 8])), min_size=1, max_size=20),
    SPARSITY,
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_every_method_takes_whole_quanta(
    method: str, parts: list[tuple[int, int]], sparsity: float, alpha: float, seed: int
) -> None:
    """Mixed N:M: kept counts are multiples of the quantum (size/M), and their sum is within half of
    the largest quantum.
    """
    units = units_of([quantum * m for quantum, m in parts], [quantum for quantum, _ in parts])
    alpha = 1.0 if method == "predicted" else alpha  # it bounds densities, and N:M has few of them
    kept = counts(units, sparsity, params(method, alpha=alpha), measured(units, seed))
    assert (
        abs(sum(kept) - target(sparsity, sum(unit.size for unit in units)))
        <= max(unit.quantum for unit in units) / 2
    )
    assert all(k % unit.quantum == 0 and 0 <= k <= unit.size for k, unit in zip(kept, units, strict=True))


@PROPERTY
@given(
    st.sampled_from(METHODS),
    st.lists(st.integers(1, 50_000), min_size=4, max_size=20),
    SPARSITY,
    st.lists(SPARSITY, min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_the_rest_meets_the_budget(
    method: str, sizes: list[int], sparsity: float, given: list[float], seed: int
) -> None:
    """Sparsities by hand for the first matrices: exactly theirs, and exactly the budget of all, or
    the one sentence that it cannot be met.
    """
    units = units_of(sizes)
    kept = by_hand(
        units, [[unit.name] for unit in units], [(f"m{i}", one) for i, one in enumerate(given)], "x"
    )
    assert kept == {f"m{i}": round((1 - one) * sizes[i]) for i, one in enumerate(given)}
    wanted = round((1 - sparsity) * sum(sizes)) - sum(kept.values())
    if not 0 <= wanted <= sum(sizes[len(given) :]):
        with pytest.raises(
            SparselineError, match=r"overall = .* is not met: .* and the other matrices cannot balance this"
        ):
            left(units, kept, sparsity, "x")
        return
    rest, theirs = left(units, kept, sparsity, "x")
    assert rest == units[len(given) :]
    found = counts(rest, theirs, params(method, alpha=1.0), measured(units, seed))
    assert sum(found) + sum(kept.values()) == round((1 - sparsity) * sum(sizes))


def test_the_first_pattern_that_matches_counts() -> None:
    """Oracle: by hand. Every name of a matrix may be used; a pattern after a wider one would do
    nothing, and is refused.
    """
    units = [Unit(f"layers.{block}.{kind}", block, 100, 1) for block in range(2) for kind in ("q", "v", "up")]
    names = [[unit.name, f"model.{unit.name}.weight"] for unit in units]
    kept = by_hand(units, names, [("layers.0.v", 0.1), ("re:model.*v.weight", 0.2), ("layers.0", 0.75)], "x")
    assert kept == {"layers.0.v": 90, "layers.1.v": 80, "layers.0.q": 25, "layers.0.up": 25}
    rest, sparsity = left(units, kept, 0.5, "x")
    assert [unit.name for unit in rest] == ["layers.1.q", "layers.1.up"] and sparsity == pytest.approx(0.6)
    assert left(units, {}, 0.3, "x") == (units, 0.3)
    for patterns, told in (
        (
            [("layers.0", 0.5), ("*.q", 0.5), ("layers.0.v", 0.1)],
            r"x: patterns before 'layers\.0\.v' take all that it matches, layers\.0\.v for",
        ),
        ([("*.gone", 0.5)], r"x: '\*\.gone' matches no matrix; names are, for example, 'layers\.0\.q'"),
        ([("re:(", 0.5)], r"x: 're:\(' is not a regular expression"),
    ):
        with pytest.raises(SparselineError, match=told):
            by_hand(units, names, patterns, "x")
    with pytest.raises(
        SparselineError,
        match=(
            r"overall = 0\.5 is not met: the patterns give 6 of 6 matrices a sparsity, 0\.5 together, and"
            r" there is no other matrix"
        ),
    ):
        left(units, by_hand(units, names, [("*", 0.5)], "x"), 0.5, "x")


def test_sparsities_by_hand_of_a_pattern() -> None:
    """With 2:4, densities are multiples of a quarter. One matrix keeps 3 of 4, so the others
    together keep less than 2 of 4.
    """
    units = units_of([400] * 4, [100] * 4)
    names = [[unit.name] for unit in units]
    kept = by_hand(units, names, [("m0", 0.25)], "x")
    rest, sparsity = left(units, kept, 0.5, "x")
    assert kept == {"m0": 300} and sparsity == pytest.approx(1 - 500 / 1200)
    assert sorted(counts(rest, sparsity, params("uniform"), {})) == [100, 200, 200]
    with pytest.raises(
        SparselineError,
        match=r"'m0' gives m0 a sparsity of 0\.3, but its N:M pattern needs a multiple of 0\.25",
    ):
        by_hand(units, names, [("m0", 0.3)], "x")


def test_checkpoints_are_as_sparse_as_asked_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: zeros of the saved checkpoint, counted: one matrix untouched, one kind at 30%, and
    half of all weights.
    """
    given = {"overall": 0.5, "model.layers.0.mlp.up_proj.weight": 0, "*.v_proj": 0.3}
    wanda = WANDA | {"selection": {"score": "wanda", "group": "row", "sparsity": given}}
    monkeypatch.chdir(make_workspace(tmp_path / "project", variants={"wanda": wanda}))
    build("prepare", "text calibration")
    told = invoke("allocate", "wanda").output
    assert "(uniform, manual for 3 of 14 matrices), " in told
    build("prune wanda")
    tensors = {
        name: one
        for path in Path("build/prune/wanda/checkpoint").glob("*.safetensors")
        for name, one in load_file(path).items()
    }
    zeros = {
        name: int((tensor == 0).sum())
        for name, tensor in tensors.items()
        if ".layers." in name and tensor.ndim == 2
    }
    for name, count in zeros.items():
        size = tensors[name].numel()
        if name.endswith("v_proj.weight"):
            assert count == size - round(0.7 * size)
        elif name == "model.layers.0.mlp.up_proj.weight":
            assert count == 0
        else:
            assert count > size / 2
    assert sum(zeros.values()) == sum(tensors[name].numel() for name in zeros) // 2
    assert (
        "manual model.layers.0.mlp.up_proj.weight 0; manual *.v_proj 0.3"
        in words.rows(read("wanda").recipe)["allocation"]
    )


@pytest.mark.parametrize("method", METHODS)
def test_impossible_bounds_are_told_in_one_sentence(method: str) -> None:
    units = units_of([100, 40])
    with pytest.raises(
        SparselineError,
        match=(
            r"^No allocation with densities between .* meets sparsity 0\.5; widen allocation\.density_bounds,"
            r" [^.]*\.$"
        ),
    ):
        counts(units, 0.5, params(method, density_bounds=(0.6, 0.9)), measured(units, 0))


# Least predicted loss


def cheapest(curves: list[Curve], sizes: list[int], quantum: int, wanted: int) -> float:
    """Oracle: the least Σ loss over all whole counts, by dynamic programming over the quanta spent so far."""
    best = {0: 0.0}
    for curve, size in zip(curves, sizes, strict=True):
        after: dict[int, float] = {}
        for spent, loss in best.items():
            for k in range(0, size + 1, quantum):
                total = loss + float(curve.at(np.array(k / size)))
                after[spent + k] = min(total, after.get(spent + k, np.inf))
        best = after
    return best[wanted]


@PROPERTY
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.sampled_from([1, 3, 16]),
    SPARSITY,
    st.integers(0, 999),
)
def test_as_cheap_as_the_cheapest(parts: list[int], quantum: int, sparsity: float, seed: int) -> None:
    """Convex curves and one quantum: no other counts with the same sum cost less."""
    sizes = [part * quantum for part in parts]
    curves = [falling(seed + i, convex=True) for i in range(len(sizes))]
    kept = minimise(units_of(sizes, [quantum] * len(sizes)), sparsity, curves, (0.0, 1.0))
    # between measured densities a curve is convex, at them it may bend: the oracle sees the hull too
    hulls = [on_hull(curve, size, quantum) for curve, size in zip(curves, sizes, strict=True)]
    found = sum(
        float(curve.at(np.array(k / size))) for curve, k, size in zip(hulls, kept, sizes, strict=True)
    )
    assert found == pytest.approx(cheapest(hulls, sizes, quantum, sum(kept)), rel=1e-9, abs=1e-12)


def on_hull(curve: Curve, size: int, quantum: int) -> Curve:
    """The greatest convex function below a curve at whole quanta, by testing every pair of points
    around each.
    """
    x = np.arange(0, size + 1, quantum) / size
    y = curve.at(x)
    low = y.copy()
    for k in range(len(x)):
        for i in range(k):
            for j in range(k + 1, len(x)):
                low[k] = min(low[k], y[i] + (y[j] - y[i]) * (x[k] - x[i]) / (x[j] - x[i]))
    return Straight(x, low)


class Straight(Curve):
    """Given at every quantum."""

    def at(self, density: np.ndarray) -> np.ndarray:
        return np.interp(density, self.density, self.loss)


@settings(PROPERTY, max_examples=40)
@given(
    st.lists(st.integers(50, 5000), min_size=2, max_size=12),
    st.integers(5, 95),
    st.floats(0, 0.3),
    st.integers(0, 999),
)
def test_never_dearer_than_uniform_or_algorithm_1(
    sizes: list[int], percent: int, alpha: float, seed: int
) -> None:
    """On the same convex curves: other counts with the same sum have no less predicted loss (to the
    knots' spacing).
    """
    fine = np.linspace(0, 1, 65)
    curves = [Straight(fine, on_hull(falling(seed + i), 64, 1).loss) for i in range(len(sizes))]
    units, sparsity = units_of(sizes), percent / 100

    def loss(kept: list[int]) -> float:
        return sum(
            float(curve.at(np.array(k / size))) for curve, k, size in zip(curves, kept, sizes, strict=True)
        )

    found = loss(minimise(units, sparsity, curves, (0.0, 1.0)))
    t = ranks(np.random.default_rng(seed).random(len(sizes)).tolist())
    for other in (
        allocate(units, sparsity, t * 0, 0.0, (0.0, 1.0)),
        allocate(units, sparsity, t, alpha, (0.0, 1.0)),
    ):
        assert found <= loss(other) * (1 + 2e-3)


@PROPERTY
@given(st.floats(1.0, 1000.0), st.integers(10, 90), st.integers(0, 99))
def test_a_dearer_curve_keeps_more(factor: float, percent: int, seed: int) -> None:
    """Two curves of which one is k times the other: the dearer keeps no less; equal ones differ by
    one knot's spacing at most.
    """
    curve = falling(seed, convex=True)
    size = 1000
    kept = minimise(
        units_of([size, size]), percent / 100, [curve, Curve(curve.density, curve.loss * factor)], (0.0, 1.0)
    )
    assert kept[1] >= kept[0] - -(-size // 256)
    if factor == 1:
        assert abs(kept[1] - kept[0]) <= -(-size // 256)


def test_optimal_densities_of_power_laws() -> None:
    """Oracle: by hand. Losses (1 − d)² and 4·(1 − d)² have equal slopes at sparsities 4:1, so 0.5
    overall is 0.2 and 0.8.
    """
    density = np.linspace(0, 1, 101)
    curves = [Curve(density, factor * (1 - density) ** 2) for factor in (1.0, 4.0)]
    kept = minimise(units_of([10_000, 10_000]), 0.5, curves, (0.0, 1.0))
    assert kept == pytest.approx([2000, 8000], abs=150)


@PROPERTY
@given(
    st.lists(st.integers(50, 5000), min_size=1, max_size=8),
    st.integers(5, 90),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_a_larger_budget_takes_from_no_one(sizes: list[int], percent: int, more: int, seed: int) -> None:
    curves = [falling(seed + i) for i in range(len(sizes))]
    small, large = (
        minimise(units_of(sizes), 1 - p / 100, curves, (0.0, 1.0)) for p in (percent, percent + more)
    )
    assert all(a <= b for a, b in zip(small, large, strict=True))


@PROPERTY
@given(st.lists(st.floats(0, 10), min_size=2, max_size=30))
def test_the_hull_is_the_hull(values: list[float]) -> None:
    """Oracle: a point is at or above the line between its neighbours on the hull, and slopes increase."""
    x, y = np.arange(len(values), dtype=float), np.array(values)
    corners = hull(x, y)
    assert (corners[0], corners[-1]) == (0, len(values) - 1)
    assert (np.interp(x, x[corners], y[corners]) <= y + 1e-9).all()
    slopes = np.diff(y[corners]) / np.diff(x[corners])
    assert (np.diff(slopes) > -1e-9).all()


def test_a_curve_between_its_points() -> None:
    """Oracle: by hand. Halfway between 100 and 1 is 10, between 1 and 0 (½)³; measured points are
    themselves.
    """
    curve = Curve(np.array([0.0, 0.5, 1.0]), np.array([100.0, 1.0, 0.0]))
    assert curve.at(np.array([0.0, 0.25, 0.5, 0.75, 1.0])) == pytest.approx([100, 10, 1, 0.125, 0])
    assert Curve(curve.density, curve.loss, 0.5).at(np.array([0.25, 0.75])) == pytest.approx(
        [10**0.5, 0.125**0.5]
    )


# Plans


def test_plan_by_weight_and_by_layer() -> None:
    """Oracle: by hand. Layer 0 sums to 6 (mean 2), layer 1 to 5 (mean 5): ``sum`` favours layer 0,
    ``mean`` layer 1.
    """
    units = [Unit("a", 0, 100, 1), Unit("b", 0, 100, 1), Unit("c", 0, 100, 1), Unit("d", 1, 300, 1)]
    sensitivities = {
        name: {"sensitivity": value} for name, value in {"a": 1.0, "b": 2.0, "c": 3.0, "d": 5.0}.items()
    }
    assert counts(units, 0.5, params("uniform"), {}) == [50, 50, 50, 150]
    assert counts(units, 0.5, params("layer"), sensitivities) == [60, 60, 60, 120]
    assert counts(units, 0.5, params("layer", layer_sensitivity="mean"), sensitivities) == [40, 40, 40, 180]
    by_weight = counts(units, 0.5, params("weight"), sensitivities)
    assert sum(by_weight) == 300
    assert by_weight[0] < by_weight[1] < by_weight[2] < by_weight[3] / 3


def test_plan_by_references() -> None:
    """Oracle: by hand. Three blocks of one size; OWL's densest has most outliers, DLP's the least
    median, depth's is the first.
    """
    units = [Unit(name, block, 1000, 1) for block, name in enumerate("abc")]
    facts = {
        "a": {"outliers": 0.01, "median": 3.0},
        "b": {"outliers": 0.04, "median": 1.0},
        "c": {"outliers": 0.03, "median": 2.0},
    }
    # places −1, 1, 1/3: their mean 1/9 is taken out
    assert counts(units, 0.5, params("owl"), facts) == [389, 589, 522]
    assert counts(units, 0.5, params("dlp"), facts) == [400, 600, 500]
    assert counts(units, 0.5, params("depth"), {}) == [600, 500, 400]
    assert counts(units, 0.5, params("owl"), {name: {"outliers": 0.1} for name in "abc"}) == [500, 500, 500]


@pytest.mark.parametrize("seed", range(5))
def test_references_are_what_their_papers_write(seed: int) -> None:
    """Oracle: the papers' own densities for blocks of one size: OWL's D scaled to 2λ, DLP's
    importance 1 − S/ΣS scaled to 2α, ATP's progression.
    """
    draw = np.random.default_rng(seed)
    units = [Unit(f"m{block}", block, 100_000, 1) for block in range(7)]
    d, s = draw.random(7), draw.random(7)
    facts = {unit.name: {"outliers": d[unit.block], "median": s[unit.block]} for unit in units}
    alpha, sparsity = 0.15, 0.6

    def scaled(importance: np.ndarray) -> np.ndarray:
        width = (importance - importance.min()) / (importance.max() - importance.min()) * 2 * alpha
        return width - width.mean() + 1 - sparsity

    beta = 2 * alpha / (len(units) - 1)
    wanted = {
        "owl": scaled(d),
        "dlp": scaled(1 - s / s.sum()),
        "depth": 1 - (sparsity - beta * (len(units) - 1) / 2 + beta * np.arange(7)),
    }
    for method, densities in wanted.items():
        kept = counts(units, sparsity, params(method, alpha=alpha), facts)
        assert np.abs(np.array(kept) / 100_000 - densities).max() < 2e-5


def test_predicted_by_both_weightings() -> None:
    """Oracle: by hand, with quarters as quanta. ``trace`` weighs ‖ΔW‖² by 2 to 1 (marginals 7, 5,
    3, 1), ``kronecker`` has its own curves, the other way round.
    """
    units = [Unit("a", 0, 400, 100), Unit("b", 0, 400, 100)]
    shape = [16.0, 9.0, 4.0, 1.0, 0.0]
    density = [0.0, 0.25, 0.5, 0.75, 1.0]

    def entry(sensitivity: float, factor: float) -> dict[str, Any]:
        return {
            "sensitivity": sensitivity,
            "curve": {"density": density, "frobenius": shape, "kronecker": [factor * x for x in shape]},
        }

    measured = {"a": entry(2.0, 1.0), "b": entry(1.0, 2.0)}
    assert counts(units, 0.5, params("predicted", alpha=1.0), measured) == [300, 100]
    assert counts(units, 0.5, params("predicted", alpha=1.0, weighting="kronecker"), measured) == [100, 300]
    assert counts(units, 0.5, params("predicted", alpha=0.1), measured) == [200, 200]


def test_tempered_predictions() -> None:
    """Oracle: by hand, with five quarters to distribute. Each further quarter lowers the loss of a
    by 64, 20, 12, 4 and of b by 63, 45, 27, 9; the square roots fall by 4, 2, 2, 2 and 3, 3, 3, 3.
    """
    units = [Unit("a", 0, 400, 100), Unit("b", 0, 400, 100)]
    density = [0.0, 0.25, 0.5, 0.75, 1.0]
    losses = {"a": [100.0, 36.0, 16.0, 4.0, 0.0], "b": [144.0, 81.0, 36.0, 9.0, 0.0]}
    measured = {
        n: {"sensitivity": 1.0, "curve": {"density": density, "frobenius": loss, "kronecker": None}}
        for n, loss in losses.items()
    }
    assert counts(units, 0.375, params("predicted", alpha=1.0), measured) == [200, 300]
    assert counts(units, 0.375, params("predicted", alpha=1.0, temper=0.5), measured) == [100, 400]


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("weight", "sensitivities"),
        ("layer", "sensitivities"),
        ("predicted", "error curves"),
        ("owl", "outliers per block"),
        ("dlp", "median per block"),
    ],
)
def test_what_was_not_measured_is_named(method: str, what: str) -> None:
    with pytest.raises(
        SparselineError, match=f"'{method}' needs {what}, but there is none for m1; run `dvc repro`"
    ):
        counts(
            units_of([10, 10]),
            0.5,
            params(method),
            {"m0": {"sensitivity": 1.0, "curve": {}, "outliers": 0.0, "median": 0.0}},
        )


def test_kronecker_without_moments_is_told() -> None:
    curve = {"density": [0.0, 1.0], "frobenius": [1.0, 0.0], "kronecker": None}
    with pytest.raises(
        SparselineError, match="weighting = 'kronecker' needs output moments, but there are none for m0"
    ):
        counts(
            units_of([10]),
            0.5,
            params("predicted", weighting="kronecker"),
            {"m0": {"sensitivity": 1.0, "curve": curve}},
        )


@pytest.mark.parametrize("point", [1, 2, 3])
def test_an_error_just_below_zero_counts_as_zero(point: int) -> None:
    """Three equal matrices; rounding made one value of one of them negative. Oracle: the same
    curves with 0 in its place.
    """
    units = [Unit(name, 0, 1000, 1) for name in "abc"]
    curve = {
        "density": [0.0, 0.25, 0.5, 0.75, 1.0],
        "frobenius": [4.0, 2.0, 1.0, 0.5, 0.0],
        "kronecker": None,
    }
    found = []
    for value in (0.0, -1e-9):
        low = {**curve, "frobenius": [value if i >= point else x for i, x in enumerate(curve["frobenius"])]}  # type: ignore[arg-type]
        measured = {name: {"sensitivity": 1.0, "curve": low if name == "b" else curve} for name in "abc"}
        found.append(counts(units, 0.5, params("predicted", alpha=0.4), measured))
    assert found[0] == found[1]
    assert sum(found[1]) == 1500


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("predicted", "error curve"),
        ("weight", "sensitivity"),
        ("layer", "sensitivity"),
        ("owl", "outliers"),
        ("dlp", "median"),
    ],
)
def test_what_is_no_number_is_refused(method: str, what: str, value: float) -> None:
    curve = {"density": [0.0, 0.5, 1.0], "frobenius": [2.0, value, 0.0], "kronecker": None}
    measured = {"m0": {"sensitivity": value, "outliers": value, "median": value, "curve": curve}}
    with pytest.raises(SparselineError, match=f"The {what} of m0 contains NaN or infinity"):
        counts(units_of([10]), 0.5, params(method), measured)


@pytest.mark.parametrize("bounds", [(0.6, 0.4), (-0.1, 0.5), (0.5, 1.1)])
def test_density_bounds_are_checked(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="0 <= low <= high <= 1"):
        params("uniform", density_bounds=bounds)
