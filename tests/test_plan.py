"""The prediction before a run. Oracles: what must not depend on depth, sizes on disk, and the arithmetic of a linear's FLOPs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from project import prune_params
from pruned import card, make_pruned
from tiny import make_model

from pipeline_lib.export.export import export
from pipeline_lib.export.settings import ExportParams
from pipeline_lib.models.checkpoint import open_checkpoint
from pipeline_lib.planning.estimate import Estimate, Work, estimate, exporting, pruning

WORK = Work(
    rows=8,
    length=32,
    batch_rows=4,
    evaluation_tokens=512,
    second_order=True,
    probes=2,
    agreement=0.9,
    rows_per_probe=1,
    probes_per_pass=2,
    full_moments=False,
    moment_budget_bytes=10**9,
    induction_steps=10,
    densities=5,
    gram_budget_bytes=10**9,
    activation_bytes=4,
)


def test_memory_of_block_wise_stages_does_not_grow_with_depth(tmp_path: Path) -> None:
    shallow, deep = (estimate(open_checkpoint(make_model(tmp_path / str(layers), "llama", layers)), WORK) for layers in (2, 8))
    for stage in ("calibrate", "induce", "curves"):
        assert deep[stage].memory_bytes == shallow[stage].memory_bytes
        assert deep[stage].flops == pytest.approx(4 * shallow[stage].flops)
    assert deep["evaluate"].memory_bytes > shallow["evaluate"].memory_bytes


@pytest.mark.parametrize(("second_order", "copies"), [(False, 1), (True, 2)])
def test_sensitivity_keeps_the_blocks_inputs_and_no_more(tmp_path: Path, second_order: bool, copies: int) -> None:
    """Six more blocks: their inputs [2 probes, 1 row, 32 tokens, 32 channels] in float32, with second derivatives their tangents too."""
    work = replace(WORK, second_order=second_order)
    shallow, deep = (estimate(open_checkpoint(make_model(tmp_path / str(n), "llama", n)), work)["sensitivity"] for n in (2, 8))
    assert deep.memory_bytes - shallow.memory_bytes == 6 * copies * 4 * 2 * 32 * 32
    assert deep.flops < 4 * shallow.flops


def test_probing_may_stop_after_its_first_pass(tmp_path: Path) -> None:
    """Of 128 probes, 16 a pass; with an agreement of 1 all are used, and no other stage ends early. Time is that of all, in proportion to them."""
    checkpoint = open_checkpoint(make_model(tmp_path / "model", "llama", 2))
    many = estimate(checkpoint, replace(WORK, probes=128, probes_per_pass=16))
    assert {name: step.least for name, step in many.items() if step.least < 1} == {"sensitivity": 16 / 128}
    assert estimate(checkpoint, replace(WORK, probes=128, probes_per_pass=16, agreement=1.0))["sensitivity"].least == 1
    assert estimate(checkpoint, replace(WORK, probes=128, probes_per_pass=1))["sensitivity"].least == 2 / 128  # one has no halves
    assert many["sensitivity"].flops == pytest.approx(64 * estimate(checkpoint, WORK)["sensitivity"].flops)


def test_grams_over_budget_are_not_counted(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "model", "llama", 2))
    stored = estimate(checkpoint, WORK)["calibrate"].disk_bytes
    left_out = estimate(checkpoint, replace(WORK, gram_budget_bytes=0))["calibrate"].disk_bytes
    grams = 2 * 2 * 4 * sum(len(site.index) ** 2 for site in checkpoint.architecture.sites)
    assert stored - left_out == grams


# prune, whose needs hang on the variant's own steps


def needs(path: Path, steps: tuple[str, ...], rows: int = 8, length: int = 32, budget: int = 10**12, **changes: Any) -> Estimate:
    """Of the shipped section with these steps and ``changes`` of ``reconstruction``."""
    params = prune_params(steps, reconstruction=changes, activation_budget_bytes=budget)
    return pruning(open_checkpoint(path), "prune x", params, rows, length, 4)


TOWARDS_DENSE: dict[str, Any] = {"collect": "site", "towards_dense": 1.0}
WAYS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    ((), {}),
    (("obs",), {}),
    (("obs", "channel"), {}),
    (("obs", "lsq"), TOWARDS_DENSE),
    (("obs", "lsq", "channel", "block"), {**TOWARDS_DENSE, "block": {"window": 2}, "lsq": {"mask_iterations": 10}}),
)


@pytest.mark.parametrize(("steps", "changes"), WAYS)
def test_prune_holds_as_much_at_any_depth_and_takes_time_in_proportion(
    tmp_path: Path, steps: tuple[str, ...], changes: dict[str, Any]
) -> None:
    """Four times as many blocks: the same memory, four times the FLOPs, four times the blocks' bytes on disk."""
    shallow, deep = (needs(make_model(tmp_path / str(layers), "llama", layers), steps, **changes) for layers in (2, 8))
    assert deep.memory_bytes == shallow.memory_bytes
    assert deep.flops == pytest.approx(4 * shallow.flops)
    assert shallow.disk_bytes < deep.disk_bytes < 4 * shallow.disk_bytes  # embeddings and head are there once


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose blocks outweigh the activations of a few tokens."""
    return make_model(tmp_path_factory.mktemp("wide"), "llama", 2, hidden_size=128, intermediate_size=128)


def test_what_is_fitted_is_what_takes_memory_and_time(wide: Path) -> None:
    """Weights bring a gradient and two moments of their own, and masks with a bfloat16 copy; any window brings a block; each step adds to the time."""

    def own(*steps: str, **changes: Any) -> Estimate:
        return needs(wide, steps, rows=1, length=8, **changes)

    channel, block = own("obs", "channel"), own("obs", "block")
    factors, two = own("obs", "block", block={"parts": ["factors"]}), own("obs", "block", block={"window": 2})
    matrices = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 128)  # bytes: Q, O; K, V of two of four heads; gate, up, down
    assert factors.memory_bytes == channel.memory_bytes
    assert block.memory_bytes - channel.memory_bytes == pytest.approx((23 - 16) / 4 * matrices)
    assert two.memory_bytes - block.memory_bytes == pytest.approx(23 / 4 * matrices + 4 * 8 * 128, rel=1e-3)  # and a stream
    plain, swept, solved = own(), own("obs"), own("obs", "lsq")
    assert plain.flops < swept.flops < solved.flops
    assert solved.flops < own("obs", "lsq", lsq={"mask_iterations": 10}).flops
    assert solved.flops < own("obs", "lsq", **TOWARDS_DENSE).flops
    assert swept.flops < own("obs", collect="site").flops
    assert channel.flops < block.flops < own("obs", "channel", "block").flops
    twice = own("obs", "block", block={"epochs": 16})
    assert twice.flops - block.flops == pytest.approx(8 * 4 * 2 * 8 * 2 * matrices / 4)  # epochs, passes, FLOPs, tokens, blocks, weights


@pytest.mark.parametrize(
    ("steps", "changes", "streams"),
    [
        (("obs",), {}, 1),
        (("obs", "channel"), {}, 2),
        (("obs",), TOWARDS_DENSE, 2),
        (("obs", "block"), {"block": {"window": 2}}, 3),
        (("obs",), {"block": {"window": 2}}, 1),
    ],
)
def test_streams_over_budget_are_not_counted(wide: Path, steps: tuple[str, ...], changes: dict[str, Any], streams: int) -> None:
    """Twice as many rows: as many more bytes as the streams have, and once they are on disk, none."""
    bytes_of_a_stream = 4 * 256 * 32 * 128  # float32, rows, tokens, channels

    def memory(rows: int, budget: int) -> float:
        return needs(wide, steps, rows, budget=budget, **changes).memory_bytes

    assert memory(512, 10**12) - memory(256, 10**12) == streams * bytes_of_a_stream
    assert memory(256, streams * bytes_of_a_stream) == memory(256, 10**12)
    assert memory(256, streams * bytes_of_a_stream - 1) < memory(256, 10**12)
    assert memory(512, 0) == memory(256, 0)


def test_streams_take_the_bytes_of_the_computing_dtype(wide: Path) -> None:
    """Half of float32's in bfloat16, in memory and against the budget."""
    params, checkpoint = prune_params(("obs",), activation_budget_bytes=2 * 256 * 32 * 128), open_checkpoint(wide)
    narrow, wider = (pruning(checkpoint, "x", params, 256, 32, size) for size in (2, 4))
    assert wider.disk_bytes - narrow.disk_bytes == 4 * 256 * 32 * 128  # over the budget: a file
    streams = [estimate(checkpoint, replace(WORK, rows=256, activation_bytes=size))["calibrate"].memory_bytes for size in (2, 4)]
    assert streams[1] - streams[0] == 2 * 256 * 32 * 128


@pytest.mark.parametrize("steps", [(), ("obs", "lsq", "block")])
def test_a_pruned_checkpoint_takes_what_the_source_takes_and_a_bit_per_weight(tmp_path: Path, steps: tuple[str, ...]) -> None:
    path = make_model(tmp_path / "model", "opt", 2)
    source = (path / "model.safetensors").stat().st_size
    assert source * 0.9 < needs(path, steps).disk_bytes < source * 1.1


def test_exported_files_take_what_was_predicted(tmp_path: Path) -> None:
    """Oracle: what a bitmask and a dense export leave on disk; headers and other files are what is not predicted."""
    source = open_checkpoint(make_model(tmp_path / "source", "llama", hidden_size=128, intermediate_size=512))
    make_pruned(tmp_path / "prune", source)
    formats = ExportParams(formats=["dense", "bitmask"])
    export(source, tmp_path / "prune", tmp_path / "export", formats, "unstructured", "mine", card)
    written = sum(path.stat().st_size for path in (tmp_path / "export").rglob("*.safetensors"))
    assert exporting(source, "export", formats.formats, 0.5).disk_bytes == pytest.approx(written, rel=0.02)


def test_quantising_takes_the_sweeps_it_makes(wide: Path) -> None:
    """In the sweep itself it is free; after least squares it is one more of R·C² FLOPs; after a fit, also passes for its moments and another fit."""

    def flops(steps: tuple[str, ...], **quantization: Any) -> float:
        return pruning(open_checkpoint(wide), "x", prune_params(steps, quantization=quantization), 8, 32, 4).flops

    each = 2 * (2 * 128 * 128**2 + 2 * 64 * 128**2 + 3 * 128 * 128**2)  # both blocks' matrices, all of 128 inputs
    assert flops((), bits=4) == flops(())
    assert flops(("obs",), bits=4) == flops(("obs",))
    assert flops(("obs", "lsq"), bits=4) - flops(("obs", "lsq")) == each
    assert flops(("lsq",), bits=4) == flops(("lsq",))
    plain, once, again = (flops(("obs", "block"), **how) for how in ({}, {"bits": 4, "refit": []}, {"bits": 4, "refit": ["scales"]}))
    tokens, weights = 8 * 32, 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 128)
    assert again - once == pytest.approx(8 * 4 * 2 * tokens * weights)  # epochs, passes, FLOPs
    assert once - plain > each
