"""The prediction before a run. Oracles: what must not depend on depth, sizes on disk, and the
arithmetic of a linear's FLOPs.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from project import (
    REMOVED,
    ROOT,
    WANDA,
    build,
    change_params,
    invoke,
    make_workspace,
    read_params,
    recipe,
    run,
    text,
)
from pruned import card, make_pruned
from tiny import make_model

from pipeline_lib.export.export import Variant, export
from pipeline_lib.fit.settings import DistilParams
from pipeline_lib.measure.settings import CurvesParams, SensitivityParams
from pipeline_lib.models.checkpoint import open_checkpoint
from pipeline_lib.planning.estimate import (
    Estimate,
    Work,
    distilling,
    estimate,
    exporting,
    inducing,
    measuring,
    pruning,
)
from pipeline_lib.prune.plan import plan
from pipeline_lib.prune.shapes import Shapes
from pipeline_lib.recipe.settings import Format, InduceParams, Recipe
from pipeline_lib.stats.settings import CalibrateParams

SHIPPED = read_params(ROOT)
CALIBRATE = CalibrateParams(batch_rows=4, median_tokens=64)
SENSITIVITY = SensitivityParams.model_validate(
    SHIPPED["sensitivity"]
    | {"estimator": "hutchinson", "probes": 2, "probes_per_pass": 2, "output_moments": "none"}
)


def work(path: Path, **changes: Any) -> Work:
    """Eight rows of 32 tokens, a quarter held out; ``changes`` of section ``sensitivity``."""
    shapes = Shapes(open_checkpoint(path), 8, 32, CALIBRATE.batch_rows)
    return Work(shapes, 0.25, torch.float32, CALIBRATE, SENSITIVITY.model_copy(update=changes))


def test_memory_of_block_wise_stages_does_not_grow_with_depth(tmp_path: Path) -> None:
    shallow, deep = (work(make_model(tmp_path / str(layers), "llama", layers)) for layers in (2, 8))
    induce, curves = (
        kind.model_validate(SHIPPED[name])
        for kind, name in ((InduceParams, "induce"), (CurvesParams, "curves"))
    )
    for few, many in (
        (estimate(shallow)["calibrate"], estimate(deep)["calibrate"]),
        (inducing(shallow, "induce", induce), inducing(deep, "induce", induce)),
        (measuring(shallow, "curves", curves), measuring(deep, "curves", curves)),
    ):
        assert many.memory_bytes == few.memory_bytes
        assert many.flops == pytest.approx(4 * few.flops)


@pytest.mark.parametrize(("processes", "probes"), [(1, 6), (2, 4), (4, 2)])  # 0 1 2 3, 4 5: four lanes
@pytest.mark.parametrize(("estimator", "copies"), [("fisher", 1), ("hutchinson", 2)])
def test_sensitivity_keeps_the_blocks_inputs_and_no_more(
    tmp_path: Path, estimator: str, copies: int, processes: int, probes: int
) -> None:
    """Six more blocks: their inputs [probes, 1 row, 32 tokens, 32 channels] in float32, with second
    derivatives their tangents too. Of six probes, a process has those of its lanes.
    """
    paths = [make_model(tmp_path / str(n), "llama", n) for n in (2, 8)]

    def needs(path: Path, processes: int) -> Estimate:
        asked = work(path, estimator=estimator, probes=6, probes_per_pass=6)
        return estimate(replace(asked, shapes=replace(asked.shapes, processes=processes)))["sensitivity"]

    shallow, deep = (needs(path, processes) for path in paths)
    assert deep.memory_bytes - shallow.memory_bytes == 6 * copies * 4 * probes * 32 * 32
    assert deep.flops < 4 * shallow.flops
    assert deep.flops == pytest.approx(needs(paths[1], 1).flops * probes / 6)


def test_probing_may_stop_after_its_first_pass(tmp_path: Path) -> None:
    """Of 128 probes, 16 a pass; with an agreement of 1 all are used, and no other stage ends early.
    Time is that of all, in proportion to them.
    """
    path = make_model(tmp_path / "model", "llama", 2)
    many = estimate(work(path, probes=128, probes_per_pass=16))
    assert {name: step.least for name, step in many.items() if step.least < 1} == {"sensitivity": 16 / 128}
    assert estimate(work(path, probes=128, probes_per_pass=16, agreement=1.0))["sensitivity"].least == 1
    # one has no halves
    assert estimate(work(path, probes=128, probes_per_pass=1))["sensitivity"].least == 2 / 128
    assert many["sensitivity"].flops == pytest.approx(64 * estimate(work(path))["sensitivity"].flops)


def test_grams_over_budget_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_model(tmp_path / "model", "llama", 2)
    stored = estimate(work(path))["calibrate"].disk_bytes
    monkeypatch.setenv("SPARSELINE_GRAM_BYTES", "0")
    left_out = estimate(work(path))["calibrate"].disk_bytes
    grams = (
        2 * 2 * 4 * sum(len(site.index) ** 2 for site in open_checkpoint(path).architecture.layouts[0].sites)
    )
    assert stored - left_out == grams


# prune, whose needs hang on the variant's own steps


def needs(
    path: Path,
    steps: tuple[str, ...],
    rows: int = 8,
    length: int = 32,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Estimate:
    """Of the shipped section with these steps and ``changes`` of ``reconstruction``."""
    return needs_of(path, recipe(steps, reconstruction=changes), rows, length, dtype)


def needs_of(
    path: Path, made: Recipe, rows: int = 8, length: int = 32, dtype: torch.dtype = torch.float32
) -> Estimate:
    checkpoint = open_checkpoint(path)
    found = plan(made, checkpoint.dtype)
    return pruning("prune x", found, Shapes(checkpoint, rows, length, made.batch_rows, found.window, dtype))


DENSE_TARGET: dict[str, Any] = {"statistics": "per_site", "dense_target": 1.0}
WAYS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    ((), {}),
    (("obs",), {}),
    (("obs", "finetune_channels"), {}),
    (("obs", "lsq"), DENSE_TARGET),
    (
        ("obs", "lsq", "finetune_channels", "finetune"),
        {**DENSE_TARGET, "finetune": {"window": 2}, "lsq": {"mask_iterations": 10}},
    ),
)


@pytest.mark.parametrize(("steps", "changes"), WAYS)
def test_prune_holds_as_much_at_any_depth_and_takes_time_in_proportion(
    tmp_path: Path, steps: tuple[str, ...], changes: dict[str, Any]
) -> None:
    """Four times as many blocks: the same memory, four times the FLOPs, four times the blocks'
    bytes on disk.
    """
    shallow, deep = (
        needs(make_model(tmp_path / str(layers), "llama", layers), steps, **changes) for layers in (2, 8)
    )
    assert deep.memory_bytes == shallow.memory_bytes
    assert deep.flops == pytest.approx(4 * shallow.flops)
    assert shallow.disk_bytes < deep.disk_bytes < 4 * shallow.disk_bytes  # embeddings and head are there once


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose blocks outweigh the activations of a few tokens."""
    return make_model(tmp_path_factory.mktemp("wide"), "llama", 2, hidden_size=128, intermediate_size=128)


def test_what_is_fitted_is_what_takes_memory_and_time(wide: Path) -> None:
    """Weights bring a gradient and two moments of their own, and masks with a bfloat16 copy; any
    window brings a block; each step adds to the time.
    """

    def own(*steps: str, **changes: Any) -> Estimate:
        return needs(wide, steps, rows=1, length=8, **changes)

    channel, block = own("obs", "finetune_channels"), own("obs", "finetune")
    factors, two = (
        own("obs", "finetune", finetune={"parts": ["factors"]}),
        own("obs", "finetune", finetune={"window": 2}),
    )
    # bytes: Q, O; K, V of two of four heads; gate, up, down
    matrices = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 128)
    assert factors.memory_bytes == channel.memory_bytes
    # small blocks: both with three more lanes
    assert block.memory_bytes - channel.memory_bytes == pytest.approx((23 - 16) / 4 * matrices)
    # and a stream
    assert two.memory_bytes - block.memory_bytes == pytest.approx(
        (23 + 30) / 4 * matrices + 4 * 8 * 128, rel=1e-3
    )
    plain, swept, solved = own(), own("obs"), own("obs", "lsq")
    assert plain.flops < swept.flops < solved.flops
    assert solved.flops < own("obs", "lsq", lsq={"mask_iterations": 10}).flops
    assert solved.flops < own("obs", "lsq", **DENSE_TARGET).flops
    assert swept.flops < own("obs", statistics="per_site").flops
    assert channel.flops < block.flops < own("obs", "finetune_channels", "finetune").flops
    twice = own("obs", "finetune", finetune={"epochs": 16})
    # epochs, passes, FLOPs, tokens, blocks, weights
    assert twice.flops - block.flops == pytest.approx(8 * 4 * 2 * 8 * 2 * matrices / 4)


@pytest.mark.parametrize(
    ("steps", "changes", "streams"),
    [
        (("obs",), {}, 1),
        (("obs", "finetune_channels"), {}, 2),
        (("obs",), DENSE_TARGET, 2),
        (("obs", "finetune"), {"finetune": {"window": 2}}, 3),
        (("obs",), {"finetune": {"window": 2}}, 1),
    ],
)
def test_streams_over_budget_are_not_counted(
    wide: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[str, ...], changes: dict[str, Any], streams: int
) -> None:
    """Twice as many rows: as many more bytes as the streams and the kept inputs have, and once the
    streams are on disk, none. Inputs are kept as far as the streams leave room.
    """
    bytes_of_a_stream = 4 * 256 * 32 * 128  # float32, rows, tokens, channels

    def memory(rows: int, budget: int) -> float:
        monkeypatch.setenv("SPARSELINE_ACTIVATION_BYTES", str(budget))
        return needs(wide, steps, rows, **changes).memory_bytes

    targeted = "dense_target" in changes.get("reconstruction", changes)
    inputs = 4 * targeted  # of sites with as many channels as a stream; one is used at once
    kept = (streams + inputs) * bytes_of_a_stream
    assert memory(512, 10**12) - memory(256, 10**12) == kept - targeted * bytes_of_a_stream
    assert memory(256, kept) == memory(256, 10**12)
    assert memory(256, streams * bytes_of_a_stream - 1) < memory(256, streams * bytes_of_a_stream)
    assert memory(256, kept - 1) < memory(256, kept)
    assert memory(512, 0) == memory(256, 0)


def test_samples_for_training_lengthen_streams_and_fits(wide: Path) -> None:
    """Oracle: their bytes in two streams; the FLOPs of two passes and of the fit."""
    made, checkpoint = recipe(("obs", "finetune")), open_checkpoint(wide)
    found = plan(made, checkpoint.dtype)
    one = Shapes(checkpoint, 256, 32, made.batch_rows)
    plain, more = (pruning("prune x", found, replace(one, training=count)) for count in (0, 512))
    assert more.memory_bytes - plain.memory_bytes == 2 * 4 * 512 * 32 * 128
    assert more.gpu_bytes - plain.gpu_bytes == 2 * 4 * 512 * 32 * 128
    passes = 2 + 4 * made.reconstruction.finetune.epochs
    assert more.flops - plain.flops == pytest.approx(passes * 2 * one.forward * one.blocks)
    how = DistilParams.model_validate(SHIPPED["distil"])
    few, many, less = (
        distilling("distil", how, replace(one, rows=rows, training=count, held_out=share))
        for rows, count, share in ((256, 0, 0.25), (256, 512, 0.25), (768, 0, 64 / 768))
    )
    assert many.memory_bytes - few.memory_bytes == 2 * 4 * 512 * 32 * 128
    assert many.flops == pytest.approx(less.flops)  # as many samples train and judge


def test_streams_weigh_what_the_computing_dtype_weighs(wide: Path) -> None:
    """256 more rows of 32 tokens with 128 channels, in two bytes or in four."""
    for dtype, item in ((torch.bfloat16, 2), (torch.float32, 4)):
        few, many = (needs(wide, ("obs",), rows, dtype=dtype) for rows in (256, 512))
        assert many.memory_bytes - few.memory_bytes == many.gpu_bytes - few.gpu_bytes == item * 256 * 32 * 128


@pytest.mark.parametrize("steps", [(), ("obs", "lsq", "finetune")])
def test_a_pruned_checkpoint_takes_what_the_source_takes_and_a_bit_per_weight(
    tmp_path: Path, steps: tuple[str, ...]
) -> None:
    path = make_model(tmp_path / "model", "opt", 2)
    source = (path / "model.safetensors").stat().st_size
    assert source * 0.9 < needs(path, steps).disk_bytes < source * 1.1


def test_exported_files_take_what_was_predicted(tmp_path: Path) -> None:
    """Oracle: what a bitmask and a dense export leave on disk; headers and other files are what is
    not predicted.
    """
    source = open_checkpoint(make_model(tmp_path / "source", "llama", hidden_size=128, intermediate_size=512))
    make_pruned(tmp_path / "prune", source)
    formats: list[Format] = ["dense", "bitmask"]
    export(source, Variant("mine", "unstructured", tmp_path / "prune"), tmp_path / "export", formats, card)
    written = sum(path.stat().st_size for path in (tmp_path / "export").rglob("*.safetensors"))
    assert exporting(source, "export", formats, 0.5).disk_bytes == pytest.approx(written, rel=0.02)


def test_quantising_takes_the_sweeps_it_makes(wide: Path) -> None:
    """In the sweep itself it is free; after least squares it is one more of R·C² FLOPs; after a
    fit, also passes for its moments and another fit.
    """

    def flops(steps: tuple[str, ...], **quantization: Any) -> float:
        return needs_of(wide, recipe(steps, quantization=quantization)).flops

    # both blocks' matrices, all of 128 inputs
    each = 2 * (2 * 128 * 128**2 + 2 * 64 * 128**2 + 3 * 128 * 128**2)
    assert flops((), bits=4) == flops(())
    assert flops(("obs",), bits=4) == flops(("obs",))
    assert flops(("obs", "lsq"), bits=4) - flops(("obs", "lsq")) == each
    assert flops(("lsq",), bits=4) == flops(("lsq",))
    plain, once, again = (
        flops(("obs", "finetune"), **how)
        for how in ({}, {"bits": 4, "refit": []}, {"bits": 4, "refit": ["scales"]})
    )
    tokens, weights = 8 * 32, 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 128)
    assert again - once == pytest.approx(8 * 4 * 2 * tokens * weights)  # epochs, passes, FLOPs
    assert once - plain > each


# Several processes, of which the one that has most to do is planned


@pytest.mark.parametrize(
    ("processes", "lanes", "products", "by_site", "factorised"),
    # products [R, C] x [C, C]: five of 1 (all but K and V), two of a half; factorised: sites
    [(1, 4, 6, 6, 4), (2, 2, 3, 4, 3), (3, 2, 2, 4, 2), (4, 1, 2, 4, 2), (8, 1, 1, 4, 1)],
)
def test_rows_are_shared_by_lanes_and_matrices_by_cost(
    wide: Path, processes: int, lanes: int, products: int, by_site: int, factorised: int
) -> None:
    """Oracle: dealt by hand."""
    shapes = Shapes(open_checkpoint(wide), 8, 32, 4, processes=processes)
    assert shapes.forward == 2 * shapes.block * 8 * 32 * lanes / 4
    assert shapes.stream(torch.float32) == 4 * 128 * 8 * 32 * lanes / 4
    assert shapes.solving() == (products * 128**3, 3 * factorised * 128**3)
    assert shapes.solving(by_site=True) == (by_site * 128**3, 3 * 4 * 128**3)


def test_more_processes_hold_fewer_hidden_states_and_the_same_block(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,024 rows of 32 tokens with 128 channels; what two processes have is spilt where one's is."""

    def own(processes: int) -> Estimate:
        found = plan(recipe(("obs",)), torch.float32)
        return pruning("prune", found, Shapes(open_checkpoint(wide), 1024, 32, 4, processes=processes))

    monkeypatch.setenv("SPARSELINE_ACTIVATION_BYTES", str(10**12))
    one, two, four = own(1), own(2), own(4)
    stream = 4 * 1024 * 32 * 128
    assert one.memory_bytes - two.memory_bytes == stream / 2
    assert two.memory_bytes - four.memory_bytes == one.gpu_bytes - two.gpu_bytes - stream / 4 == stream / 4
    assert four.flops < two.flops < one.flops < 4 * four.flops
    monkeypatch.setenv("SPARSELINE_ACTIVATION_BYTES", str(stream - 1))
    assert own(1).disk_bytes == own(2).disk_bytes == one.disk_bytes + stream
    assert own(1).memory_bytes == own(2).memory_bytes


# evaluate and tasks, which hold the whole model

VOCABULARY = 64000  # the logits of a few rows outweigh a tiny model and the libraries
PEAK = """
import contextlib, importlib, pathlib, sys
stage, *arguments = sys.argv[1:]
with contextlib.redirect_stdout(sys.stderr):
    importlib.import_module(f"stages.{stage}").main.main(arguments, standalone_mode=False)
status = pathlib.Path("/proc/self/status").read_text().splitlines()
print("peak", 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1]))
"""


def planned(output: str) -> dict[str, float]:
    """Stage -> memory [bytes], from what `make plan` prints."""
    units = {"MB": 1e6, "GB": 1e9}
    rows = re.findall(r"^(\w+(?: \w+)?) +\d+ +([\d.]+) ([MG]B)", output, re.MULTILINE)
    return {stage: float(amount) * units[unit] for stage, amount, unit in rows}


def test_what_evaluate_and_tasks_take_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the kernel's high-water mark of each stage. Beyond the libraries, the logits are
    nearly all of it.
    """
    tasks: dict[str, Any] = {"tasks": {"batch_rows": 4}, "presets": {"embedded": {"limit": 3}}}
    project = make_workspace(
        tmp_path / "project", model={"vocab_size": VOCABULARY}, evaluate={"batch_rows": 4}, **tasks
    )
    monkeypatch.chdir(project)
    (project / "data/texts/test.txt").write_text(text(5, 1500), encoding="utf-8")
    change_params(project, "texts.test", read_params(project)["texts"]["test"] | {"rows": 4, "length": 512})
    build(
        "prepare",
        "text test",
        "text validation",
        "text calibration",
        "allocate wanda",
        "prune wanda",
        "distil wanda",
    )
    foreseen = planned(invoke("plan").output)
    for name, stage, model in (
        ("evaluate dense", "evaluate", "dense"),
        ("evaluate", "evaluate", "wanda"),
        ("tasks embedded", "tasks", "dense"),
    ):
        took = int(
            re.findall(r"^peak (\d+)", run(project, "python", "-c", PEAK, stage, model), re.MULTILINE)[0]
        )
        assert 0.8 * took < foreseen[name] < 1.3 * took, (name, took, foreseen)


def test_what_distil_takes_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the kernel's high-water mark. Beyond the libraries the weights that move, Adam's
    averages and the logits are nearly all of it.
    """
    shape = {"vocab_size": 16000, "hidden_size": 512, "intermediate_size": 2048, "layers": 6}
    variants = {"wanda": {**WANDA, "distil": {"compute_dtype": "float32"}}}
    project = make_workspace(tmp_path / "project", model=shape, variants=variants, distil={"epochs": 1})
    monkeypatch.chdir(project)
    build("prepare", "text calibration", "curves wanda", "allocate wanda", "induce wanda", "prune wanda")
    foreseen = planned(invoke("plan").output)["distil wanda"]
    took = int(
        re.findall(r"^peak (\d+)", run(project, "python", "-c", PEAK, "distil", "wanda"), re.MULTILINE)[0]
    )
    assert 0.8 * took < foreseen < 1.3 * took, (took, foreseen)


def test_training_weighs_what_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six more blocks: in float32 with two averages and a bit of mask for each weight, and the
    inputs of the blocks. With room for them, their graphs, too. Oracle: by hand.
    """
    monkeypatch.setenv("SPARSELINE_ACTIVATION_BYTES", "0")
    how = DistilParams.model_validate(SHIPPED["distil"])
    shallow, deep = (work(make_model(tmp_path / str(layers), "llama", layers)).shapes for layers in (4, 10))
    for kind, each in (("float32", 12 + 1 / 8), ("bfloat16", 8 + 1 / 8)):
        few, many = (
            distilling("distil", how.model_copy(update={"state_dtype": kind}), one) for one in (shallow, deep)
        )
        assert many.memory_bytes - few.memory_bytes == pytest.approx(
            6 * (each * shallow.block + 4 * how.batch_rows * 32 * 32)
        )
    few, many = (distilling("distil", how, one, rounded=True) for one in (shallow, deep))
    stored = shallow.checkpoint.dtype.itemsize + 2  # and a whole number; the scales weigh little
    assert many.memory_bytes - few.memory_bytes == pytest.approx(
        6 * (stored * shallow.block + 4 * how.batch_rows * 32 * 32)
    )
    how = how.model_copy(update={"compute_dtype": "float32"})
    graph = deep.graph(how.batch_rows, False)
    again = distilling("distil", how, deep)
    monkeypatch.delenv("SPARSELINE_ACTIVATION_BYTES")
    few, many = (distilling("distil", how, one) for one in (shallow, deep))
    assert many.memory_bytes - few.memory_bytes == pytest.approx(
        6 * ((12 + 1 / 8) * shallow.block + 4 * how.batch_rows * 32 * 32 + graph)
    )
    assert many.flops < again.flops


# The command


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(make_workspace(tmp_path / "project"))
    return Path()


def test_every_run_of_every_preset_is_planned(project: Path) -> None:
    """Two variants and the dense model are evaluated; the preset is measured on one variant and the
    dense model.
    """
    output = invoke("plan").output
    runs = {name: int(count) for name, count in re.findall(r"^(\w+(?: \w+)?) +(\d+) ", output, re.MULTILINE)}
    assert (runs["evaluate dense"], runs["evaluate"], runs["tasks embedded"]) == (1, 2, 2)
    assert {
        "prune wanda",
        "prune sparseline",
        "distil sparseline",
        "induce sparseline",
        "curves sparseline",
        "export sparseline",
    } <= set(runs)
    assert not {"induce wanda", "curves wanda", "distil wanda", "export wanda"} & set(runs)


def test_a_gpu_that_is_too_small_is_told(project: Path) -> None:
    """Of stages that hold more than there is, with what to lower; a large one is too small for
    none. Oracle: the column of the table.
    """
    large, small = (
        invoke("plan", "--device", "cuda", "--gpu-memory", memory).output for memory in ("24e9", "0.6e9")
    )
    assert "does not fit" not in large and "on the GPU" in large
    sizes = {
        name: gpu != "0.0 MB"
        for name, gpu in re.findall(
            r"^(\w+(?: \w+)?) +\d+ +[\d.]+ [MG]B +([\d.]+ [MG]B)", small, re.MULTILINE
        )
    }
    told = set(re.findall(r"^(\w+(?: \w+)?) does not fit into the GPU's 0.60 GB: ", small, re.MULTILINE))
    assert told == {name for name, some in sizes.items() if some} >= {"calibrate", "prune wanda", "evaluate"}
    assert "Lower prune.batch_rows or SPARSELINE_GPU_ACTIVATION_BYTES, or set model.compute_dtype:" in small
    assert "Lower evaluate.batch_rows" in small


def test_hidden_states_beyond_a_gpus_budget_are_the_hosts(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the GPU holds falls with the budget, and the host's memory grows by no more."""

    def needs(budget: str) -> tuple[float, float]:
        monkeypatch.setenv("SPARSELINE_GPU_ACTIVATION_BYTES", budget)
        output = invoke("plan", "--device", "cuda", "--gpu-memory", "24e9").output
        (found,) = re.findall(r"^prune sparseline +\d+ +([\d.]+) GB +([\d.]+) MB", output, re.MULTILINE)
        return float(found[0]), float(found[1])

    change_params(
        project,
        "texts.calibration",
        read_params(project)["texts"]["calibration"] | {"rows": 1024, "length": 128},
    )
    (host, gpu), (more, less) = needs("10000000000"), needs("0")
    assert less < gpu and more > host


def test_processes_are_planned_as_one_of_them_and_together(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for as an option or a setting. What one process does alone is counted once; the speed that is
    given stands in the place of this machine's.
    """

    change_params(project, "sensitivity.probes_per_pass", 4)  # of two, one process would have both

    def said(*options: str) -> str:
        return invoke("plan", "--speed", "1e6", *options).output

    one, two = said(), said("--processes", "2")
    monkeypatch.setenv("SPARSELINE_PROCESSES", "2")
    assert said() == two and said("--processes", "1") == one
    assert "1 process with 0 GFLOP/s" in one and "2 processes with 0 GFLOP/s each" in two
    peak, together = re.findall(r"peak memory ([\d.]+) GB \(per process; ([\d.]+) GB for all", two)[0]
    assert float(together) == pytest.approx(2 * float(peak), abs=0.02)
    assert "for all processes" not in one and "between processes" in two and "between processes" not in one

    def longest(output: str) -> dict[str, float]:
        units = {"s": 1, "min": 60, "h": 3600}
        rows = re.findall(r"^(\w+(?: \w+)?) +\d+ .*?([\d.]+) (s|min|h)$", output, re.MULTILINE)
        return {stage: float(time) * units[unit] for stage, time, unit in rows}

    alone, shared = longest(one), longest(two)
    assert alone["export sparseline"] == shared["export sparseline"]
    for stage in ("calibrate", "sensitivity", "prune wanda", "prune sparseline", "evaluate"):
        assert shared[stage] < 0.75 * alone[stage], stage


def test_what_is_not_known_of_a_gpu_is_asked_for(project: Path) -> None:
    result = invoke("plan", "--device", "cuda")
    assert result.exit_code == 2
    assert (
        "cuda is not a device of this machine; say what memory it has, for instance --gpu-memory 24e9."
        in result.output
    )


def test_what_no_variant_needs_is_not_planned(project: Path) -> None:
    """Wanda alone reads no sensitivities, no curves and no factors. Oracle: the stages that do
    something for it.
    """
    change_params(project, "variants.sparseline", REMOVED)
    assert set(planned(invoke("plan").output)) == {"prepare", "prune wanda", "evaluate dense", "evaluate"}


def test_a_text_that_is_taken_whole_is_named(project: Path) -> None:
    change_params(project, "texts.test.rows", None)
    output = invoke("plan").output
    assert "evaluate takes the text test whole: of its rows one batch is counted here." in output
    assert {"evaluate dense", "evaluate"} <= set(planned(output))


def test_sections_may_be_empty(project: Path) -> None:
    for section in ("variants", "presets"):
        change_params(project, section, None)
    result = invoke("plan")
    assert result.exit_code == 0, result.output
    assert set(planned(result.output)) == {"prepare", "evaluate dense"}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "variants.wanda.tasks",
            ["gone"],
            (
                "variants.wanda.tasks names 'gone', which is not a preset; presets: embedded, induction,"
                " sensitivity."
            ),
        ),
        ("presets.embedded.names", ["next_lime"], "No task is called 'next_lime'"),
        ("variants", ["wanda"], "variants = ['wanda'] is not a mapping"),
        ("texts", {}, "texts must hold exactly one text with use: calibrate, not 0"),
    ],
)
def test_wrong_names_are_told(
    project: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, said: str
) -> None:
    import lm_eval.tasks

    everything = lm_eval.tasks.TaskManager

    def quick(include_path: Any, include_defaults: bool) -> Any:
        """Without lm-eval's own tasks: there are thousands, and their index takes ten seconds."""
        return everything(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", quick)
    change_params(project, key, value)
    result = invoke("plan")
    assert result.exit_code == 2 and said in result.output, result.output


def test_tasks_whose_data_is_not_here_are_named(project: Path) -> None:
    """The rest is planned; that they are missing is said."""
    (project / "data/tasks/corrupted.jsonl").unlink()
    result = invoke("plan")
    assert result.exit_code == 0 and "evaluate" in planned(result.output)
    assert "tasks embedded are not counted. The data of tasks corrupted cannot be read" in result.output
