"""Masks have exactly the counts asked for, and keep the larger scores. Oracles: counting, sorting
by hand, properties over all shapes.
"""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_lib.core.counts import shares
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.masks.select import (
    SAMPLED,
    _best,
    _best_of_few,
    _first,
    _thresholds,
    bounds,
    select,
    select_n_of_m,
)
from pipeline_lib.masks.settings import Group, Pattern

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)
GROUPS = st.sampled_from(get_args(Group))
ROWS, COLUMNS = st.integers(1, 9), st.integers(1, 20)


def scores_of(rows: int, columns: int, seed: int, levels: int) -> torch.Tensor:
    """Random scores. With few ``levels`` there are many ties (with 1, all are equal)."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (rows, columns), generator=random).float()


def fair(kept: int, total: int, size: int) -> tuple[int, int]:
    """The counts that a part may get by rounding: floor and ceiling of its proportional share."""
    return kept * size // total, -(-kept * size // total)


@PROPERTY
@given(
    ROWS, COLUMNS, st.integers(0, 99), st.sampled_from([1, 2, 1000]), GROUPS, st.integers(1, 25), st.data()
)
def test_exact_counts_everywhere(
    rows: int, columns: int, seed: int, levels: int, group: Group, block: int, data: st.DataObject
) -> None:
    """Any shape, count, group and block width, ties included: exactly ``kept``, every row (column
    block) its rounded share.
    """
    kept = data.draw(st.integers(0, rows * columns))
    mask = select(scores_of(rows, columns, seed, levels), kept, group, block)
    assert mask.dtype == torch.bool
    assert mask.shape == (rows, columns)
    assert int(mask.sum()) == kept
    if group == "row":
        low, high = fair(kept, rows, 1)
        assert all(low <= int(count) <= high for count in mask.sum(1))
    if group == "block":
        for part in mask.split(block, 1):
            low, high = fair(kept, rows * columns, part.numel())
            assert low <= int(part.sum()) <= high


@PROPERTY
@given(ROWS, COLUMNS, st.integers(0, 99), st.sampled_from([3, 1000]), GROUPS, st.integers(1, 25), st.data())
def test_larger_scores_are_kept(
    rows: int, columns: int, seed: int, levels: int, group: Group, block: int, data: st.DataObject
) -> None:
    """Inside a comparison group nothing kept scores less than anything pruned; among equals the
    earlier position is kept.
    """
    kept = data.draw(st.integers(0, rows * columns))
    scores = scores_of(rows, columns, seed, levels)
    mask = select(scores, kept, group, block)
    width = {"row": columns, "matrix": columns, "block": block}[group]
    parts = list(zip(scores.split(width, 1), mask.split(width, 1), strict=True))
    if group == "row":
        parts = [(scores[r : r + 1], mask[r : r + 1]) for r in range(rows)]
    for score, chosen in parts:
        pairs = list(zip(score.flatten().tolist(), chosen.flatten().tolist(), strict=True))
        weakest = min((s for s, keep in pairs if keep), default=float("inf"))
        strongest = max((s for s, keep in pairs if not keep), default=float("-inf"))
        assert weakest >= strongest
        tied = [keep for s, keep in pairs if s == weakest == strongest]
        assert tied == sorted(tied, reverse=True)


@PROPERTY
@given(
    ROWS, st.integers(2, 8), st.integers(1, 5), st.integers(0, 99), st.sampled_from([1, 2, 1000]), st.data()
)
def test_exactly_n_of_every_m(
    rows: int, m: int, groups: int, seed: int, levels: int, data: st.DataObject
) -> None:
    """N:M means N kept of M (docs: house.md), in every group, and they are the largest."""
    n = data.draw(st.integers(1, m - 1))
    scores = scores_of(rows, m * groups, seed, levels)
    mask = select_n_of_m(scores, n, m)
    for r in range(rows):
        for g in range(groups):
            part = slice(g * m, (g + 1) * m)
            assert int(mask[r, part].sum()) == n
            assert (
                sorted(scores[r, part][mask[r, part]].tolist()) == sorted(scores[r, part].tolist())[m - n :]
            )


def sorted_best(scores: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """The oracle: per row, the first so many of a stable descending sort."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row, count in enumerate(kept):
        order = sorted(range(scores.shape[1]), key=lambda c: -float(scores[row, c]))
        mask[row, order[:count]] = True
    return mask


def sorted_select(scores: torch.Tensor, kept: int, group: Group, block: int) -> torch.Tensor:
    """The same for whole matrices; rows' spare weights to the first ones, blocks' shares as
    ``shares`` has them.
    """
    rows, columns = scores.shape
    if group == "matrix":
        return sorted_best(scores.reshape(1, -1), [kept]).reshape(rows, columns)
    if group == "block":
        parts = scores.split(block, 1)
        quotas = shares(kept, [part.numel() for part in parts])
        return torch.cat(
            [sorted_best(p.reshape(1, -1), [q]).reshape(p.shape) for p, q in zip(parts, quotas, strict=True)],
            1,
        )
    base, spare = divmod(kept, rows)
    return sorted_best(scores, [base + (r < spare) for r in range(rows)])


@PROPERTY
@given(ROWS, COLUMNS, st.integers(0, 99), st.sampled_from([1, 2, 5, 1000]), st.data())
def test_best_is_a_stable_sort(rows: int, columns: int, seed: int, levels: int, data: st.DataObject) -> None:
    """Oracle: ``sorted_best``; any count, 0 and all among them, and many ties. Of a few, all pairs
    are compared.
    """
    scores = scores_of(rows, columns, seed, levels)
    kept = data.draw(st.integers(0, columns))
    assert torch.equal(_best(scores, kept), sorted_best(scores, [kept] * rows))
    assert torch.equal(_best_of_few(scores.T, kept).T, sorted_best(scores, [kept] * rows))


@pytest.mark.parametrize("levels", [1, 2, 50, 10**9])
@pytest.mark.parametrize("sorted_already", [False, True])
def test_the_kth_of_many(levels: int, sorted_already: bool) -> None:
    """Oracle: sorting. A sample misleads where the values are sorted or tied, and must not make it wrong."""
    scores = scores_of(1, 2 * SAMPLED + 1, levels % 7, levels)
    scores = scores.sort(1).values if sorted_already else scores
    for kept in (1, 5, SAMPLED, 2 * SAMPLED, 2 * SAMPLED + 1):
        (found,) = _thresholds(scores, [kept])
        assert float(found) == float(scores[0].sort(descending=True).values[kept - 1])
        assert int(_best(scores, kept).count_nonzero()) == kept
    scores[0, ::3] = torch.nan
    assert not _best(scores, SAMPLED)[scores.isnan()].any()


def test_gpus_break_ties_without_asking_for_them() -> None:
    """The path of other devices, on this one."""
    scores = scores_of(5, 12, 0, 3)
    (threshold,) = _thresholds(scores, [7])
    assert torch.equal(_first(scores, threshold[:, None], 7), sorted_best(scores, [7] * 5))


@pytest.mark.parametrize("best", [_best, lambda scores, n: _best_of_few(scores.T, n).T])
def test_nan_is_never_kept(best: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    """So the number of True in a mask reveals NaN."""
    scores = torch.tensor([[1.0, torch.nan, 3.0, 2.0], [torch.nan] * 4, [4.0, 3.0, 2.0, 1.0]])
    mask = best(scores, 2)
    assert not mask[scores.isnan()].any()
    assert int(mask.count_nonzero()) < 2 * 3
    assert mask[2].tolist() == [True, True, False, False]


@PROPERTY
@given(
    ROWS, COLUMNS, st.integers(0, 99), st.sampled_from([1, 3, 1000]), GROUPS, st.integers(1, 25), st.data()
)
def test_selection_is_a_stable_sort(
    rows: int, columns: int, seed: int, levels: int, group: Group, block: int, data: st.DataObject
) -> None:
    """Oracle: ``sorted_select``, for every group and any count; none and all besides."""
    scores = scores_of(rows, columns, seed, levels)
    for kept in {0, rows * columns, data.draw(st.integers(0, rows * columns))}:
        assert torch.equal(select(scores, kept, group, block), sorted_select(scores, kept, group, block))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (15, 16)])
@pytest.mark.parametrize("levels", [1, 2, 4, 1000])
def test_n_of_m_is_a_stable_sort(n: int, m: int, levels: int) -> None:
    """Oracle: ``sorted_best`` in every group of M."""
    scores = scores_of(7, 3 * m, levels, levels)
    expected = sorted_best(scores.reshape(-1, m), [n] * (7 * 3)).reshape(scores.shape)
    assert torch.equal(select_n_of_m(scores, n, m), expected)


@PROPERTY
@given(ROWS, st.integers(2, 20), st.integers(0, 99), st.sampled_from([1, 2, 5, 1000]), st.data())
def test_bounds_are_best_with_a_threshold(
    rows: int, columns: int, seed: int, levels: int, data: st.DataObject
) -> None:
    """Oracle: ``sorted_best``; the threshold is midway between the weakest kept and the strongest
    pruned score of each row.
    """
    scores = scores_of(rows, columns, seed, levels)
    kept = data.draw(st.integers(1, columns - 1))
    mask, threshold = bounds(scores, kept)
    assert torch.equal(mask, sorted_best(scores, [kept] * rows))
    ordered = scores.sort(1, descending=True).values
    assert torch.equal(threshold[:, 0], (ordered[:, kept - 1] + ordered[:, kept]) / 2)


def test_thresholds_are_order_statistics() -> None:
    """Oracle: torch.sort. The partition finds several ranks at once, repeated values and infinities
    included; scores stay as they are.
    """
    scores = scores_of(6, 11, 3, 4)
    scores[2, 5], scores[3, 1] = float("inf"), -float("inf")
    before = scores.clone()
    ranks = [1, 4, 11]
    for rank, found in zip(ranks, _thresholds(scores, ranks), strict=True):
        assert torch.equal(found, before.sort(1, descending=True).values[:, rank - 1])
    assert torch.equal(scores, before)


@PROPERTY
@given(ROWS, COLUMNS, st.integers(0, 99), st.data())
def test_rows_are_not_compared_with_one_another(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    """Scaling a row's scores moves no entry of its mask, spare weights included."""
    scores, kept = scores_of(rows, columns, seed, 1000), data.draw(st.integers(0, rows * columns))
    scale = 2.0 ** torch.arange(rows)[:, None]
    assert torch.equal(select(scores, kept, "row", 1), select(scores * scale, kept, "row", 1))


def test_spare_weights_go_to_the_first_rows() -> None:
    assert select(torch.ones(3, 4), 5, "row", 1).sum(1).tolist() == [2, 2, 1]


def test_matrix_and_row_groups_differ() -> None:
    """Oracle: by hand. The matrix keeps its best two, each row its best one."""
    scores = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    assert select(scores, 2, "matrix", 1).tolist() == [[True, True], [False, False]]
    assert select(scores, 2, "row", 1).tolist() == [[True, False], [True, False]]
    assert select(scores, 2, "block", 1).tolist() == [[True, True], [False, False]]


def test_selection_does_not_depend_on_memory_layout() -> None:
    """A transposed view and its contiguous copy give one mask."""
    scores = scores_of(12, 8, 0, 5).T
    for group in get_args(Group):
        assert torch.equal(select(scores, 37, group, 3), select(scores.contiguous(), 37, group, 3))
    assert torch.equal(select_n_of_m(scores, 1, 4), select_n_of_m(scores.contiguous(), 1, 4))


@pytest.mark.parametrize(
    ("text", "n", "m"),
    [("unstructured", 0, 0), ("2:4", 2, 4), ("1:2", 1, 2), ("4:8", 4, 8), ("15:16", 15, 16)],
)
def test_patterns_are_read(text: str, n: int, m: int) -> None:
    assert Pattern.parse(text) == Pattern(n, m)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2",
        "2:",
        ":4",
        "4:4",
        "4:2",
        "0:4",
        "-1:4",
        "2:4:8",
        "2 : 4",
        "2:4\n",
        "a:b",
        "2.0:4",
        "124",
        "Unstructured",
        "1e0:4",
    ],
)
def test_garbage_is_no_pattern(text: str) -> None:
    with pytest.raises(ValueError, match='unstructured or "N:M"'):
        Pattern.parse(text)


@given(st.text(max_size=6))
@PROPERTY
def test_any_text_is_a_pattern_or_refused(text: str) -> None:
    """Whatever comes in: a valid N:M, or ValueError, nothing else."""
    try:
        pattern = Pattern.parse(text)
    except ValueError:
        return
    assert text == "unstructured" or 0 < pattern.n < pattern.m


def test_quantum() -> None:
    """One step of an N:M matrix is one weight more in every group."""
    assert Pattern.parse("unstructured").quantum("w", (3, 5)) == 1
    assert Pattern.parse("2:4").quantum("w", (3, 8)) == 6
    with pytest.raises(
        SparselineError,
        match=r"Pattern 2:4 does not divide the 6 inputs of layers\.0\.w; choose another M, or exclude it",
    ):
        Pattern.parse("2:4").quantum("layers.0.w", (4, 6))
