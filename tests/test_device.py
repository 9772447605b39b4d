"""The device of the work, and the transfers that wait for it. Oracles: the same results on the CPU,
bit for bit; operations that the device refuses; counts of reads and operations.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_checkpoint
from elsewhere import DEVICE, Elsewhere, There
from project import build, load_artifact, make_workspace, merge, recipe
from tiny import make_model, token_rows

from pipeline_lib.core import artifacts
from pipeline_lib.fit.settings import SpectralParams
from pipeline_lib.induce.gate import Gate
from pipeline_lib.induce.induce import Outcome, induce_block
from pipeline_lib.measure.curves import measure
from pipeline_lib.measure.settings import CurvesParams
from pipeline_lib.models import products
from pipeline_lib.models.checkpoint import open_checkpoint
from pipeline_lib.models.stream import BlockModel
from pipeline_lib.models.transform import Transform
from pipeline_lib.prune.plan import plan
from pipeline_lib.prune.run import Rows, Source, prune
from pipeline_lib.prune.window import Block
from pipeline_lib.recipe.settings import InduceParams, Recipe
from pipeline_lib.stats.dense import DenseBlock
from pipeline_lib.stats.moments import Accumulator, DiagonalSums, MomentSums
from pipeline_lib.stats.settings import CalibrateParams
from pipeline_lib.stats.walk import walk

FITTING, HELD_OUT = token_rows(16, 12, seed=1), token_rows(8, 12, seed=2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("device"), "llama", 2, seed=3, tokenizer=False)


@pytest.fixture(autouse=True)
def what_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that it does not compute on it has no autocast (here nothing is computed in
    another dtype), no fused Adam, and no memory.
    """
    found = products._storage
    monkeypatch.setattr(
        products, "_storage", lambda tensor: found(tensor.here if isinstance(tensor, There) else tensor)
    )
    real, adam = torch.autocast, torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, **named: adam(*args, **named | {"fused": False}))
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, *args, **named: nullcontext() if kind == DEVICE.type else real(kind, *args, **named),
    )


def model_of(path: Path) -> BlockModel:
    return BlockModel(open_checkpoint(path), torch.float32, torch.device("cpu"))


def pruned(model: BlockModel, settings: Recipe) -> Iterator[tuple[int, Block]]:
    layouts, checkpoint = model.checkpoint.architecture.layouts, model.checkpoint
    shapes = {
        (i, m): checkpoint.matrix_shape(i, m) for i, layout in enumerate(layouts) for m in layout.matrices
    }
    kept = {place: rows * columns // 2 for place, (rows, columns) in shapes.items()}
    source = Source(model, [Transform({})] * len(layouts), kept)
    return prune(
        source, Rows(FITTING, HELD_OUT, settings.batch_rows), plan(settings, checkpoint.dtype), lambda _: None
    )


def here(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor of the device holds."""
    assert isinstance(tensor, There)
    return tensor.here


def waits(device: Elsewhere, *others: str) -> Counter[str]:
    """What waited for the device, but for these files."""
    return Counter({line: count for line, count in device.reads.items() if not line.startswith(others)})


FEW: dict[str, Any] = {"iterations": 3}  # each asks whether it is the last
# from a small ρ rounding decides where the search goes
LSQ: dict[str, Any] = {"lsq": {"mask_iterations": 6, "mask_penalty": 9.0, **FEW}}
LITTLE: dict[str, Any] = {"epochs": 2, "batch_rows": 4, "compute_dtype": "float32"}
# Steps, what else the recipe says, and how often a block of seven matrices at four sites may wait
# for the device.
RECIPES: dict[str, tuple[tuple[str, ...], dict[str, Any], int]] = {
    "wanda": ((), {"selection": {"score": "wanda"}}, 10),
    "magnitude": ((), {"selection": {"score": "magnitude"}}, 10),
    "sparsegpt": (("obs",), {}, 20),
    "2:4": (("obs",), {"selection": {"pattern": "2:4"}}, 20),
    "rose": (("obs",), {"reconstruction": {"reorder": 0.0}}, 64),
    "fast": (("obs", "lsq"), {"reconstruction": LSQ}, 72),
    "dense target": (
        ("obs", "lsq"),
        {"reconstruction": {**LSQ, "statistics": "per_site", "dense_target": 0.5}},
        74,
    ),
    "finetune": (("obs", "finetune"), {"reconstruction": {"finetune": LITTLE}}, 30),
    "quantised": (
        ("obs", "lsq"),
        {"quantization": {"bits": 4, "group": 16}, "reconstruction": {"lsq": FEW}},
        52,
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_pruning_on_a_device(path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Oracles: the same on the CPU, to rounding; what the device refuses; and how often a block
    waits for it.
    """
    # so that both search masks in bfloat16
    monkeypatch.setattr("pipeline_lib.core.products.bfloat16_is_faster", lambda: True)
    steps, changes, most = RECIPES[name]
    settings = recipe(steps, batch_rows=4, **merge({"selection": {"block": 16}}, changes))
    expected = dict(pruned(model_of(path), settings))
    model = model_of(path)
    model.device = DEVICE
    with Elsewhere() as device:
        blocks = pruned(model, settings)
        found = {}
        for index in range(2):
            before = waits(device)
            found[index] = next(blocks)[1]
            once = waits(device) - before
            # on the way to the first block the rows are embedded
            assert index == 0 or once.total() <= most, once
    for index, block in found.items():
        for label, facts in block.facts["matrices"].items():
            for key, value in expected[index].facts["matrices"][label].items():
                apart = {"mask_swapped": {"abs": 0.02}, "lsq_iterations": {"abs": 2}}.get(key, {"rel": 0.05})
                assert facts[key] == (value if isinstance(value, str) else pytest.approx(value, **apart))
        same = [
            here(block.tensors[name]) == tensor
            for name, tensor in expected[index].tensors.items()
            if name in block.masks
        ]
        assert sum(int(one.sum()) for one in same) >= 0.4 * sum(one.numel() for one in same)
        turned = 0.08 if "lsq" in steps else 0.02  # where rounding decides, what comes after follows
        assert all(
            int((block.masks[name] != mask).sum()) <= turned * mask.numel()
            for name, mask in expected[index].masks.items()
        )


def test_the_device_refuses_what_lies_on_the_cpu() -> None:
    """By hand, so that the tests above can fail."""
    here = torch.ones(2, 2)
    with Elsewhere() as device:
        there = here.to(DEVICE)
        for operation in (torch.mm, torch.add, torch.where):
            with pytest.raises(RuntimeError, match="both places"):
                operation(*((there > 0,) if operation is torch.where else ()), there, here)
        assert (there @ there).tolist() == [[2, 2], [2, 2]]
        assert not (there + 1 > 3).any()
        assert there[torch.tensor([0])].cpu().equal(torch.ones(1, 2))
        assert torch.zeros(3, device=DEVICE).add_(1).sum() == 3
        there[there > 0] = 0
    assert sum(device.reads.values()) == 5


# The dense model: statistics, curves, induction

SELECTION = recipe(("obs",), selection={"block": 16}).selection
CALIBRATE = CalibrateParams(batch_rows=2, median_tokens=50)


def walked(path: Path, device: torch.device) -> list[tuple[BlockModel, DenseBlock]]:
    """Every block with its statistics, fitting and held-out."""
    model = model_of(path)
    model.device = device
    entry, found = model.checkpoint.architecture, []
    for index, sites in walk(model, FITTING, HELD_OUT, CALIBRATE, grams=True):
        tensors = {name: tensor.to(device) for name, tensor in model.checkpoint.block(index).items()}
        found.append((model, DenseBlock(entry.layouts[index], f"block {index}", tensors, sites)))
    return found


def test_statistics_on_a_device(path: Path) -> None:
    """Oracles: those of the CPU; per block one wait, whatever the batches."""
    expected = walked(path, torch.device("cpu"))
    with Elsewhere() as device:
        found = walked(path, DEVICE)
    for (_, mine), (_, theirs) in zip(found, expected, strict=True):
        for name, statistics in theirs.statistics.items():
            own = mine.statistics[name].tensors("")
            assert own.keys() == statistics.tensors("").keys()
            for key, tensor in statistics.tensors("").items():
                torch.testing.assert_close(here(own[key]), tensor, rtol=1e-4, atol=1e-5)
    assert {line.partition(":")[0]: count for line, count in device.reads.items()} == {
        "models/stream.py": len(found)
    }


def test_experts_on_a_device(tmp_path: Path) -> None:
    """Statistics, curves and pruning of experts, which get tokens and weights of their own. Oracle:
    the same on the CPU.
    """
    made, how = (
        make_checkpoint(tmp_path / "experts", "mixtral"),
        CurvesParams(densities=[0.5], outlier_factor=3.0),
    )
    settings = recipe(("obs",), batch_rows=4, selection={"block": 16})
    model, away = model_of(made), model_of(made)
    away.device = DEVICE
    (_, dense), *_ = walked(made, model.device)
    expected = (
        measure(dense, dense.layout.matrices, {}, SELECTION, True, how),
        next(pruned(model, settings))[1].facts["matrices"],
    )
    with Elsewhere():
        (_, block), *_ = walked(made, DEVICE)
        found = (
            measure(block, dense.layout.matrices, {}, SELECTION, True, how),
            next(pruned(away, settings))[1].facts["matrices"],
        )
    assert found[0].keys() == expected[0].keys()
    for label, facts in expected[0].items():
        assert found[0][label]["curve"]["layer"][0] == pytest.approx(facts["curve"]["layer"][0], rel=1e-3)
        assert found[1][label]["layer_error"] == pytest.approx(expected[1][label]["layer_error"], rel=0.05)


@pytest.mark.parametrize("full", [True, False])
def test_curves_on_a_device(path: Path, full: bool) -> None:
    """Oracles: the results of the CPU; two waits more than the factorisations need."""
    how = CurvesParams(densities=[0.3, 0.6], outlier_factor=3.0)
    (_, dense), *_ = walked(path, torch.device("cpu"))
    included = dense.layout.matrices
    unit = {m.label: torch.ones(len(m.view(dense.tensors[m.parameter]))) for m in included}
    moments = {label: one.diag() if full else one for label, one in unit.items()}
    expected = measure(dense, included, moments, SELECTION, True, how)
    with Elsewhere() as device:
        (_, away), *_ = walked(path, DEVICE)
        device.reads.clear()
        found = measure(away, included, moments, SELECTION, True, how)
    for label, facts in expected.items():
        for key in ("frobenius", "layer", "kronecker"):
            assert found[label]["curve"][key] == pytest.approx(facts["curve"][key], rel=1e-2)
        assert (found[label]["outliers"], found[label]["median"]) == pytest.approx(
            (facts["outliers"], facts["median"]), rel=1e-3
        )
    assert waits(device, "solve/factor.py").total() == 2


@pytest.mark.parametrize("probes", [0, 2])
def test_induction_on_a_device(path: Path, probes: int) -> None:
    """Oracle: that of the CPU, the gate included."""
    spectral = SpectralParams(weight=0.1, alpha=1.0, order="spectral", iterations=2)
    values: dict[str, Any] = {
        "factors": True,
        "importance": True,
        "steps": 4,
        "rate": 0.1,
        "temperature": 0.5,
        "limit": 3.0,
    }
    how = InduceParams.model_validate(
        {**values, "check_every": 2, "patience": 9, "probes": probes, "seed": 0, "spectral": spectral}
    )

    def induced(device: torch.device) -> Outcome:
        (model, dense), *_ = walked(path, device)
        kept = {m: m.view(dense.tensors[m.parameter]).numel() // 2 for m in dense.layout.matrices}
        judge = Gate(model, HELD_OUT, 4, SELECTION, True).enter(0, dense, kept)
        start = Transform(
            {coupling.name: torch.linspace(0.5, 2, coupling.size) for coupling in dense.layout.couplings}
        )
        return induce_block(dense, kept, start, SELECTION, how, judge)

    expected = induced(torch.device("cpu"))
    with Elsewhere():
        found = induced(DEVICE)
    for one, other in ((found.judged, expected.judged), (found.held_out, expected.held_out)):
        assert one == pytest.approx(other, rel=0.05)
    assert [point["loss"] for point in found.curve] == pytest.approx(
        [point["loss"] for point in expected.curve], rel=0.05
    )
    assert all(type(tensor) is torch.Tensor for tensor in found.transform.tensors(0).values())


def test_stages_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the stages put together is on the device. Oracle: their outputs on the CPU, summed
    up: rounding moves few of so few weights.
    """
    made = make_workspace(tmp_path / "project")
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(made)
    build(
        "prepare",
        "text calibration",
        "calibrate",
        "sensitivity",
        "scale",
        "curves sparseline",
        "allocate sparseline",
        "induce sparseline",
    )
    build("prune sparseline")

    def read() -> list[float]:
        workspace = made / "build"
        curves, pruned = (load_artifact(workspace / name / "sparseline.json") for name in ("curves", "facts"))
        induced = artifacts.read_tensors(workspace / "induce" / "sparseline" / "transform.safetensors")[1]
        facts = [value for one in curves.values() for value in one["curve"]["layer"]]
        return [
            *map(
                sum,
                (
                    facts,
                    [point["loss"] for point in induced["curve"]],
                    [one["layer_error"] for one in pruned["matrices"].values()],
                ),
            )
        ]

    expected = read()
    monkeypatch.setattr("pipeline_lib.stats.inputs.runtime.compute", lambda: DEVICE)
    with Elsewhere() as device:
        build("calibrate", "curves sparseline", "induce sparseline", "prune sparseline")
    assert device.calls["aten.linalg_cholesky_ex.L"] > 0
    assert read() == pytest.approx(expected, rel=0.05)


# Operations


@pytest.mark.parametrize(
    ("sums", "weighed", "most"),
    [
        (MomentSums, False, 6),
        (MomentSums, True, 11),
        (DiagonalSums, False, 6),
        (DiagonalSums, True, 14),
        (lambda: Accumulator(10_000, 100, gram=True), False, 16),
        (lambda: Accumulator(10_000, 100, gram=True), True, 22),
    ],
)
def test_operations_per_row_of_statistics(sums: Any, weighed: bool, most: int) -> None:
    """Operations are counted on the device, with a bound per row of a batch. None of them waits."""
    with Elsewhere() as device:
        x, weights = torch.randn(6, 8).to(DEVICE), torch.rand(6).to(DEVICE) if weighed else None
        found = sums()
        found.add(x, weights=weights)
        device.calls.clear()
        for _ in range(10):
            found.add(x, weights=weights)
    assert device.calls.total() <= 10 * most, device.calls
    assert not device.reads
