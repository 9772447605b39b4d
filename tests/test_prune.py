"""Pruning block by block. Oracles: the same steps written out, the whole stream through dense and
pruned blocks, and runs that differ in one knob.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_checkpoint
from project import recipe
from safetensors.torch import load_file, save_file
from tiny import curved_gram, make_model, token_rows

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.fit.fit import Pairs, Sparse, fit
from pipeline_lib.masks.settings import DampingOf
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint
from pipeline_lib.models.places import Storage
from pipeline_lib.models.stream import BlockModel, Stream, tapped
from pipeline_lib.models.transform import Transform
from pipeline_lib.prune import layerwise
from pipeline_lib.prune.collect import collect
from pipeline_lib.prune.layerwise import Layerwise
from pipeline_lib.prune.plan import Plan, plan
from pipeline_lib.prune.run import Rows, Source, prune, stream_bytes
from pipeline_lib.prune.select import Select
from pipeline_lib.prune.window import Block
from pipeline_lib.recipe.settings import Recipe
from pipeline_lib.solve.factor import Factorisation
from pipeline_lib.stats.lanes import deal, fold
from pipeline_lib.stats.moments import MomentSums

CPU = torch.device("cpu")
DEPTH = 3
FITTING, HELD_OUT, UNSEEN = token_rows(48, 12, seed=1), token_rows(8, 12, seed=2), token_rows(32, 12, seed=3)
LITTLE: dict[str, Any] = {"epochs": 2, "batch_rows": 4, "compute_dtype": "float32"}
Kept = Mapping[tuple[int, Matrix], int]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("deep"), "llama", DEPTH, seed=3, tokenizer=False)


def model_of(path: Path) -> BlockModel:
    return BlockModel(open_checkpoint(path), torch.float32, CPU)


def half(model: BlockModel, *whole: int) -> Kept:
    """Half of every matrix, and all of those in the blocks ``whole``."""
    checkpoint = model.checkpoint
    sizes = {
        matrix: checkpoint.matrix_shape(0, matrix) for matrix in checkpoint.architecture.layouts[0].matrices
    }
    depth = checkpoint.architecture.depth
    return {
        (i, m): rows * columns // (1 if i in whole else 2)
        for i in range(depth)
        for m, (rows, columns) in sizes.items()
    }


def params(steps: tuple[str, ...], **reconstruction: Any) -> Recipe:
    changes = {
        "finetune_channels": LITTLE,
        **reconstruction,
        "finetune": {**LITTLE, **reconstruction.get("finetune", {})},
    }
    return recipe(steps, batch_rows=8, selection={"block": 16}, reconstruction=changes)


def source(model: BlockModel, *whole: int) -> Source:
    """Half of every matrix is kept, and all of those in the blocks ``whole``; nothing is folded in."""
    return Source(model, [Transform({})] * model.checkpoint.architecture.depth, half(model, *whole))


def run(
    model: BlockModel, settings: Recipe, fitting: torch.Tensor = FITTING, held_out: torch.Tensor = HELD_OUT
) -> Iterator[tuple[int, Block]]:
    rows = Rows(fitting, held_out, settings.batch_rows)
    return prune(source(model), rows, plan(settings, model.checkpoint.dtype), lambda _: None)


def pruned(path: Path, settings: Recipe, *whole: int, storage: Storage | None = None) -> dict[int, Block]:
    model = model_of(path)
    rows = Rows(FITTING, HELD_OUT, settings.batch_rows)
    found = list(
        prune(source(model, *whole), rows, plan(settings, model.checkpoint.dtype), lambda _: None, storage)
    )
    assert [index for index, _ in found] == list(range(DEPTH))
    return dict(found)


def assert_same(a: Mapping[int, Block], b: Mapping[int, Block]) -> None:
    """To the last bit."""
    assert a.keys() == b.keys()
    for index in a:
        for name in a[index].tensors:
            assert torch.equal(a[index].tensors[name], b[index].tensors[name]), f"{index} {name}"
        for name in a[index].masks:
            assert torch.equal(a[index].masks[name], b[index].masks[name]), f"{index} {name}"
        assert a[index].facts == b[index].facts


def passed(
    model: BlockModel, rows: torch.Tensor, blocks: Mapping[int, Mapping[str, torch.Tensor]], upto: int = DEPTH
) -> torch.Tensor:
    """Hidden states [B, T, D] after the blocks before ``upto``, the given ones in the place of the
    dense ones.
    """
    stream = model.embed(rows, len(rows))
    for index in range(upto):
        model.advance(model.block(index, blocks.get(index)), index, stream)
    return stream.hidden[0]


def relative(out: torch.Tensor, target: torch.Tensor) -> float:
    """E‖Y_dense − Y‖² / E‖Y_dense − E Y_dense‖²."""
    return float((out - target).square().sum() / (target - target.mean((0, 1))).square().sum())


# Windows


@pytest.mark.parametrize("refresh_epochs", [0, 1])
@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_every_block_once_with_exact_counts(path: Path, window: int, refresh_epochs: int) -> None:
    """Three blocks in windows of one to five. Oracles: the counts asked for, masks and zeros
    against each other, the facts' own inequality.
    """
    model = model_of(path)
    kept = half(model)
    block = {"window": window, "refresh_epochs": refresh_epochs, "parts": ["weights", "norms"]}
    found = pruned(path, params(("obs", "finetune"), finetune=block))
    for index, result in found.items():
        assert result.masks.keys() == {
            matrix.parameter for matrix in model.checkpoint.architecture.layouts[0].matrices
        }
        for matrix in model.checkpoint.architecture.layouts[0].matrices:
            mask, left = (
                matrix.view(result.masks[matrix.parameter]),
                matrix.view(result.tensors[matrix.parameter]),
            )
            assert int(mask.sum()) == kept[index, matrix]
            assert torch.equal(left != 0, mask)
            assert not left[~mask].view(torch.int32).any()
        facts = result.facts["finetune"]
        assert facts["held_out_after"] <= facts["held_out_before"]
        assert facts["epochs"] > 0
        # a window is fitted, and told of, as one
        assert facts == found[index - index % window].facts["finetune"]
    assert len({found[first].facts["finetune"]["held_out_before"] for first in range(0, DEPTH, window)}) == -(
        -DEPTH // window
    )


def test_one_block_at_a_time_as_written_out(path: Path) -> None:
    """Oracle: collect, prune, fit and advance in a loop, to the last bit."""
    settings = params(("obs", "finetune_channels", "finetune"))
    model = model_of(path)
    table, kept = model.checkpoint.architecture.layouts[0], half(model)
    dealt = deal(48, 8)
    sparse, judging = model.embed(FITTING, dealt.sizes), model.embed(HELD_OUT, 2)
    dense, wanted = sparse.copy(), judging.copy()
    for index, result in pruned(path, settings).items():
        own = {matrix: kept[index, matrix] for matrix in table.matrices}
        block, selected = (
            model.block(index),
            Block(table, "here", Transform({}), own, dict(model.checkpoint.block(index))),
        )
        moments = collect(
            model, (index, block), sparse.hidden, dealt.lanes, [site.name for site in table.sites]
        )
        Layerwise(settings.selection, True).prune_block(selected, moments)
        tensors, masks = (
            selected.tensors,
            {matrix: matrix.view(selected.masks[matrix.parameter]) for matrix in table.matrices},
        )
        model.advance(block, index, dense)
        model.advance(block, index, wanted)
        stages = Pairs(sparse.hidden, dense.hidden), Pairs(judging.hidden, wanted.hidden)
        for step in (settings.reconstruction.finetune_channels, settings.reconstruction.finetune):

            def through(
                hidden: torch.Tensor,
                given: Mapping[str, torch.Tensor],
                block: Any = block,
                index: int = index,
            ) -> torch.Tensor:
                return model.call(block, index, hidden, given)

            found = fit(Sparse(through, tensors, masks, f"layers.{index}"), *stages, step)
            tensors = found.tensors
        assert found.facts == result.facts["finetune"]
        assert tensors.keys() == result.tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, result.tensors[name]), name
        model.advance(model.block(index, tensors), index, sparse)
        model.advance(model.block(index, tensors), index, judging)


# The gate's rows


@pytest.mark.parametrize("batch_rows", [1, 5, 8, 64])
def test_the_gate_judges_on_the_held_out_rows_whatever_the_batches(path: Path, batch_rows: int) -> None:
    """19 fitting and 11 held-out rows: several batches of each, or one. Oracle: the held-out rows,
    and no others, through the blocks.
    """
    model, settings = (
        model_of(path),
        params(("obs", "finetune")).model_copy(update={"batch_rows": batch_rows}),
    )
    fit_rows, gate = FITTING[:19], token_rows(11, 12, seed=2)
    found = dict(run(model, settings, fit_rows, gate))
    blocks: dict[int, Mapping[str, torch.Tensor]] = {}
    for index, result in found.items():
        blocks[index] = result.tensors
        error = relative(passed(model, gate, blocks, index + 1), passed(model, gate, {}, index + 1))
        assert result.facts["finetune"]["held_out_after"] == pytest.approx(error, rel=1e-4)


GATED: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("obs", "finetune"), {}),
    (("finetune_channels",), {}),
    (
        ("obs", "lsq", "finetune"),
        {"statistics": "per_site", "dense_target": 0.5, "lsq": {"mask_iterations": 20}},
    ),
    (("obs", "finetune"), {"finetune": {"window": 2}}),
)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(("steps", "changes"), GATED)
def test_no_statistic_of_the_gate_s_rows_enters_a_candidate(
    path: Path, steps: tuple[str, ...], changes: dict[str, Any], bits: int | None
) -> None:
    """Oracle: the same run with other held-out rows, to the bit where both gates keep the one epoch
    there is; without a fit all rows count.
    """
    one_epoch = {"epochs": 1, "patience": 1, "rate": 0.002, "bias_rate": 0.002}
    block = {**LITTLE, **one_epoch, **changes.get("finetune", {})}
    how: dict[str, Any] = {**changes, "finetune_channels": {**LITTLE, **one_epoch}, "finetune": block}
    quantization = {"bits": bits, "group": 16, "symmetric": True, "scales": "checkpoint", "refit": []}
    model = model_of(path)

    def first(names: tuple[str, ...], gate: torch.Tensor) -> Block:
        settings = recipe(
            names, batch_rows=5, selection={"block": 16}, reconstruction=how, quantization=quantization
        )
        return next(run(model, settings, held_out=gate))[1]

    one, other = (first(steps, gate) for gate in (HELD_OUT, UNSEEN))
    fit_steps = [step for step in steps if step in ("finetune_channels", "finetune")]
    assert all(result.facts[step]["epochs"] == 1 for step in fit_steps for result in (one, other))
    assert all(one.facts[step]["held_out_after"] != other.facts[step]["held_out_after"] for step in fit_steps)
    assert one.facts["matrices"] == other.facts["matrices"]
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name
    plain = tuple(step for step in steps if step not in fit_steps)
    if plain:
        assert first(plain, HELD_OUT).facts["matrices"] != first(plain, FITTING[:8]).facts["matrices"]


def test_without_held_out_rows_all_rows_are_fitted_and_judge(path: Path) -> None:
    """Oracle: the fitting rows through the blocks; there are no others."""
    model, settings = model_of(path), params(("obs", "finetune"))
    found = dict(run(model, settings, held_out=FITTING[:0]))
    blocks = {index: result.tensors for index, result in found.items()}
    error = relative(passed(model, FITTING, blocks), passed(model, FITTING, {}))
    assert found[DEPTH - 1].facts["finetune"]["held_out_after"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("refresh_epochs", [0, 1])
def test_a_fit_gets_the_masks_that_were_chosen(
    path: Path, refresh_epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix with three quarters of zeros, half of whose weights are kept. Oracle: its mask:
    those move, the others stay zero.
    """
    model = model_of(path)
    dense = model.checkpoint.block(0)
    parameter = next(
        m.parameter for m in model.checkpoint.architecture.layouts[0].matrices if m.kind == "down"
    )
    dense[parameter][:, dense[parameter].shape[1] // 4 :] = 0
    monkeypatch.setattr(model.checkpoint.__class__, "block", lambda *_: dict(dense))
    settings = params(
        ("finetune",), finetune={"epochs": 1, "refresh_epochs": refresh_epochs, "parts": ["weights", "norms"]}
    )
    _, result = next(run(model, settings))
    assert result.facts["finetune"]["epochs"] == 1
    assert result.tensors[parameter][result.masks[parameter]].all()
    for name, mask in result.masks.items():
        assert not result.tensors[name][~mask].any()


# What the facts tell


@pytest.mark.parametrize("steps", [(), ("obs",), ("obs", "lsq")])
@pytest.mark.parametrize("shifted", [False, True])
def test_layer_errors_are_told_without_the_damping(path: Path, steps: tuple[str, ...], shifted: bool) -> None:
    """Half of the mean diagonal added, one input always zero. Oracle: E‖(W − Ŵ) X‖² / E‖W X‖² from
    the activations themselves, in float64.
    """
    table, tensors = open_checkpoint(path).architecture.layouts[0], open_checkpoint(path).block(0)
    site = table.sites[-1].name
    (matrix,) = table.consumers(site)
    weight = matrix.view(tensors[matrix.parameter]).clone()
    x, _ = curved_gram(weight.shape[1], seed=5, spread=0.5)
    x[:, 3] = 0
    sums = MomentSums()
    sums.add(x)
    shift = 0.5 * x.mean(0) if shifted else None
    settings = recipe(steps, selection={"block": 16, "damping": 0.5})
    step = Layerwise(
        settings.selection, "obs" in steps, lsq=settings.reconstruction.lsq if "lsq" in steps else None
    )
    transform = Transform({}, {} if shift is None else {site: shift})
    block = Block(table, "x", transform, {matrix: weight.numel() // 2}, dict(tensors))
    step.prune_site(block, site, {site: sums.finish()})
    seen = x.double() if shift is None else (x - shift).double()
    lost = (seen @ (weight - matrix.view(block.tensors[matrix.parameter])).double().T).square().sum()
    error = float(lost / (seen @ weight.double().T).square().sum())
    assert block.facts["matrices"][matrix.label]["layer_error"] == pytest.approx(error, rel=1e-3)


def test_a_window_is_fitted_to_what_its_last_block_gives(path: Path) -> None:
    """Oracle: the held-out rows through the dense model and through the blocks as they came out,
    with and without the fit.
    """
    model = model_of(path)
    fitted = pruned(path, params(("obs", "finetune"), finetune={"window": 2}))
    plain = dict(run(model, params(("obs",)), held_out=FITTING[:0]))
    blocks: dict[int, Mapping[str, torch.Tensor]] = {}
    for last, window in ((1, (0, 1)), (2, (2,))):
        dense = passed(model, HELD_OUT, {}, last + 1)
        after = {**blocks, **{index: fitted[index].tensors for index in window}}
        facts = fitted[last].facts["finetune"]
        assert facts["held_out_after"] == pytest.approx(
            relative(passed(model, HELD_OUT, after, last + 1), dense), rel=1e-4
        )
        if last == 1:  # afterwards the streams differ
            before = {index: plain[index].tensors for index in window}
            assert facts["held_out_before"] == pytest.approx(
                relative(passed(model, HELD_OUT, before, 2), dense), rel=1e-4
            )
        blocks = after
    assert relative(passed(model, UNSEEN, blocks), passed(model, UNSEEN, {})) < relative(
        passed(model, UNSEEN, {index: result.tensors for index, result in plain.items()}),
        passed(model, UNSEEN, {}),
    )


# Streams on disk

DENSE_TARGET: dict[str, Any] = {"statistics": "per_site", "dense_target": 1.0}


@pytest.mark.parametrize(
    ("steps", "changes", "streams"),
    [
        (("obs",), {}, {"pruned"}),
        (("obs", "finetune"), {"finetune": {"window": 2}}, {"pruned", "dense", "ahead"}),
        (("obs", "lsq"), DENSE_TARGET, {"pruned", "dense"}),
    ],
)
def test_streams_on_disk_change_no_bit(
    path: Path, tmp_path: Path, steps: tuple[str, ...], changes: dict[str, Any], streams: set[str]
) -> None:
    """Oracle: the run with hidden states in memory. Here all are files, one per batch (8, 4 and 2
    rows of each lane), and take the predicted bytes.
    """
    settings = params(steps, **changes)
    assert_same(pruned(path, settings, storage=Storage(0, 0, tmp_path / "spill")), pruned(path, settings))
    files = list((tmp_path / "spill").iterdir())
    assert sorted(file.name.rpartition("-")[0] for file in files) == sorted(12 * list(streams))
    tokens = (len(FITTING) + len(HELD_OUT)) * 12
    held = sum(load_file(file)["hidden"].nbytes for file in files)
    assert (
        stream_bytes(plan(settings, torch.float32), tokens, 32, 4) == held == len(streams) * 4 * tokens * 32
    )


@pytest.mark.parametrize(
    ("device", "host"), [(0, math.inf), (20_000, math.inf), (20_000, 30_000), (9_000, 0)]
)
def test_streams_in_several_places_change_no_bit(
    path: Path, tmp_path: Path, device: float, host: float
) -> None:
    """The first batches on the device, then in host memory, then in files. Oracle: the run that has
    all on the device.
    """
    settings = params(("obs", "lsq", "finetune"), **DENSE_TARGET, finetune={"window": 2})
    where = Storage(device, host, tmp_path / "spill")
    assert_same(pruned(path, settings, storage=where), pruned(path, settings))
    taken = Counter(where._places.values())
    assert (taken["device"] > 0, taken["host"] > 0, taken["disk"] > 0) == (
        device > 0,
        host > 0,
        host < math.inf,
    )
    assert taken.total() == 3 * 12 and where.device >= 0 and where.host >= 0


def test_streams_have_the_dtype_of_the_computation(path: Path, tmp_path: Path) -> None:
    """Oracle: bfloat16's two bytes per channel and token, in the files."""
    model, settings = BlockModel(open_checkpoint(path), torch.bfloat16, CPU), params(())
    made, rows = plan(settings, model.checkpoint.dtype), Rows(FITTING, HELD_OUT, 8)
    next(prune(source(model), rows, made, lambda _: None, Storage(0, 0, tmp_path)))
    tokens = (len(FITTING) + len(HELD_OUT)) * 12
    held = sum(load_file(file)["hidden"].nbytes for file in tmp_path.iterdir())
    assert stream_bytes(made, tokens, 32, model.dtype.itemsize) == held == 2 * tokens * 32


def test_without_a_directory_streams_stay_in_memory(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nowhere to put them is no error. Oracle: the working directory."""
    monkeypatch.chdir(tmp_path)
    pruned(path, params(()))
    assert not list(tmp_path.iterdir())


# What is done, and what is not


class Counts:
    """Blocks that a batch was passed through, in order, and sites that were factorised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[int] = []
        self.sites: list[str] = []
        call, one = BlockModel.call, layerwise.factorise

        def counted(model: BlockModel, block: torch.nn.Module, index: int, *rest: Any) -> torch.Tensor:
            self.calls.append(index)
            return call(model, block, index, *rest)

        def factorised(
            gram: torch.Tensor, damping: float, of: DampingOf, where: str, *rest: Any
        ) -> Factorisation:
            self.sites.append(where)
            return one(gram, damping, of, where, *rest)

        monkeypatch.setattr(BlockModel, "call", counted)
        monkeypatch.setattr(layerwise, "factorise", factorised)


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was not to be done")


def chosen(score: str, steps: tuple[str, ...] = (), group: str = "row", **reconstruction: Any) -> Recipe:
    changes = {
        "finetune_channels": LITTLE,
        **reconstruction,
        "finetune": {**LITTLE, **reconstruction.get("finetune", {})},
    }
    return recipe(
        steps, batch_rows=8, selection={"score": score, "group": group, "block": 12}, reconstruction=changes
    )


def with_factorisations(made: Plan) -> Plan:
    """The same masks chosen the long way, through a factorisation of every site."""
    assert isinstance(made.select, Select)
    return replace(
        made, select=Layerwise(made.select.selection, False, made.select.by_site, dtype=made.select.dtype)
    )


def test_magnitude_reads_no_text_and_runs_no_forward_pass(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that would do either is forbidden. Oracle: the largest weights of each matrix,
    sorted; they stay as they are.
    """
    for name in ("embed", "call", "advance"):
        monkeypatch.setattr(BlockModel, name, forbidden)
    monkeypatch.setattr("pipeline_lib.solve.factor.cholesky_in_place", forbidden)
    model, made = model_of(path), plan(chosen("magnitude", group="matrix"), torch.float32)
    assert not made.needs.text
    found = dict(prune(source(model), None, made, lambda _: None))
    assert list(found) == list(range(DEPTH))
    for index, result in found.items():
        dense = model.checkpoint.block(index)
        for matrix in model.checkpoint.architecture.layouts[0].matrices:
            weight, mask = matrix.view(dense[matrix.parameter]), matrix.view(result.masks[matrix.parameter])
            order = weight.abs().flatten().argsort(descending=True)[: weight.numel() // 2]
            assert mask.flatten().nonzero().flatten().tolist() == sorted(order.tolist())
            assert torch.equal(matrix.view(result.tensors[matrix.parameter]), weight * mask)
            facts = {"kind": matrix.kind, "size": weight.numel(), "kept": weight.numel() // 2}
            assert result.facts["matrices"][matrix.label] == facts
        others = dense.keys() - {
            matrix.parameter for matrix in model.checkpoint.architecture.layouts[0].matrices
        }
        assert others
        assert all(torch.equal(result.tensors[name], dense[name]) for name in others)


@pytest.mark.parametrize("score", ["wanda", "obd"])
def test_wanda_and_obd_factorise_nothing(path: Path, score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes through each block, and no Cholesky factorisation at all. Oracle: batches, counted."""
    counts = Counts(monkeypatch)
    monkeypatch.setattr("pipeline_lib.solve.factor.cholesky_in_place", forbidden)
    # nor is a matrix of moments collected
    monkeypatch.setattr("pipeline_lib.stats.moments.MomentSums.add", forbidden)
    found = pruned(path, chosen(score))
    assert counts.sites == []
    # 12 batches of one lane; what comes after the last block is looked at in one
    assert counts.calls == [0] * 24 + [1] * 24 + [2] * 13
    assert all(
        facts.keys() == {"kind", "size", "kept"}
        for result in found.values()
        for facts in result.facts["matrices"].values()
    )


def test_sparsegpt_runs_two_passes_a_block_and_one_factorisation_a_site(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: counts of batches and sites. There are passes for statistics and to advance; after
    the last block, one batch checks that all values are finite.
    """
    counts = Counts(monkeypatch)
    pruned(path, params(("obs",)))
    sites = [site.name for site in open_checkpoint(path).architecture.layouts[0].sites]
    assert len(sites) == 4
    assert counts.sites == [f"layers.{index} {site}" for index in range(DEPTH) for site in sites]
    assert counts.calls == [0] * 24 + [1] * 24 + [2] * 13


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "gpt2"])
@pytest.mark.parametrize(
    ("score", "group", "statistics"),
    [
        ("magnitude", "matrix", "per_block"),
        ("wanda", "row", "per_block"),
        ("wanda", "matrix", "per_site"),
        ("obd", "block", "per_block"),
        ("obd", "row", "per_site"),
    ],
)
def test_masks_are_those_of_the_long_way(
    model_paths: dict[str, Path], family: str, score: str, group: str, statistics: str
) -> None:
    """Oracle: ``prune_matrix`` with a factorisation of the whole second moment; fused and
    transposed matrices too, to the last bit.
    """
    model, settings = model_of(model_paths[family]), chosen(score, group=group, statistics=statistics)
    made, rows = plan(settings, torch.float32), Rows(FITTING, HELD_OUT, 8)
    short, long = (
        dict(prune(source(model), rows, way, lambda _: None)) for way in (made, with_factorisations(made))
    )
    for index, result in short.items():
        assert result.masks.keys() == long[index].masks.keys()
        assert all(torch.equal(mask, long[index].masks[name]) for name, mask in result.masks.items())
        assert all(torch.equal(tensor, long[index].tensors[name]) for name, tensor in result.tensors.items())


@pytest.mark.parametrize("score", ["magnitude", "wanda", "obd"])
@pytest.mark.parametrize(
    ("steps", "how"),
    [
        (("finetune_channels",), {}),
        (("finetune",), {"finetune": {"window": 2, "refresh_epochs": 1, "parts": ["weights", "norms"]}}),
    ],
)
def test_what_is_chosen_can_be_fitted(
    path: Path, score: str, steps: tuple[str, ...], how: dict[str, Any]
) -> None:
    """Including masks that are chosen again. Oracle: the run whose masks were chosen with
    factorisations, bit for bit.
    """
    model, settings = model_of(path), chosen(score, steps, **how)
    made, rows = plan(settings, torch.float32), Rows(FITTING, HELD_OUT, 8)
    short, long = (
        dict(prune(source(model), rows, way, lambda _: None)) for way in (made, with_factorisations(made))
    )
    for index, result in short.items():
        assert result.facts[steps[0]] == long[index].facts[steps[0]]
        assert all(torch.equal(mask, long[index].masks[name]) for name, mask in result.masks.items())
        assert all(torch.equal(tensor, long[index].tensors[name]) for name, tensor in result.tensors.items())
    assert any(result.facts[steps[0]]["epochs"] > 0 for result in short.values())


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
def test_a_matrix_without_a_count_stays_dense(path: Path, score: str) -> None:
    """Oracle: the checkpoint's bits; and masks for the others alone."""
    model = model_of(path)
    table, whole = model.checkpoint.architecture.layouts[0], source(model)
    left_out = [matrix for matrix in table.matrices if matrix.kind in ("q", "down")]
    kept = {place: count for place, count in whole.kept.items() if place[1] not in left_out}
    rows = Rows(FITTING, HELD_OUT, 8)
    for index, result in prune(
        replace(whole, kept=kept), rows, plan(chosen(score), torch.float32), lambda _: None
    ):
        assert result.masks.keys() == {
            matrix.parameter for matrix in table.matrices if matrix not in left_out
        }
        for matrix in left_out:
            assert torch.equal(
                result.tensors[matrix.parameter], model.checkpoint.block(index)[matrix.parameter]
            )


@pytest.mark.parametrize("steps", [("obs",), ("obs", "lsq"), ("obs", "lsq", "finetune")])
def test_a_site_whose_inputs_are_always_zero_is_pruned(tmp_path: Path, steps: tuple[str, ...]) -> None:
    """Such as what follows a dead activation: the masks have their counts, and all is finite."""
    path = make_model(tmp_path / "dead", "llama", 2, seed=3, tokenizer=False)
    weights = load_file(path / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].zero_()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    model = model_of(path)
    wanted = half(model)
    asked = params(steps, lsq={"mask_iterations": 8})
    for index, block in run(model, asked):
        kept = {m.parameter: count for (where, m), count in wanted.items() if where == index}
        assert {name: int(mask.count_nonzero()) for name, mask in block.masks.items()} == kept
        assert all(bool(tensor.isfinite().all()) for tensor in block.tensors.values())


def test_scores_that_are_no_numbers_are_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is NaN under magnitude; inputs that overflow under Wanda. Oracle: the names."""
    dense = model_of(path).checkpoint.block(0)
    dense["mlp.up_proj.weight"] = dense["mlp.up_proj.weight"].clone()
    dense["mlp.up_proj.weight"][1] = float("nan")
    for score, tensors, match in (
        ("magnitude", dense, r"scores of layers\.0\.mlp\.up_proj contain NaN or infinity"),
        (
            "wanda",
            model_of(path).checkpoint.block(0),
            r"second moment of layers\.0 attention_input contains NaN or infinity",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "block", lambda *_, tensors=tensors: dict(tensors))
            model, made = model_of(path), plan(chosen(score), torch.float32)
            if score == "wanda":
                patch.setattr(
                    "pipeline_lib.stats.moments.DiagonalSums.finish",
                    lambda sums: sums.squares.float() * float("inf"),
                )
            with pytest.raises(SparselineError, match=match):
                next(
                    prune(
                        source(model),
                        Rows(FITTING, HELD_OUT, 8) if made.needs.text else None,
                        made,
                        lambda _: None,
                    )
                )


@pytest.mark.parametrize("steps", [("obs",), ("obs", "lsq")])
def test_the_first_of_several_failures_is_told(
    path: Path, steps: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that is NaN, and a later site that cannot be factorised. Oracle: the matrix is
    named, though masks are counted last.
    """
    dense, real = model_of(path).checkpoint.block(0), layerwise.factorise
    dense["self_attn.o_proj.weight"] = dense["self_attn.o_proj.weight"].clone()
    dense["self_attn.o_proj.weight"][1] = float("nan")
    last = open_checkpoint(path).architecture.layouts[0].sites[-1].name

    def factorised(
        gram: torch.Tensor, damping: float, of: DampingOf, where: str, *rest: Any
    ) -> Factorisation:
        return real(gram * float("nan") if where.endswith(last) else gram, damping, of, where, *rest)

    monkeypatch.setattr(layerwise, "factorise", factorised)
    with pytest.raises(SparselineError, match=f"second moment of layers.0 {last} contains NaN or infinity"):
        next(run(model_of(path), params(steps)))
    clean = layerwise.collect
    model = model_of(path)
    before = model.block(0)
    monkeypatch.setattr(layerwise, "collect", lambda model, block, *rest: clean(model, (0, before), *rest))
    monkeypatch.setattr(Checkpoint, "block", lambda *_: dict(dense))
    with pytest.raises(
        SparselineError, match=r"scores of layers\.0\.self_attn\.o_proj contain NaN or infinity"
    ):
        next(run(model, params(steps)))


# Towards the dense stream


def test_streams_that_do_not_differ_yet_change_nothing(path: Path) -> None:
    """Block 0 keeps all: until block 1's first site is pruned both streams are one. Oracle: the run
    that does not look at the dense one.
    """
    table = open_checkpoint(path).architecture.layouts[0]
    own, towards = (
        pruned(path, params(("obs",), statistics="per_site", dense_target=share), 0) for share in (0.0, 1.0)
    )
    first = {matrix.parameter for matrix in table.consumers(table.sites[0].name)}
    dense = open_checkpoint(path).block(0)
    for name in dense:
        assert torch.equal(own[0].tensors[name], dense[name])
        assert torch.equal(towards[0].tensors[name], dense[name])
    assert len(first) == 3
    for parameter in {matrix.parameter for matrix in table.matrices}:
        assert torch.equal(own[1].tensors[parameter], towards[1].tensors[parameter]) == (
            parameter in first
        ), parameter


@pytest.mark.parametrize("steps", [("obs",), ("obs", "lsq")])
def test_aiming_at_the_dense_stream_comes_nearer_to_it(path: Path, steps: tuple[str, ...]) -> None:
    """Oracle: rows that calibration did not see, through the dense and through both pruned models."""
    model = model_of(path)
    dense = passed(model, UNSEEN, {})
    errors = {}
    for share in (0.0, 1.0):
        blocks = pruned(path, params(steps, statistics="per_site", dense_target=share))
        for facts in blocks[1].facts["matrices"].values():
            assert ("lsq_iterations" in facts) == ("lsq" in steps)
            assert facts["layer_error"] <= facts.get("selected_error", facts["layer_error"]) * 1.001
        errors[share] = relative(
            passed(model, UNSEEN, {index: result.tensors for index, result in blocks.items()}), dense
        )
    assert errors[1.0] < errors[0.0]


def test_statistics_site_by_site_see_what_was_pruned_before(path: Path) -> None:
    """Oracle: both ways of collecting agree at a block's first site, to the bit, and nowhere after it."""
    table = open_checkpoint(path).architecture.layouts[0]
    at_once, by_site = (
        pruned(path, params(("obs",), statistics=way), 0) for way in ("per_block", "per_site")
    )
    first = {matrix.parameter for matrix in table.consumers(table.sites[0].name)}
    for parameter in {matrix.parameter for matrix in table.matrices}:
        assert torch.equal(at_once[1].tensors[parameter], by_site[1].tensors[parameter]) == (
            parameter in first
        ), parameter


def inputs_of(
    model: BlockModel, block: torch.nn.Module, index: int, stream: Stream
) -> dict[str, list[torch.Tensor]]:
    """Every site's inputs [tokens, d], batch by batch."""
    sites = model.checkpoint.architecture.layouts[0].sites
    taken: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
    with (
        torch.no_grad(),
        tapped(block, sites, lambda site, x, _: taken[site.name].append(x.reshape(-1, x.shape[-1]))),
    ):
        for hidden in stream.hidden:
            model.call(block, index, hidden)
    return taken


def test_towards_the_dense_stream_as_written_out(path: Path) -> None:
    """Oracle: each site's inputs in both streams by hooks: the dense block's in the dense one, the
    half-pruned block's in the pruned one.
    """
    settings = params(("obs",), statistics="per_site", dense_target=0.7)
    model = model_of(path)
    table, kept = model.checkpoint.architecture.layouts[0], half(model)
    sparse = model.embed(torch.cat([FITTING, HELD_OUT]), 4 * [8, 4] + 4 * [2])
    dense = sparse.copy()
    for index, result in pruned(path, settings).items():
        block, own = model.block(index), {matrix: kept[index, matrix] for matrix in table.matrices}
        expected = Block(table, "here", Transform({}), own, dict(model.checkpoint.block(index)))
        wanted = inputs_of(model, block, index, dense)
        for site in table.sites:
            given = inputs_of(model, model.block(index, expected.tensors), index, sparse)
            lanes = [MomentSums() for _ in range(4)]
            for lane, sums in enumerate(lanes):
                for number in (2 * lane, 2 * lane + 1, 8 + lane):
                    sums.add(*(x[site.name][number].unflatten(0, (-1, 12)) for x in (given, wanted)))
            sums = fold(lanes)
            step = Layerwise(settings.selection, True, dense_target=0.7)
            step.prune_site(expected, site.name, {site.name: sums.finish(beside=True)})
        assert result.facts == expected.facts
        for name, tensor in expected.tensors.items():
            assert torch.equal(result.tensors[name], tensor), f"{index} {name}"
        model.advance(block, index, dense)
        model.advance(model.block(index, expected.tensors), index, sparse)


QUANTISED = {"quantization": {"bits": 4, "group": 8, "refit": []}}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3", "gpt_neox", "mixtral"])
@pytest.mark.parametrize(
    ("steps", "changes"),
    [
        (("obs", "lsq"), {"reconstruction": DENSE_TARGET}),
        (("obs", "finetune"), {"reconstruction": {**DENSE_TARGET, "finetune": LITTLE}, **QUANTISED}),
    ],
)
def test_kept_inputs_change_no_bit(
    tmp_path: Path, family: str, steps: tuple[str, ...], changes: dict[str, Any]
) -> None:
    """Oracle: the run without room for them, which passes the dense block again for each site. Some
    blocks change their inputs in place, and experts have none.
    """
    if family == "mixtral":
        make_checkpoint(tmp_path, family)
    else:
        make_model(tmp_path, family, DEPTH, seed=3, tokenizer=False)
    model, settings = model_of(tmp_path), recipe(steps, **changes)
    rows = Rows(FITTING, HELD_OUT, settings.batch_rows)
    made = plan(settings, model.checkpoint.dtype)
    again, kept = (
        dict(prune(source(model), rows, made, lambda _: None, storage))
        for storage in (Storage(spare=0), Storage())
    )
    assert_same(again, kept)


@pytest.mark.parametrize("fits", [True, False])
def test_kept_inputs_take_one_pass_of_the_dense_block(
    path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    """Oracle: batches, counted. 12 batches pass the pruned block once for each of 4 sites, and once
    to advance; the dense block once for all of it or, if one byte is missing, as often.
    """
    sites = open_checkpoint(path).architecture.layouts[0].sites
    size = 4 * (len(FITTING) + len(HELD_OUT)) * 12 * sum(len(site.index) for site in sites)
    counts = Counts(monkeypatch)
    pruned(path, params(("obs",), **DENSE_TARGET), storage=Storage(spare=size - (not fits)))
    dense = 12 if fits else 60
    # after the last block, one batch of the pruned stream shows whether all is finite
    assert Counter(counts.calls) == {0: 60 + dense, 1: 60 + dense, 2: 48 + 1 + dense}


# Samples that only train

TRAINING = token_rows(20, 12, seed=4)


def with_training(path: Path, settings: Recipe, more: torch.Tensor | None) -> dict[int, Block]:
    model, made = model_of(path), plan(settings, torch.float32)
    rows = Rows(FITTING, HELD_OUT, settings.batch_rows, more)
    return dict(prune(source(model), rows, made, lambda _: None))


def test_without_a_fit_they_are_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the run without them, and as many batches."""
    settings = params(("obs", "lsq"), **DENSE_TARGET)
    counts = Counts(monkeypatch)
    expected = with_training(path, settings, None)
    before = len(counts.calls)
    assert_same(with_training(path, settings, TRAINING), expected)
    assert len(counts.calls) == 2 * before


def test_a_fit_trains_on_them_and_no_statistic_contains_them(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the layer errors of the first block without them; the samples that the fit received."""
    settings = params(("obs", "finetune"), **DENSE_TARGET)
    plain = with_training(path, settings, None)[0]
    given: list[tuple[Pairs, Pairs]] = []

    def seen(sparse: Sparse, fitting: Pairs, held_out: Pairs, how: Any) -> Any:
        given.append((fitting, held_out))
        return fit(sparse, fitting, held_out, how)

    monkeypatch.setattr("pipeline_lib.prune.finetune.fit", seen)
    model, made = model_of(path), plan(settings, torch.float32)
    rows = Rows(FITTING, HELD_OUT, settings.batch_rows, TRAINING)
    first = next(prune(source(model), rows, made, lambda _: None))[1]
    errors = [
        {label: facts["layer_error"] for label, facts in block.facts["matrices"].items()}
        for block in (plain, first)
    ]
    assert errors[0] == errors[1]
    (fitting, held_out) = given[0]
    assert (len(fitting), len(held_out)) == (len(FITTING) + len(TRAINING), len(HELD_OUT))
    assert first.facts["finetune"] != plain.facts["finetune"]
