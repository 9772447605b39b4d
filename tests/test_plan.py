"""The prediction before a run. Oracles: what must not depend on depth, sizes on disk, and the arithmetic of a linear's FLOPs."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_model

from pipeline_lib.models.checkpoint import open_checkpoint
from pipeline_lib.planning.estimate import Work, estimate

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
    channel_epochs=2,
    densities=5,
    gram_budget_bytes=10**9,
)


def test_memory_of_block_wise_stages_does_not_grow_with_depth(tmp_path: Path) -> None:
    shallow, deep = (estimate(open_checkpoint(make_model(tmp_path / str(layers), "llama", layers)), WORK) for layers in (2, 8))
    for stage in ("calibrate", "induce", "prune (plain)", "prune (channel)", "curves"):
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


def test_a_pruned_checkpoint_takes_what_the_source_takes_and_a_bit_per_weight(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", "opt", 2)
    source = (path / "model.safetensors").stat().st_size
    disk = estimate(open_checkpoint(path), WORK)["prune (plain)"].disk_bytes
    assert source * 0.9 < disk < source * 1.1


def test_grams_over_budget_are_not_counted(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "model", "llama", 2))
    stored = estimate(checkpoint, WORK)["calibrate"].disk_bytes
    left_out = estimate(checkpoint, replace(WORK, gram_budget_bytes=0))["calibrate"].disk_bytes
    grams = 2 * 2 * 4 * sum(len(site.index) ** 2 for site in checkpoint.architecture.sites)
    assert stored - left_out == grams
