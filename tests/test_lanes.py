"""The order of sums over rows. Oracles: sums in float64, the same rows in other batches, and lanes
that are summed up each by itself, as if by several processes, to the last bit.
"""

import functools
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fit import block_params, masks_of, noisy, setting, targets_of
from tiny import make_model, token_rows

from pipeline_lib.core.artifacts import read_tensors
from pipeline_lib.core.random import generator
from pipeline_lib.core.threads import side_by_side
from pipeline_lib.fit.fit import (
    Pairs,
    Sparse,
    _Free,
    block_error,
    fit,
    minibatches,
    rate_share,
    spread,
    squares,
)
from pipeline_lib.measure.fisher import OutputMoments
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint
from pipeline_lib.models.stream import BlockModel
from pipeline_lib.prune.collect import collect
from pipeline_lib.stats.lanes import LANES, Sums, deal, fold, parts, total
from pipeline_lib.stats.moments import Accumulator, DiagonalSums, MomentSums
from pipeline_lib.stats.settings import CalibrateParams
from pipeline_lib.stats.walk import walk

CPU = torch.device("cpu")
ORDERS = list(itertools.permutations(range(LANES)))
BITS = torch.int64  # of float64: two sums that print alike need not be the same


def activations(rows: int, length: int = 7, width: int = 33, seed: int = 0) -> torch.Tensor:
    """[N, T, d] of sizes that fill no vector register, their channels of very different scales."""
    values = torch.randn(rows, length, width, generator=torch.Generator().manual_seed(seed))
    return values * torch.logspace(-2, 2, width)


# Who belongs where


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.integers(0, 40), batch_rows=st.integers(1, 12), first=st.integers(0, 5))
def test_every_row_is_dealt_once(rows: int, batch_rows: int, first: int) -> None:
    """Oracle: the rows themselves, cut at the lanes' borders; lanes differ by one row at most,
    whatever the batches.
    """
    found = [list(range(rows))[part] for part in parts(rows)]
    assert [row for lane in found for row in lane] == list(range(rows))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    dealt = deal(rows, batch_rows, first)
    assert [number for lane in dealt.lanes for number in lane] == list(range(first, first + len(dealt.sizes)))
    for lane, own in zip(dealt.lanes, found, strict=True):
        sizes = [dealt.sizes[number - first] for number in lane]
        assert sum(sizes) == len(own)
        assert all(size == batch_rows for size in sizes[:-1])
        assert all(0 < size <= batch_rows for size in sizes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.integers(1, 40), batch_rows=st.integers(1, 12), seed=st.integers(0, 9))
def test_steps_take_rows_evenly_from_the_lanes(rows: int, batch_rows: int, seed: int) -> None:
    """Oracle: counted. Every row once an epoch; as many of each lane as can be, fewer rows than
    lanes by turns.
    """

    def steps(seed: int) -> list[list[list[int]]]:
        return list(
            minibatches(rows, batch_rows, {lane: generator(seed, str(lane)) for lane in range(LANES)})
        )

    found, lane_of = (
        steps(seed),
        {row: lane for lane, part in enumerate(parts(rows)) for row in range(rows)[part]},
    )
    assert sorted(row for step in found for lane in step for row in lane) == list(range(rows))
    assert all(sum(map(len, step)) == batch_rows for step in found[:-1])
    for step in found:
        assert [len({lane_of[row] for row in lane}) for lane in step] == [1] * len(step)
        assert [lane_of[lane[0]] for lane in step] == sorted({lane_of[lane[0]] for lane in step})
    if rows % LANES == 0 == batch_rows % LANES:
        assert all(len(step) == LANES for step in found)
    if rows % LANES == 0 and LANES % batch_rows == 0:
        turns = [lane_of[lane[0]] for step in found for lane in step]
        assert turns == list(range(LANES)) * (rows // LANES)
    assert steps(seed) == found
    if rows > 20:
        assert steps(seed + 1) != found


# Sums


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.integers(1, 19), order=st.sampled_from(ORDERS))
def test_total(rows: int, order: tuple[int, ...]) -> None:
    """Oracles: the sum in float64 by torch; and lanes summed up in any order, then folded. Nothing
    that was given changes.
    """
    values = [*activations(rows, 1, 5)[:, 0].double()]
    before = [value.clone() for value in values]
    found = total(values)
    torch.testing.assert_close(found, torch.stack(values).sum(0), rtol=1e-12, atol=1e-10)
    lanes = {
        lane: functools.reduce(torch.add, values[parts(rows)[lane]])
        for lane in order
        if values[parts(rows)[lane]]
    }
    assert torch.equal(fold(lanes[lane].clone() for lane in sorted(lanes)).view(BITS), found.view(BITS))
    assert total([float(value[0]) for value in values]) == float(found[0])
    assert all(torch.equal(value, old) for value, old in zip(values, before, strict=True))


def test_nothing_cannot_be_added_up() -> None:
    with pytest.raises(ValueError, match="no lane"):
        fold([])


def test_a_fold_holds_two_at_most() -> None:
    """Oracle: how many lanes are alive when the next is asked for, counted by their deaths."""
    alive: list[int] = []
    most = [0]

    class Lane:
        def __init__(self, number: int) -> None:
            alive.append(number)
            most[0] = max(most[0], len(alive))
            self.number = number

        def __iadd__(self, other: "Lane") -> "Lane":
            return self

        def __del__(self) -> None:
            alive.remove(self.number)

    whole = fold(map(Lane, range(LANES)))
    assert most == [2]
    assert alive == [whole.number] == [0]


def accumulated(given: list[torch.Tensor], rows: slice, count: int) -> Accumulator:
    """Of rows of seven tokens."""
    sums = Accumulator(7 * count, 50, gram=True, first=7 * rows.start)
    for batch in given:
        sums.add(batch)
    return sums


def summed(kind: type[MomentSums] | type[DiagonalSums]) -> Callable[[list[torch.Tensor], slice, int], Any]:
    def collected(given: list[torch.Tensor], rows: slice, count: int) -> Any:
        sums = kind()
        for batch in given:
            sums.add(batch, batch + 1) if isinstance(sums, MomentSums) else sums.add(batch)
        return sums

    return collected


def finished(sums: Any) -> list[torch.Tensor]:
    found = sums.finish(True) if isinstance(sums, MomentSums) else sums.finish()
    return (
        [found]
        if isinstance(found, torch.Tensor)
        else [value for value in vars(found).values() if isinstance(value, torch.Tensor)]
    )


WAYS = {"accumulator": accumulated, "moments": summed(MomentSums), "diagonal": summed(DiagonalSums)}


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 13),
    batch_rows=st.integers(1, 5),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 9),
)
def test_moments_of_lanes_in_other_batches_and_places(
    way: str, rows: int, batch_rows: int, order: tuple[int, ...], seed: int
) -> None:
    """Lanes are collected separately, as if by four processes, in any order and in other batches,
    also with fewer rows than lanes. Oracles: one process that collects all lanes in one batch, bit
    for bit; and float64.
    """
    x = activations(rows, seed=seed)
    whole = fold(WAYS[way]([x[part]] if part.start < part.stop else [], part, rows) for part in parts(rows))
    lanes = {
        lane: WAYS[way](list(x[parts(rows)[lane]].split(batch_rows)), parts(rows)[lane], rows)
        for lane in order
    }
    found = finished(whole)
    for one, other in zip(found, finished(fold(lanes[lane] for lane in range(LANES))), strict=True):
        assert torch.equal(one, other)
    wide = x.flatten(0, 1).double()
    gram = wide.T @ wide / len(wide)
    expected = gram if found[0].ndim == 2 else gram.diagonal()
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-6 * float(gram.max()))


def test_the_median_sample_is_that_of_all_rows() -> None:
    """Oracle: every stride-th token of all rows, although lanes may start between two such tokens."""
    x = torch.arange(63.0).view(9, 7, 1)
    sums = fold(accumulated([x[part]], part, 9) for part in parts(9))
    assert torch.equal(torch.cat(sums.sample)[:, 0], torch.arange(63.0)[:: sums.stride])
    assert sums.stride == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BlockModel:
    return BlockModel(
        open_checkpoint(make_model(tmp_path_factory.mktemp("lanes"), "llama", 2, tokenizer=False)),
        torch.float32,
        CPU,
    )


@pytest.mark.parametrize("processes", [2, 4])
def test_what_pruning_collects_from_processes_of_their_own(model: BlockModel, processes: int) -> None:
    """Oracle: one process. Each of the others embeds its lanes' rows alone, and hands over its sums
    before they are means.
    """
    rows, sites = token_rows(11, 9), [site.name for site in model.checkpoint.architecture.layouts[0].sites]
    dealt, block = deal(11, 2), model.block(0)
    expected = collect(model, (0, block), model.embed(rows, dealt.sizes).hidden, dealt.lanes, sites)
    lanes: dict[int, Sums[MomentSums]] = {}
    for process in reversed(range(processes)):
        for lane in range(LANES)[process::processes]:
            taken = Sums({site: MomentSums() for site in sites})
            keep = pytest.MonkeyPatch()
            keep.setattr(MomentSums, "finish", lambda self, _beside: self)
            own = deal(len(rows[parts(11)[lane]]), 2)
            sizes = [dealt.sizes[number] for number in dealt.lanes[lane]]
            assert sum(sizes) == sum(own.sizes)
            taken |= collect(
                model,
                (0, block),
                model.embed(rows[parts(11)[lane]], sizes).hidden,
                [range(len(sizes))],
                sites,
            )  # type: ignore[arg-type]
            keep.undo()
            lanes[lane] = taken
    found = fold(lanes[lane] for lane in range(LANES))
    for site in sites:
        for one, other in zip(finished_moments(found[site]), finished_moments(expected[site]), strict=True):
            assert torch.equal(one, other), site


def finished_moments(moments: Any) -> list[torch.Tensor]:
    ready = moments.finish() if isinstance(moments, MomentSums) else moments
    return [ready.gram, ready.mean]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_walk_over_fewer_rows_than_lanes(model: BlockModel, count: int) -> None:
    """Lanes without rows. Oracle: what is collected in a single lane."""
    rows = token_rows(count, 9)
    params = CalibrateParams(batch_rows=2, median_tokens=1000)
    (_, found), *_ = walk(model, rows, rows[:1], params, grams=True)
    stream, name = model.embed(rows, 1), model.checkpoint.architecture.layouts[0].sites[0].name
    (moments,) = collect(model, (0, model.block(0)), stream.hidden, [range(count)], [name]).values()
    gram = found[name].gram
    assert gram is not None
    torch.testing.assert_close(gram, moments.gram, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[name].mean, moments.mean, rtol=1e-5, atol=1e-6)


# Losses


@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows=st.integers(1, 11), batch_rows=st.integers(1, 11), order=st.sampled_from(ORDERS))
def test_losses_of_lanes_in_other_batches_and_places(
    rows: int, batch_rows: int, order: tuple[int, ...]
) -> None:
    """Oracles: the error in float64; the same rows in other batches; and lanes whose rows are
    summed up elsewhere, in any order; to the bit.
    """
    y = activations(rows) + 3

    def run(hidden: torch.Tensor, _tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return hidden * 0.9

    found, *others = (
        block_error(run, {}, Pairs(list(y.split(size)), list(y.split(size))))
        for size in (rows, batch_rows, 1)
    )
    assert others == [found, found]
    wide = y.double()
    expected = float((0.1 * wide).square().sum() / (wide - wide.mean((0, 1))).square().sum())
    assert found == pytest.approx(expected, rel=1e-5)
    lanes = {lane: squares(run(y[parts(rows)[lane]], {}) - y[parts(rows)[lane]]) for lane in order}
    wrong = fold(functools.reduce(torch.add, lanes[lane]) for lane in range(LANES) if lanes[lane])
    assert float(wrong) / spread([y]) == found


# Gradients


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_lanes_side_by_side(count: int) -> None:
    """Oracle: as many at a time as there are threads, at most the lanes; in order; and torch's
    threads shared among them, then as before.
    """
    together, lock, most = [0], threading.Lock(), [0]

    def work(lane: int) -> tuple[int, int]:
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        time.sleep(0.1)
        with lock:
            together[0] -= 1
        return lane, torch.get_num_threads()

    with threads(count):
        with side_by_side(True) as each:
            assert list(each(work, range(LANES))) == [(lane, max(1, count // LANES)) for lane in range(LANES)]
        assert (most, torch.get_num_threads()) == ([min(count, LANES)], count)
        with side_by_side(False) as each:
            assert each is map


def lane_by_lane(
    run: Any, tensors: dict[str, torch.Tensor], matrices: tuple[Matrix, ...], rows: Pairs, processes: int
) -> dict[str, torch.Tensor]:
    """What ``fit`` does in an epoch, written out: every lane's gradients are taken by themselves,
    by processes whose turn is drawn by lot.
    """
    how = block_params(epochs=1, batch_rows=6, parts=["weights", "norms"])
    free = _Free(masks_of(tensors, matrices), tensors, how.parts)
    groups = free.groups(how)
    leaves = [leaf for group in groups for leaf in group["params"]]
    optimiser, steps = torch.optim.Adam(groups, eps=1e-12, fused=True), -(-len(rows) // 6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: rate_share(done, steps))
    each, lot = spread(rows.targets) / len(rows), random.Random(processes)
    for lanes in minibatches(
        len(rows), 6, {lane: generator(how.seed, f"x:1:{lane}") for lane in range(LANES)}
    ):
        taken: dict[int, Sums[torch.Tensor]] = {}
        turns = list(range(len(lanes)))
        lot.shuffle(turns)
        for lane in turns:
            hidden, target = rows.rows(lanes[lane])
            loss = (run(hidden, free.apply(tensors)) - target).square().sum() / (sum(map(len, lanes)) * each)
            taken[lane] = Sums(enumerate(torch.autograd.grad(loss, leaves)))  # type: ignore[arg-type]
        whole = fold(taken[lane] for lane in sorted(taken))
        for number, leaf in enumerate(leaves):
            leaf.grad = whole[number]  # type: ignore[index]
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    with torch.no_grad():
        return {name: tensor.detach() + 0.0 for name, tensor in free.apply(tensors).items()}


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_gradients_of_lanes_by_themselves(checkpoint: Checkpoint, processes: int) -> None:
    """Oracle: the loop written out, in which lanes know nothing of each other until their gradients
    are folded; to the bit.
    """
    run, tensors, inputs = setting(checkpoint)
    matrices = checkpoint.architecture.layouts[0].matrices
    rows = Pairs(inputs[:6], targets_of(run, tensors, inputs[:6]))
    broken = noisy(tensors, matrices)
    expected = lane_by_lane(run, broken, matrices, rows, processes)
    how = block_params(epochs=1, batch_rows=6, parts=["weights", "norms"])
    with threads(processes):  # beside each other where there are several
        found = fit(Sparse(run, dict(broken), masks_of(broken, matrices), "x"), rows, rows, how)
    assert found.facts["epochs"] == 1
    assert any(not torch.equal(found.tensors[name], broken[name]) for name in broken)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("batch_rows", [1, 3])
def test_a_fit_does_not_see_how_its_rows_are_stored(checkpoint: Checkpoint, batch_rows: int) -> None:
    """Oracle: the fit of the same rows in batches of four, bit for bit: a step consists of rows,
    regardless of their batches.
    """
    run, tensors, inputs = setting(checkpoint)
    matrices = checkpoint.architecture.layouts[0].matrices
    targets, broken = targets_of(run, tensors, inputs), noisy(tensors, matrices)
    held_out = Pairs(inputs[6:], targets[6:])
    found = []
    for size in (4, batch_rows):
        rows = Pairs(*(torch.cat(list(part[:6])).split(size) for part in (inputs, targets)))
        how = block_params(epochs=2, batch_rows=4)
        found.append(fit(Sparse(run, dict(broken), masks_of(broken, matrices), "x"), rows, held_out, how))
    assert found[0].facts["epochs"] > 0
    assert all(torch.equal(found[1].tensors[name], tensor) for name, tensor in found[0].tensors.items())


@pytest.mark.parametrize("family", ["llama"])
def test_a_fit_of_fewer_rows_than_lanes(checkpoint: Checkpoint) -> None:
    """Lanes without rows take no part. Oracle: the error of the undamaged block, which the fit approaches."""
    run, tensors, inputs = setting(checkpoint)
    matrices = checkpoint.architecture.layouts[0].matrices
    rows = Pairs([inputs[0][:3]], targets_of(run, tensors, [inputs[0][:3]]))
    broken = noisy(tensors, matrices)
    found = fit(
        Sparse(run, dict(broken), masks_of(broken, matrices), "x"),
        rows,
        Pairs([], []),
        block_params(epochs=8, batch_rows=4),
    )
    assert found.facts["held_out_after"] < 0.7 * found.facts["held_out_before"]


# Moments of output gradients


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("at_once", [1, 3, 5, 11])
def test_output_moments_do_not_see_how_many_probes_share_a_pass(
    model: BlockModel, tmp_path: Path, full: bool, at_once: int
) -> None:
    """Eleven probes. Oracles: all of them in one pass, to the bit; and float64."""
    matrix = model.checkpoint.architecture.layouts[0].matrices[0]
    gradients = activations(22, 5, 9).split(2)
    found = []
    for name, size in (("one", 11), ("other", at_once)):
        moments = OutputMoments(tmp_path / name, full)
        for probes in torch.arange(11).split(size):
            for lane in range(LANES):
                own = [int(probe) for probe in probes if probe % LANES == lane]
                if own:
                    moments.open(0, lane)
                    for probe in own:
                        moments.add(matrix, gradients[probe])
                    moments.close(0, lane, 10 * len(own))
        moments.finish(1)
        (path,) = (tmp_path / name).iterdir()
        found.append(path.read_bytes())
        (mean,), facts = [*read_tensors(path)[0].values()], read_tensors(path)[1]
        assert facts == {"full": full, "tokens": 110}
        wide = torch.cat(gradients).flatten(0, 1).double()
        expected = wide.T @ wide / 110
        torch.testing.assert_close(
            mean.double(),
            expected if full else expected.diagonal(),
            rtol=1e-5,
            atol=1e-6 * float(expected.max()),
        )
    assert found[0] == found[1]
