"""Statistics of activations. Oracles: direct formulas over all tokens at once, and statistics
recomputed after a real change.
"""

from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    ALL_FAMILIES,
    curved_gram,
    make_model,
    module_of,
    noting,
    power_of_two_factors,
    random_factors,
    token_rows,
)

from pipeline_lib.core.artifacts import block_file, write_tensors
from pipeline_lib.models.checkpoint import Checkpoint, ShardWriter, open_checkpoint
from pipeline_lib.models.folding import fold, site_factor
from pipeline_lib.models.stream import BlockModel, Stream, tapped
from pipeline_lib.prune.collect import collect as collect_moments
from pipeline_lib.prune.collect import collect_diagonals
from pipeline_lib.stats.moments import (
    Accumulator,
    Moments,
    MomentSums,
    SiteStatistics,
    add_product,
    add_square,
    drawn_together,
    mirror_,
    refresh,
)
from pipeline_lib.stats.walk import CalibrateParams, gram_bytes, stored_or_walked, walk

CPU = torch.device("cpu")
PARAMS = CalibrateParams(batch_rows=2, median_tokens=10_000)
FIT, HELD_OUT = token_rows(5, 9, seed=1), token_rows(3, 9, seed=2)


def direct(x: torch.Tensor, held_out: torch.Tensor | None = None) -> SiteStatistics:
    """The definitions, in float64 over all tokens at once (the median of an even count is the lower
    one, as torch has it).
    """
    wide = x.double()
    other = None if held_out is None else held_out.double().T @ held_out.double() / len(held_out)
    ordered = wide.sort(0).values[(len(x) - 1) // 2]
    return SiteStatistics(
        wide.square().mean(0),
        wide.mean(0),
        ordered,
        wide.amin(0),
        wide.amax(0),
        wide.T @ wide / len(x),
        other,
    )


def assert_close(a: SiteStatistics, b: SiteStatistics, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    first, second = a.tensors("s"), b.tensors("s")
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name].double(), second[name].double(), rtol=rtol, atol=atol)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    splits=st.lists(st.integers(1, 17), min_size=1, max_size=6), seed=st.integers(0, 99), half=st.booleans()
)
def test_accumulator_equals_direct_formulas(splits: list[int], seed: int, half: bool) -> None:
    """Oracle: ``direct``, however the tokens come in batches; sums must not forget, weigh or double any."""
    x, _ = curved_gram(5, seed, tokens=sum(splits))
    x = x.to(torch.bfloat16) if half else x
    accumulator, held = (Accumulator(len(x), 10_000, gram=True) for _ in range(2))
    for batch in x.split(splits):
        accumulator.add(batch)
    held.add(x[:1] * 3)
    assert_close(accumulator.finish(held), direct(x, x[:1] * 3), rtol=2e-5, atol=1e-5)


def test_all_negative_and_all_positive_channels() -> None:
    """Oracle: by hand; minimum and maximum must not start from 0."""
    accumulator = Accumulator(4, 100, gram=False)
    accumulator.add(torch.tensor([[-3.0, 5.0], [-1.0, 7.0]]))
    accumulator.add(torch.tensor([[-2.0, 6.0], [-9.0, 8.0]]))
    statistics = accumulator.finish()
    assert statistics.minimum.tolist() == [-9, 5]
    assert statistics.maximum.tolist() == [-1, 8]
    assert statistics.median.tolist() == [-3, 6]
    assert statistics.gram is None
    assert statistics.held_out_gram is None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(splits=st.lists(st.integers(1, 9), min_size=1, max_size=8), budget=st.integers(1, 30))
def test_median_sample_is_every_stride_th_token(splits: list[int], budget: int) -> None:
    """Oracle: one slice of all tokens. At most ``median_tokens`` of them are held, whatever the batches."""
    total = sum(splits)
    x = torch.arange(total, dtype=torch.float32)[:, None]
    accumulator = Accumulator(total, budget, gram=False)
    for batch in x.split(splits):
        accumulator.add(batch)
    sample = torch.cat(accumulator.sample)
    stride = -(-total // budget)
    assert torch.equal(sample, x[::stride])
    assert len(sample) <= budget


def test_accumulator_does_not_keep_the_activations() -> None:
    """A kept sample is a copy: overwriting the activations later changes nothing."""
    x = torch.ones(4, 2)
    accumulator = Accumulator(4, 4, gram=True)
    accumulator.add(x)
    x.fill_(5)
    assert accumulator.finish().median.tolist() == [1, 1]


def test_large_offsets_do_not_drown_the_variance() -> None:
    """Oracle: float64. Mean 1000, deviation 1: the sums are in float64, so E[x²] − μ² still shows
    the variance.
    """
    x = (1000 + torch.randn(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).float()
    accumulator = Accumulator(500, 100, gram=False)
    for batch in x.split(7):
        accumulator.add(batch)
    expected = float(x.double().square().mean() - x.double().mean().square())
    assert float(accumulator.squares / 500 - (accumulator.sum / 500).square()) == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float32, torch.float32)],
)
def test_products_are_summed_in_float32(device: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Oracle: float64. In bfloat16, of which products are exact, an error of 1e-6 is not reached if
    anything on the way is rounded to it.
    """
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    random = torch.Generator().manual_seed(0)
    left, right = (torch.randn(300, 8, generator=random).to(device, dtype) + 1 for dtype in dtypes)
    total = torch.ones(8, 8, device=device)
    add_product(total, left, right)
    torch.testing.assert_close(total.double(), 1 + left.double().T @ right.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_are_summed_in_panels(dtype: torch.dtype) -> None:
    """Oracle: float64; symmetric to the bit. Two panels and a part of one, weighed tokens too."""
    random = torch.Generator().manual_seed(0)
    x, weights = (
        torch.randn(50, 2 * 256 + 33, generator=random).to(dtype),
        torch.rand(50, 1, generator=random),
    )
    total = torch.zeros(x.shape[1], x.shape[1])
    add_square(total, x, x)
    add_square(total, x.float() * weights, x)
    wide = x.double()
    expected = wide.T @ wide + (wide * weights.double()).T @ wide
    torch.testing.assert_close(mirror_(total).double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(total, total.T)


def test_a_gpu_takes_bfloat16_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is widened before the product there. Oracle: what the product gets, and float64."""
    got: list[torch.dtype] = []

    def product(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        got.extend((left.dtype, right.dtype, out_dtype))
        return (left.double() @ right.double()).to(out_dtype)

    class OnGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr(torch, "mm", product)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = torch.zeros(4, 4).as_subclass(OnGpu)
    add_product(total, x, x)
    assert got == [torch.bfloat16, torch.bfloat16, torch.float32]
    torch.testing.assert_close(
        total.as_subclass(torch.Tensor).double(), x.double().T @ x.double(), rtol=1e-6, atol=1e-6
    )
    add_product(total, x.float(), x)
    assert len(got) == 3


def moments_of(x: torch.Tensor, dense: torch.Tensor | None = None) -> Moments:
    """Oracle in float64."""
    wide = x.double()
    beside = () if dense is None else (dense.double().T @ wide / len(x), dense.double().mean(0))
    return Moments(wide.T @ wide / len(x), wide.mean(0), *beside)


def assert_moments(found: Moments, expected: Moments, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    scale = float(expected.gram.abs().max())
    for one in fields(Moments):
        a, b = getattr(found, one.name), getattr(expected, one.name)
        assert one.name == "tokens" or (a is None) == (b is None), one.name
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(
                a.double(), b.double(), rtol=rtol, atol=atol * (scale if a.ndim == 2 else 1)
            )


@pytest.mark.parametrize("beside", [False, True])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(splits=st.lists(st.integers(1, 17), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_summed_moments_equal_direct_formulas(beside: bool, splits: list[int], seed: int) -> None:
    """Oracle: all moments in float64 over all tokens at once, whatever the batches."""
    x, dense = (curved_gram(5, number, tokens=sum(splits))[0] for number in (seed, seed + 100))
    sums = MomentSums()
    for own, other in zip(x.split(splits), dense.split(splits), strict=True):
        sums.add(own, other if beside else None)
    scale = float(dense.abs().max() / x.abs().max())
    assert_moments(
        sums.finish(beside), moments_of(x, dense if beside else None), rtol=2e-5, atol=1e-5 * max(1, scale)
    )


@pytest.mark.parametrize("beside", [False, True])
def test_shifted_moments_equal_recomputing(beside: bool) -> None:
    """Oracle: moments of X − δ and X_dense − δ, in float64."""
    x, dense = (curved_gram(12, seed, spread=0.3)[0].double() for seed in (3, 4))
    delta = torch.randn(12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    plain, expected = (moments_of(x - d, dense - d if beside else None) for d in (0, delta))
    assert_moments(plain.shifted(delta), expected, rtol=1e-9, atol=1e-9)


def test_moments_of_statistics_are_theirs() -> None:
    """Oracle: the fields themselves, which stay when pruning overwrites what it was given; without
    Gram matrices there are none.
    """
    x, _ = curved_gram(4, 1)
    statistics = direct(x)
    assert_moments(
        statistics.moments, Moments(statistics.second_moment_matrix, statistics.mean), rtol=0, atol=0
    )
    before = statistics.second_moment_matrix.clone()
    refresh(statistics, None).moments.gram.zero_()
    assert torch.equal(statistics.second_moment_matrix, before)
    with pytest.raises(ValueError, match="without Gram"):
        _ = replace(statistics, gram=None).moments


@pytest.mark.parametrize(
    ("with_factor", "with_shift"), [(True, False), (False, True), (True, True), (False, False)]
)
def test_refresh_equals_recomputing(with_factor: bool, with_shift: bool) -> None:
    """Oracle: ``direct`` on X' = D (X − δ) (fast Hessian update, 2602.21652, Eqs. 9–11)."""
    x, _ = curved_gram(12, seed=3)
    random = torch.Generator().manual_seed(4)
    d = 10 ** (torch.rand(12, generator=random) * 3 - 1.5) if with_factor else None
    delta = torch.randn(12, generator=random) if with_shift else None
    changed = (x.double() - (0 if delta is None else delta)) * (1 if d is None else d)
    narrow = {name: tensor.float() for name, tensor in direct(x, x).tensors("s").items()}
    refreshed = refresh(SiteStatistics.from_tensors("s", narrow), d, delta)
    expected = direct(changed, changed)
    # Compared back in the original coordinates, where all channels are of one size.
    back = torch.ones(12, dtype=torch.float64) if d is None else 1 / d.double()
    wide = SiteStatistics.from_tensors(
        "s", {name: tensor.double() for name, tensor in refreshed.tensors("s").items()}
    )
    assert_close(refresh(wide, back), refresh(expected, back), rtol=1e-5, atol=1e-5)


def test_refresh_by_one_channel_by_hand() -> None:
    """Oracle: by hand: X = ±1 + 2 has G = 5, μ = 2; with δ = 2, d = 3 it is ±3: G' = 9, μ' = 0."""
    five, two = torch.tensor([5.0]), torch.tensor([2.0])
    s = SiteStatistics(
        five, two, torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([3.0]), five.view(1, 1), None
    )
    r = refresh(s, torch.tensor([3.0]), torch.tensor([2.0]))
    assert (float(r.second_moment), float(r.mean), float(r.median), float(r.minimum), float(r.maximum)) == (
        9,
        0,
        -3,
        -3,
        3,
    )
    assert r.gram is not None
    assert float(r.gram) == 9
    assert r.held_out_gram is None


def test_shift_by_the_mean_gives_the_covariance() -> None:
    """Oracle: torch.cov."""
    x, _ = curved_gram(8, seed=5)
    accumulator = Accumulator(len(x), 100, gram=True)
    accumulator.add(x)
    statistics = accumulator.finish()
    centred = refresh(statistics, None, statistics.mean).gram
    assert centred is not None
    torch.testing.assert_close(centred, torch.cov(x.T, correction=0), rtol=1e-4, atol=1e-4)


def collect(path: Path, grams: bool = True) -> dict[int, dict[str, SiteStatistics]]:
    return dict(walk(BlockModel(open_checkpoint(path), torch.float32, CPU), FIT, HELD_OUT, PARAMS, grams))


def test_walk_equals_direct_formulas_on_the_captured_inputs(checkpoint: Checkpoint) -> None:
    """Oracle: hooks on the whole stream in one batch; fitting rows for the vectors, held-out rows
    for the held-out Gram.
    """
    model = BlockModel(checkpoint, torch.float32, CPU)
    found = collect(checkpoint.path)
    streams = [model.embed(rows, 100) for rows in (FIT, HELD_OUT)]
    for index in range(checkpoint.architecture.depth):
        inputs: list[dict[str, torch.Tensor]] = [{}, {}]
        for stream, taken in zip(streams, inputs, strict=True):
            block = model.block(index)
            with tapped(block, checkpoint.architecture.layouts[0].sites, noting(taken)):
                model.advance(block, index, stream)
        for site in checkpoint.architecture.layouts[0].sites:
            assert_close(
                found[index][site.name],
                direct(inputs[0][site.name], inputs[1][site.name]),
                rtol=1e-4,
                atol=1e-4,
            )


def test_walk_without_held_out_rows_and_without_grams(llama: Checkpoint) -> None:
    model = BlockModel(llama, torch.float32, CPU)
    with_grams = dict(walk(model, FIT, FIT[:0], PARAMS, grams=True))
    without = dict(walk(model, FIT, HELD_OUT, PARAMS, grams=False))
    for index, sites in without.items():
        for name, statistics in sites.items():
            assert statistics.gram is None
            assert statistics.held_out_gram is None
            assert with_grams[index][name].held_out_gram is None
            assert with_grams[index][name].gram is not None
            assert torch.equal(with_grams[index][name].second_moment, statistics.second_moment)


@pytest.mark.parametrize("powers", [True, False])
def test_refresh_equals_walking_the_folded_model(
    checkpoint: Checkpoint, tmp_path: Path, powers: bool
) -> None:
    """Oracle: a folded checkpoint, written and walked. The fast Hessian update on a real model: no
    forward pass is needed.

    Powers of two: to the last bit. Other factors: to float32's rounding in the original coordinates.
    """
    table = checkpoint.architecture.layouts[0]
    sizes = {coupling.name: coupling.size for coupling in table.couplings}
    factors = [
        power_of_two_factors(sizes, seed) if powers else random_factors(sizes, seed)
        for seed in range(checkpoint.architecture.depth)
    ]
    writer = ShardWriter(checkpoint, tmp_path / "folded")
    for block in range(checkpoint.architecture.depth):
        writer.write(block, fold(checkpoint.block(block), table, factors[block]))
    writer.finish()
    plain, folded = collect(checkpoint.path), collect(tmp_path / "folded")
    for block in range(checkpoint.architecture.depth):
        for site in table.sites:
            d = site_factor(table, site.name, factors[block])
            d = None if d is None else d.float()
            if powers:
                assert_close(refresh(plain[block][site.name], d), folded[block][site.name], rtol=0, atol=0)
            else:
                back = refresh(folded[block][site.name], None if d is None else 1 / d)
                scale = float(plain[block][site.name].second_moment.max())
                assert_close(back, plain[block][site.name], rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("with_shift", [False, True])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_refresh_equals_recollecting_in_every_family(checkpoint: Checkpoint, with_shift: bool) -> None:
    """Oracle: ``direct`` on the inputs of the folded block, less the shift in its coordinates.
    Every statistic, in float64.

    Both Grams are of the same rows here: with a shift the held-out one is exact only where the two
    means agree.
    """
    table = checkpoint.architecture.layouts[0]
    model = BlockModel(checkpoint, torch.float64, CPU)
    tensors = {name: tensor.double() for name, tensor in checkpoint.block(0).items()}
    factors = random_factors(
        {coupling.name: coupling.size for coupling in table.couplings}, seed=7, decades=2.0
    )
    taken: list[dict[str, torch.Tensor]] = [{}, {}]
    for chosen, into in zip(({}, factors), taken, strict=True):
        stream, block = model.embed(FIT, len(FIT)), model.block(0, fold(tensors, table, chosen))
        with tapped(block, table.sites, noting(into)):
            model.advance(block, 0, stream)
    random = torch.Generator().manual_seed(8)
    for site in table.sites:
        before, after = (inputs[site.name] for inputs in taken)
        d = site_factor(table, site.name, factors)
        assert (d is None) == (site.coupling is None)
        spread = before.std(0)
        delta = (
            spread * torch.randn(len(spread), generator=random, dtype=torch.float64)
            if with_shift
            else torch.zeros_like(spread)
        )
        unit = torch.ones_like(spread) if d is None else d
        found = refresh(direct(before, before), d, delta if with_shift else None)
        expected = direct(after - unit * delta, after - unit * delta)
        # Compared in the original coordinates; RMSNorm and BLOOM's softmax compute in float32.
        scale = float(expected.second_moment.div(unit.square()).max())
        assert_close(
            refresh(found, 1 / unit),
            refresh(expected, 1 / unit),
            rtol=1e-4,
            atol=1e-5 * max(scale, scale**0.5),
        )


def test_stored_grams_equal_walked_ones_to_the_bit(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Both sides of SPARSELINE_GRAM_BYTES: files with Grams, and files without, for which the model
    is walked again.
    """
    model = BlockModel(checkpoint, torch.float32, CPU)
    for name, grams in (("stored", True), ("over", False)):
        for block, sites in walk(model, FIT, HELD_OUT, PARAMS, grams):
            tensors: dict[str, torch.Tensor] = {}
            for site, statistics in sites.items():
                tensors |= statistics.tensors(site)
            write_tensors(block_file(tmp_path / name, block), tensors, {"grams": grams})
    stored = list(stored_or_walked(tmp_path / "stored", model, FIT, HELD_OUT, PARAMS))
    # A model of its own: what walks again starts from nothing.
    again = list(
        stored_or_walked(tmp_path / "over", BlockModel(checkpoint, torch.float32, CPU), FIT, HELD_OUT, PARAMS)
    )
    assert (
        [block for block, _ in stored]
        == [block for block, _ in again]
        == list(range(checkpoint.architecture.depth))
    )
    for (_, a), (_, b) in zip(stored, again, strict=True):
        for site in a:
            assert a[site].gram is not None
            assert a[site].held_out_gram is not None
            assert_close(a[site], b[site], rtol=0, atol=0)


def test_gram_bytes_is_what_the_files_hold(tmp_path: Path) -> None:
    """Oracle: the bytes of all Grams that a walk yields; the digest's 0.69 GB per block of a 7B Llama."""
    path = make_model(tmp_path, "llama", layers=3)
    checkpoint = open_checkpoint(path)
    total = 0
    for sites in collect(path).values():
        for statistics in sites.values():
            assert statistics.gram is not None
            assert statistics.held_out_gram is not None
            total += sum(
                gram.numel() * gram.element_size() for gram in (statistics.gram, statistics.held_out_gram)
            )
    assert gram_bytes(checkpoint.architecture) == total


# What pruning collects

LANES = [[0], [1, 2]]  # five rows in batches of two, not dealt as they are elsewhere


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_site_by_site_equals_all_at_once(checkpoint: Checkpoint) -> None:
    """Oracle: one pass through the whole block, to the bit. Site by site nothing of the block runs
    beyond the site, and the stream stays.
    """
    table = checkpoint.architecture.layouts[0]
    model = BlockModel(checkpoint, torch.float32, CPU)
    stream = model.embed(FIT, 2)
    before = list(stream.hidden)
    block = model.block(0)
    ran: list[str] = []
    handle = block.get_submodule(module_of(table.sites[-1])).register_forward_hook(
        lambda *_: ran.append("beyond the last site")
    )
    names = [site.name for site in table.sites]
    at_once = collect_moments(model, (0, block), stream.hidden, LANES, names)
    handle.remove()
    assert not ran
    assert list(at_once) == names
    reached: Counter[str] = Counter()
    for site in table.sites:
        block.get_submodule(module_of(site)).register_forward_pre_hook(
            lambda _module, _inputs, name=site.name: reached.update([name])
        )
    for number, site in enumerate(table.sites):
        reached.clear()
        found = collect_moments(model, (0, block), stream.hidden, LANES, [site.name])
        assert found.keys() == {site.name}
        assert_moments(found[site.name], at_once[site.name], rtol=0, atol=0)
        assert reached == dict.fromkeys(names[: number + 1], 3)  # 5 rows in batches of 2
    assert all(torch.equal(a, b) for a, b in zip(before, stream.hidden, strict=True))


def inputs_of(model: BlockModel, block: torch.nn.Module, stream: Stream) -> dict[str, torch.Tensor]:
    """Every site's inputs [tokens, d], of all batches."""
    taken: dict[str, list[torch.Tensor]] = {
        site.name: [] for site in model.checkpoint.architecture.layouts[0].sites
    }
    with (
        torch.no_grad(),
        tapped(
            block,
            model.checkpoint.architecture.layouts[0].sites,
            lambda s, x, _: taken[s.name].append(x.reshape(-1, x.shape[-1])),
        ),
    ):
        for hidden in stream.hidden:
            model.call(block, 0, hidden)
    return {name: torch.cat(parts) for name, parts in taken.items()}


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "gpt_neox"])
def test_diagonals_are_those_of_the_moments(checkpoint: Checkpoint) -> None:
    """Oracle: hooks on the block, in float64; one site at a time gives the same bits, and no more
    of the block is run than it needs.
    """
    model = BlockModel(checkpoint, torch.float32, CPU)
    stream, block = model.embed(FIT, 2), model.block(0)
    names, own = (
        [site.name for site in checkpoint.architecture.layouts[0].sites],
        inputs_of(model, block, stream),
    )
    found = collect_diagonals(model, (0, block), stream.hidden, LANES, names)
    assert list(found) == names
    for name, diagonal in found.items():
        torch.testing.assert_close(diagonal.double(), own[name].double().square().mean(0), rtol=1e-6, atol=0)
    ran: list[str] = []
    block.get_submodule(module_of(checkpoint.architecture.layouts[0].sites[-1])).register_forward_hook(
        lambda *_: ran.append("beyond the last site")
    )
    for name in names:
        (alone,) = collect_diagonals(model, (0, block), stream.hidden, LANES, [name]).values()
        assert torch.equal(alone, found[name])
    assert not ran


@pytest.mark.parametrize("one_site", [True, False])
@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "gpt_neox"])
def test_cross_moments_are_of_both_streams_inputs(checkpoint: Checkpoint, one_site: bool) -> None:
    """Oracle: hooks on the dense block in the dense stream and on a damaged one in another stream;
    E[X_dense Xᵀ], not its transpose.
    """
    table = checkpoint.architecture.layouts[0]
    model = BlockModel(checkpoint, torch.float32, CPU)
    dense_stream, stream = model.embed(FIT, 2), model.embed(FIT, 2)
    random = torch.Generator().manual_seed(1)
    stream.hidden = [hidden + 0.5 * torch.randn(hidden.shape, generator=random) for hidden in stream.hidden]
    dense, block = (
        model.block(0, {n: t * s if t.ndim == 2 else t for n, t in checkpoint.block(0).items()})
        for s in (1.0, 0.8)
    )
    own, beside = inputs_of(model, block, stream), inputs_of(model, dense, dense_stream)
    found, names = {}, [site.name for site in table.sites]
    for sites in [[name] for name in names] if one_site else [names]:
        found |= collect_moments(model, (0, block), stream.hidden, LANES, sites, (dense, dense_stream.hidden))
    plain = collect_moments(model, (0, block), stream.hidden, LANES, names)
    for site in table.sites:
        cross, mean = found[site.name].cross, found[site.name].dense_mean
        expected = beside[site.name].double().T @ own[site.name].double() / FIT.numel()
        assert cross is not None
        assert mean is not None
        scale = float(expected.abs().max())
        assert float((expected - expected.T).abs().max()) > 1e-2 * scale
        torch.testing.assert_close(cross.double(), expected, rtol=1e-5, atol=1e-5 * scale)
        torch.testing.assert_close(mean.double(), beside[site.name].double().mean(0), rtol=1e-5, atol=1e-6)
        assert_moments(
            replace(found[site.name], cross=None, dense_mean=None), plain[site.name], rtol=0, atol=0
        )


def test_experts_without_tokens_have_statistics_of_their_own() -> None:
    """Oracle: the writer, which refuses tensors that share memory."""
    pool = Accumulator(8, 8, gram=True)
    pool.add(torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0)))
    found = {"a": Accumulator(8, 8, gram=True), "b": Accumulator(8, 8, gram=True), "pool": pool}
    drawn = drawn_together(found, {"a": "pool", "b": "pool"})
    tensors = {k: v for site, one in drawn.items() for k, v in one.finish().tensors(site).items()}
    assert safetensors.torch.save(tensors)
    torch.testing.assert_close(tensors["a.maximum"], pool.maximum)
