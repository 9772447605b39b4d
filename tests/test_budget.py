"""Budgets are met exactly. Oracles: exact fractions, and the properties that Algorithm 1 of
2310.09499 promises.
"""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_lib.allocate.budget import Unit, allocate, ranks
from pipeline_lib.core.counts import shares, target
from pipeline_lib.core.errors import SparselineError

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)
SIZES = st.lists(st.integers(1, 100_000), min_size=1, max_size=25)
SPARSITY = st.integers(1, 99).map(lambda percent: percent / 100)


def units_of(sizes: list[int], quanta: list[int] | None = None) -> list[Unit]:
    return [Unit(f"m{i}", i // 3, size, 1 if quanta is None else quanta[i]) for i, size in enumerate(sizes)]


def uniform_ranks(count: int, seed: int) -> np.ndarray:
    return ranks(np.random.default_rng(seed).random(count).tolist())


@PROPERTY
@given(SIZES, st.data())
def test_shares_sum_exactly_and_are_fair(sizes: list[int], data: st.DataObject) -> None:
    """Oracle: exact fractions. The sum is ``kept``, and every share is within one of the
    proportional one and inside its part.
    """
    kept = data.draw(st.integers(0, sum(sizes)))
    parts = shares(kept, sizes)
    assert sum(parts) == kept
    for part, size in zip(parts, sizes, strict=True):
        assert abs(part - Fraction(kept * size, sum(sizes))) < 1
        assert 0 <= part <= size


def test_shares_by_largest_remainder() -> None:
    """Oracle: by hand. 5 over 3, 3, 1: 2.14, 2.14, 0.71: the last has the largest remainder; a tie
    goes to the earlier.
    """
    assert shares(5, [3, 3, 1]) == [2, 2, 1]
    assert shares(1, [5, 5, 5]) == [1, 0, 0]
    assert shares(2, [5, 5, 5]) == [1, 1, 0]


@PROPERTY
@given(st.lists(st.integers(10**9, 10**11), min_size=2, max_size=6), st.data())
def test_shares_of_huge_parts(sizes: list[int], data: st.DataObject) -> None:
    """Sizes beyond 2^53 in the products: still exact."""
    kept = data.draw(st.integers(0, sum(sizes)))
    parts = shares(kept, sizes)
    assert sum(parts) == kept
    assert all(
        abs(part - Fraction(kept * size, sum(sizes))) < 1 for part, size in zip(parts, sizes, strict=True)
    )


@PROPERTY
@given(SIZES, SPARSITY, st.integers(0, 60).map(lambda percent: percent / 100), st.integers(0, 99))
def test_the_budget_is_met_exactly(sizes: list[int], sparsity: float, alpha: float, seed: int) -> None:
    """Unstructured: the sum is round((1 − p)·N) for any sizes and any α, clipped or not; nobody
    keeps more than there is.
    """
    kept = allocate(units_of(sizes), sparsity, uniform_ranks(len(sizes), seed), alpha, (0.0, 1.0))
    assert sum(kept) == target(sparsity, sum(sizes)) == round((1 - sparsity) * sum(sizes))
    assert all(0 <= k <= size for k, size in zip(kept, sizes, strict=True))


@PROPERTY
@given(
    st.lists(st.integers(50, 5000), min_size=1, max_size=20),
    SPARSITY,
    st.floats(0, 1),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
    st.integers(0, 99),
)
def test_bounds_are_kept(
    sizes: list[int], sparsity: float, alpha: float, below: float, above: float, seed: int
) -> None:
    """Any bounds with room for the budget: every density within them, the sum still exact."""
    low, high = max(0.0, 1 - sparsity - below), min(1.0, 1 - sparsity + above)
    kept = allocate(units_of(sizes), sparsity, uniform_ranks(len(sizes), seed), alpha, (low, high))
    assert sum(kept) == target(sparsity, sum(sizes))
    for k, size in zip(kept, sizes, strict=True):
        assert low - 1e-9 <= k / size <= high + 1e-9


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(1, 400), st.sampled_from([4, 8])), min_size=1, max_size=20),
    SPARSITY,
    st.integers(0, 60).map(lambda percent: percent / 100),
    st.integers(0, 99),
)
def test_n_of_m_within_half_a_quantum(
    parts: list[tuple[int, int]], sparsity: float, alpha: float, seed: int
) -> None:
    """N:M: kept counts are multiples of the quantum (size/M), and their sum is within half of the
    largest quantum.
    """
    sizes, quanta = [quantum * m for quantum, m in parts], [quantum for quantum, _ in parts]
    kept = allocate(units_of(sizes, quanta), sparsity, uniform_ranks(len(sizes), seed), alpha, (0.0, 1.0))
    assert abs(sum(kept) - target(sparsity, sum(sizes))) <= max(quanta) / 2
    assert all(
        k % quantum == 0 and 0 <= k <= size for k, quantum, size in zip(kept, quanta, sizes, strict=True)
    )


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(1, 400), st.sampled_from([4, 8])), min_size=2, max_size=12),
    SPARSITY,
    st.integers(0, 99),
)
def test_n_of_m_bounds_are_kept(parts: list[tuple[int, int]], sparsity: float, seed: int) -> None:
    """Bounds that are no multiple of 1/M round inwards."""
    sizes, quanta = [quantum * m for quantum, m in parts], [quantum for quantum, _ in parts]
    bounds = (max(0.0, 1 - sparsity - 0.31), min(1.0, 1 - sparsity + 0.31))
    kept = allocate(units_of(sizes, quanta), sparsity, uniform_ranks(len(sizes), seed), 0.4, bounds)
    assert all(bounds[0] - 1e-9 <= k / size <= bounds[1] + 1e-9 for k, size in zip(kept, sizes, strict=True))
    assert abs(sum(kept) - target(sparsity, sum(sizes))) <= max(quanta) / 2


def test_rounding_by_largest_remainder() -> None:
    """Oracle: by hand. 5 of 7 over 3, 3, 1: 2.14, 2.14, 0.71; with places, 16 of 40 over 10, 14,
    16: 2.85, 5.39, 7.76.
    """
    assert allocate(units_of([3, 3, 1]), 2 / 7, np.zeros(3), 0.0, (0.0, 1.0)) == [2, 2, 1]
    assert allocate(units_of([3, 1, 3]), 2 / 7, np.zeros(3), 0.0, (0.0, 1.0)) == [2, 1, 2]
    assert allocate(units_of([10, 14, 16]), 0.59, np.array([-1.0, 0.0, 1.0]), 0.1, (0.0, 1.0)) == [3, 5, 8]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_uniform_n_of_m_keeps_n_of_m_everywhere(n: int, m: int) -> None:
    """Oracle: N/M of every matrix, whatever its size."""
    quanta = [96, 40, 7, 1000]
    units = units_of([quantum * m for quantum in quanta], quanta)
    kept = allocate(units, 1 - n / m, np.zeros(4), 0.0, (0.0, 1.0))
    assert kept == [n * quantum for quantum in quanta]


@PROPERTY
@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=25), SPARSITY)
def test_uniform_gives_everyone_the_same_density(sizes: list[int], sparsity: float) -> None:
    """Each count is within one of (1 − p)·size, apart from the overall rounding's half weight."""
    kept = allocate(units_of(sizes), sparsity, np.zeros(len(sizes)), 0.0, (0.0, 1.0))
    assert all(abs(k - (1 - sparsity) * size) <= 1.5 for k, size in zip(kept, sizes, strict=True))


@PROPERTY
@given(
    st.lists(st.integers(200, 5000), min_size=2, max_size=20),
    st.integers(30, 70),
    st.integers(1, 20),
    st.integers(0, 99),
)
def test_more_sensitive_matrices_keep_more(sizes: list[int], percent: int, width: int, seed: int) -> None:
    """Unclipped densities rise linearly with the rank (Algorithm 1): d_i − d_j = α (t_i − t_j), to
    the rounding of a count.
    """
    t, alpha = uniform_ranks(len(sizes), seed), width / 100
    kept = allocate(units_of(sizes), percent / 100, t, alpha, (0.0, 1.0))
    density = [k / size for k, size in zip(kept, sizes, strict=True)]
    for i in range(1, len(sizes)):
        assert density[i] - density[0] == pytest.approx(
            alpha * (t[i] - t[0]), abs=1 / sizes[i] + 1 / sizes[0]
        )


def test_equal_sizes_give_the_papers_densities() -> None:
    """Oracle: L = 1 − p − α … R = 1 − p + α, linear in rank (Algorithm 1), for matrices of one size."""
    kept = allocate(units_of([1000] * 5), 0.5, ranks([3.0, 1.0, 2.0, 5.0, 4.0]), 0.1, (0.0, 1.0))
    assert kept == [500, 400, 450, 600, 550]


def test_a_wide_interval_clips_and_still_meets_the_budget() -> None:
    """α > min(p, 1 − p): the extremes meet the bounds, the others make up for them; the order by
    rank stays.
    """
    kept = allocate(units_of([1000] * 7), 0.8, ranks(list(range(7))), 0.9, (0.05, 0.6))
    assert sum(kept) == 1400
    assert kept == sorted(kept)
    assert kept[0] == 50
    assert kept[-1] == 600


@pytest.mark.parametrize("bounds", [(0.0, 0.4), (0.6, 1.0), (0.501, 0.502)])
def test_bounds_without_room_are_told(bounds: tuple[float, float]) -> None:
    """Densities of 0.5 are wanted; in (0.501, 0.502) of 10 weights there is no whole count at all."""
    with pytest.raises(
        SparselineError,
        match=(
            r"No allocation with densities between .* meets sparsity 0\.5; widen allocation\.density_bounds"
        ),
    ):
        allocate(units_of([10, 10]), 0.5, np.zeros(2), 0.0, bounds)


def test_bounds_without_a_whole_quantum_are_told() -> None:
    """2:4 wanted with densities in [0.3, 0.45]: no multiple of 1/4."""
    with pytest.raises(SparselineError, match="widen"):
        allocate(units_of([400], [100]), 0.6, np.zeros(1), 0.0, (0.3, 0.45))


def test_ranks() -> None:
    """Oracle: by hand; ties keep their order, one value is in the middle."""
    assert ranks([5.0, 1.0, 3.0]).tolist() == [1, -1, 0]
    assert ranks([2.0, 2.0, 1.0]).tolist() == [0, 1, -1]
    assert ranks([7.0]).tolist() == [0]
