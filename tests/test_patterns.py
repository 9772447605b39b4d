"""Masks have exactly the counts asked for, and keep the larger scores. Oracles: counting, sorting by hand, properties over all shapes."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_lib.errors import SparselineError
from pipeline_lib.pruning.patterns import Group, Pattern, select, select_n_of_m

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)
GROUPS = st.sampled_from(get_args(Group))
ROWS, COLUMNS = st.integers(1, 9), st.integers(1, 20)


def scores_of(rows: int, columns: int, seed: int, levels: int) -> torch.Tensor:
    """Random scores; few ``levels`` make many ties (1: all alike)."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (rows, columns), generator=random).float()


def fair(kept: int, total: int, size: int) -> tuple[int, int]:
    """The shares that rounding may give a part: floor and ceiling of the proportional one."""
    return kept * size // total, -(-kept * size // total)


@PROPERTY
@given(ROWS, COLUMNS, st.integers(0, 99), st.sampled_from([1, 2, 1000]), GROUPS, st.integers(1, 25), st.data())
def test_exact_counts_everywhere(rows: int, columns: int, seed: int, levels: int, group: Group, block: int, data: st.DataObject) -> None:
    """Any shape, count, group and block width, ties included: exactly ``kept``, every row (column block) its rounded share."""
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
def test_larger_scores_are_kept(rows: int, columns: int, seed: int, levels: int, group: Group, block: int, data: st.DataObject) -> None:
    """Inside a comparison group nothing kept scores less than anything pruned; among equals the earlier position is kept."""
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
@given(ROWS, st.integers(2, 8), st.integers(1, 5), st.integers(0, 99), st.sampled_from([1, 2, 1000]), st.data())
def test_exactly_n_of_every_m(rows: int, m: int, groups: int, seed: int, levels: int, data: st.DataObject) -> None:
    """N:M means N kept of M (docs: house.md), in every group, and they are the largest."""
    n = data.draw(st.integers(1, m - 1))
    scores = scores_of(rows, m * groups, seed, levels)
    mask = select_n_of_m(scores, n, m)
    for r in range(rows):
        for g in range(groups):
            part = slice(g * m, (g + 1) * m)
            assert int(mask[r, part].sum()) == n
            assert sorted(scores[r, part][mask[r, part]].tolist()) == sorted(scores[r, part].tolist())[m - n :]


def test_spare_weights_go_to_the_rows_that_need_them_most() -> None:
    """Oracle: by hand. 4 of 6 over 3 rows: one each, and the spare one to the row whose second-best is largest (row 1)."""
    mask = select(torch.tensor([[9.0, 1.0], [3.0, 2.0], [5.0, 0.0]]), 4, "row", 1)
    assert mask.tolist() == [[True, False], [True, True], [True, False]]


def test_spare_weights_of_equal_rows_go_to_the_first() -> None:
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


@pytest.mark.parametrize(("text", "n", "m"), [("unstructured", 0, 0), ("2:4", 2, 4), ("1:2", 1, 2), ("4:8", 4, 8), ("15:16", 15, 16)])
def test_patterns_are_read(text: str, n: int, m: int) -> None:
    assert Pattern.parse(text) == Pattern(n, m)


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "4:4", "4:2", "0:4", "-1:4", "2:4:8", "2 : 4", "2:4\n", "a:b", "2.0:4", "124", "Unstructured", "1e0:4"]
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
    with pytest.raises(SparselineError, match=r"Pattern 2:4 does not divide the 6 inputs of layers\.0\.w; choose another M, or exclude it"):
        Pattern.parse("2:4").quantum("layers.0.w", (4, 6))
