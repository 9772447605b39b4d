"""Training of the whole pruned model. Oracles: autograd through transformers' own model, torch's
Adam, masks, undisturbed runs.
"""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_checkpoint
from project import WANDA, build, change_params, invoke, load_artifact, make_workspace, scratch, tree
from pruned import Rounding, make_pruned
from tiny import all_tensors, load_full, make_model, token_rows
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from pipeline_lib.core import artifacts
from pipeline_lib.core import params as read
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.export.load import load_model
from pipeline_lib.export.masks import Masks
from pipeline_lib.fit import distil as module
from pipeline_lib.fit.distil import (
    Trained,
    TrainingData,
    held_out_divergence,
    rate_share,
    train,
    training_data,
)
from pipeline_lib.fit.settings import DistilParams
from pipeline_lib.fit.zeros import Zeros
from pipeline_lib.jobs import distil as job
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint
from pipeline_lib.models.places import Storage
from pipeline_lib.models.stream import BlockModel
from pipeline_lib.models.tokenizer import load_tokenizer
from pipeline_lib.prune.run import Rows
from pipeline_lib.recipe.variants import read as read_variant
from pipeline_lib.recipe.variants import read_all
from pipeline_lib.solve.grid import Scheme

CPU = torch.device("cpu")
LENGTH = 12


def params(**changes: Any) -> DistilParams:
    values = {
        "epochs": 2,
        "parts": ["weights", "biases", "norms"],
        "rate": 0.01,
        "warmup": 0.0,
        "beta1": 0.9,
        "beta2": 0.95,
    }
    values |= {
        "batch_rows": 4,
        "compute_dtype": "float32",
        "state_dtype": "float32",
        "seed": 0,
    }
    return DistilParams(**{**values, **changes})


def make(
    directory: Path, family: str, rounding: Rounding | None = None
) -> tuple[Checkpoint, Checkpoint, Masks]:
    """A dense model, its pruned checkpoint, and its masks."""
    if family in ("mixtral", "gpt_oss"):
        source = open_checkpoint(make_checkpoint(directory / "dense", family))
    else:
        source = open_checkpoint(make_model(directory / "dense", family))
    left = make_pruned(directory / "pruned", source, rounding=rounding)
    pruned = open_checkpoint(left / "checkpoint", source.architecture)
    return source, pruned, Masks(left / "masks", pruned)


def begin(
    models: tuple[Checkpoint, Checkpoint, Masks],
    how: DistilParams,
    held_out: int = 4,
    grid: Scheme | None = None,
    room: float = 0,  # for graphs
) -> tuple[TrainingData, list[Trained]]:
    source, pruned, masks = models
    model = BlockModel(source, torch.float32, CPU)
    rows = {"fit": token_rows(12, LENGTH, seed=1), "held_out": token_rows(held_out, LENGTH, seed=2)}
    return training_data(model, rows, how, Storage(spare=room)), job.opened(model, pruned, masks, how, grid)


# Zeros


@pytest.mark.parametrize("shape", [(3, 5), (8,), (2, 4, 8), (1, 1), (7, 9, 3)])
def test_masks_come_back_from_their_bits(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) < 0.5
    zeros = Zeros({"a": mask})
    assert torch.equal(zeros["a"], mask)
    assert "a" in zeros and "b" not in zeros


def test_zeros_are_held_whatever_came_there() -> None:
    """Also where a weight became NaN, infinite, or a negative zero; other names are left alone.
    Oracle: the bytes.
    """
    weight, other = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2, 2)
    zeros = Zeros.of({"a": weight, "norm": torch.zeros(3), "full": other})
    assert "norm" not in zeros and "full" not in zeros
    moved = torch.tensor([[5.0, math.nan], [-0.0, -6.0]])
    zeros.hold({"a": moved, "full": other})
    assert moved.tolist() == [[5.0, 0.0], [0.0, -6.0]]
    assert not torch.signbit(moved[1, 0])
    assert torch.equal(other, torch.ones(2, 2))


# A step


def test_the_rate_rises_and_falls() -> None:
    """Oracle: by hand, for 10 steps of which 2 rise."""
    found = [rate_share(done, 10, 0.2) for done in range(10)]
    wanted = [1 / 3, 2 / 3, *(0.5 + 0.5 * math.cos(math.pi * step / 8) for step in range(8))]
    assert found == pytest.approx(wanted)
    assert rate_share(0, 1, 0.9) > 0


@pytest.mark.parametrize("family", ["llama", "opt", "gemma", "phi3", "gpt2"])
@pytest.mark.parametrize("room", [0, math.inf])
def test_gradients_are_those_of_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, room: float
) -> None:
    """Biases, tied embeddings, fused and transposed weights among them. Oracle: transformers' two
    models and autograd.
    """
    models = make(tmp_path, family)
    how = params(batch_rows=12, epochs=2)  # two equal steps, since no weight moves; the first keeps no graph
    data, blocks = begin(models, how, room=room)
    noted: dict[int, dict[str, torch.Tensor]] = {}

    def note(self: Trained, gradients: list[torch.Tensor], rate: float, done: int) -> None:
        noted[blocks.index(self)] = dict(zip(self.leaves, gradients, strict=True))

    monkeypatch.setattr(Trained, "step", note)
    before, loss = train(data, blocks, how)
    assert before == pytest.approx(loss) and data.steps(how) == 2
    dense, pruned = load_full(models[0].path), load_full(models[1].path)
    rows = token_rows(12, LENGTH, seed=1)
    pruned.requires_grad_(True)
    p, q = dense(input_ids=rows).logits.log_softmax(-1), pruned(input_ids=rows).logits.log_softmax(-1)
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-4)
    own = {name: parameter.grad for name, parameter in pruned.named_parameters()}
    compared = 0
    for index, found in noted.items():
        for name, gradient in found.items():
            (full,) = [one for one in own if one.endswith(models[1].block_prefix(index) + name)]
            torch.testing.assert_close(gradient, own[full], rtol=2e-3, atol=2e-6)
            compared += 1
    assert compared >= 12


def test_a_step_is_adam_on_what_is_kept(tmp_path: Path) -> None:
    """Oracle: torch's Adam on the kept weights alone, at the rate in units of their root mean square."""
    _, blocks = begin(make(tmp_path, "llama-bias"), how := params())
    block, random = blocks[0], torch.Generator().manual_seed(0)
    masks = {
        name: block.zeros[name] if name in block.zeros else torch.ones_like(leaf, dtype=torch.bool)
        for name, leaf in block.leaves.items()
    }
    oracle = {
        name: leaf.detach()[masks[name]].clone().requires_grad_() for name, leaf in block.leaves.items()
    }
    groups = [
        {"params": [one], "lr": 0.01 * float(one.detach().square().mean().sqrt())} for one in oracle.values()
    ]
    adam = torch.optim.Adam(groups, betas=(how.beta1, how.beta2), eps=module.EPSILON)
    for done in range(3):
        gradients = [torch.randn(leaf.shape, generator=random) for leaf in block.leaves.values()]
        for (name, one), gradient in zip(oracle.items(), gradients, strict=True):
            one.grad = gradient[masks[name]]
        adam.step()
        block.step(gradients, 0.01, done)
    for name, leaf in block.leaves.items():
        torch.testing.assert_close(leaf.detach()[masks[name]], oracle[name].detach(), rtol=1e-5, atol=1e-7)
        assert not leaf.detach()[~masks[name]].any()


def test_averages_in_bfloat16_are_close_and_half_as_large(tmp_path: Path) -> None:
    models, found = make(tmp_path, "llama"), {}
    for kind in ("float32", "bfloat16"):
        data, blocks = begin(models, how := params(state_dtype=kind))
        for _ in train(data, blocks, how):
            pass
        found[kind] = held_out_divergence(data, lambda index, blocks=blocks: blocks[index].stored())
        sizes = {average.dtype for both in blocks[0].averages.values() for average in both}
        assert sizes == {getattr(torch, kind)}
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.02)


# Training


@pytest.mark.parametrize("family", ["llama", "opt-post", "gemma", "phi3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_training_brings_the_models_together_and_keeps_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, compute: Any
) -> None:
    """Mixtures of experts and tied embeddings among them. Oracle: the masks; the divergence on the
    rows themselves.
    """
    monkeypatch.setattr("pipeline_lib.core.products.bfloat16_is_faster", lambda: True)
    models = make(tmp_path, family)
    data, blocks = begin(models, how := params(epochs=6, compute_dtype=compute, warmup=0.1), held_out=0)
    before = held_out_divergence(data, models[1].block)
    curve = list(train(data, blocks, how))
    after = held_out_divergence(data, lambda index: blocks[index].stored())
    assert len(curve) == data.steps(how) == 18
    assert after < 0.85 * before
    for index, block in enumerate(blocks):
        prefix, stored, start = models[1].block_prefix(index), block.stored(), models[1].block(index)
        moved = 0
        for full, mask in models[2].block(index).items():
            name = full.removeprefix(prefix)
            assert not stored[name][~mask].any() and not torch.signbit(stored[name][~mask]).any()
            moved += int((stored[name] != start[name]).sum())
        assert moved > 100
        assert {name: one.dtype for name, one in stored.items()} == {
            name: one.dtype for name, one in start.items()
        }


def test_a_judgement_is_the_divergence_of_the_whole_models(tmp_path: Path) -> None:
    """Oracle: transformers' two models in float32."""
    models = make(tmp_path, "llama")
    data, _ = begin(models, params(batch_rows=3), held_out=5)
    rows = token_rows(5, LENGTH, seed=2)
    p, q = (load_full(one.path)(input_ids=rows).logits.log_softmax(-1) for one in models[:2])
    assert held_out_divergence(data, models[1].block) == pytest.approx(
        float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4
    )
    assert held_out_divergence(data, models[0].block) == pytest.approx(0, abs=1e-6)


def test_only_what_is_asked_for_moves(tmp_path: Path) -> None:
    models = make(tmp_path, "llama-bias")
    data, blocks = begin(models, how := params(epochs=1, parts=["norms"]))
    for _ in train(data, blocks, how):
        pass
    stored, start = blocks[1].stored(), models[1].block(1)
    assert {name for name in stored if not torch.equal(stored[name], start[name])} == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_graphs_that_are_kept_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """None, the last, or the last two blocks keep their graphs, and all of them do without a limit.
    Oracles: the losses, and how often a block runs in two steps, of which the first keeps no graph.
    """
    models, sizes, calls = make(tmp_path, family), dict[int, int](), list[int]()
    depth = models[0].architecture.depth
    call, step = BlockModel.call, module._Passes.step

    def counted(self: BlockModel, block: Any, index: int, *rest: Any) -> torch.Tensor:
        calls.append(index)
        return call(self, block, index, *rest)

    def noted(self: module._Passes, *given: Any) -> float:
        mean = step(self, *given)
        sizes.update(self.sizes)
        return mean

    monkeypatch.setattr(BlockModel, "call", counted)
    monkeypatch.setattr(module._Passes, "step", noted)
    how = params(batch_rows=6, epochs=1)

    def ran(room: float) -> tuple[list[float], list[int]]:
        data, blocks = begin(models, how, room=room)
        calls.clear()
        losses = list(train(data, blocks, how))
        return losses, [calls.count(index) for index in range(depth)]

    losses, often = ran(0)
    once = often[0] // 4
    assert often == [4 * once] * depth and len(losses) == 2
    last, two = sizes[depth - 1], sizes[depth - 1] + sizes[depth - 2]
    for room, kept in ((last - 1, 0), (last, 1), (two - 1, 1), (two, 2), (math.inf, depth)):
        assert ran(room) == (losses, [4 * once] * (depth - kept) + [3 * once] * kept)


def test_graphs_with_attention_matrices_are_counted_with_them(tmp_path: Path) -> None:
    """gemma2 has no fused attention: its graph keeps the outputs of tanh and softmax for every pair of
    tokens. Llama's keeps none. Oracle: by hand, for 12 samples of 256 tokens.
    """
    counted = {}
    for family in ("llama", "gemma2"):
        model = BlockModel(open_checkpoint(make_checkpoint(tmp_path / family, family)), torch.float32, CPU)
        hidden = model.embed(token_rows(12, 256, seed=1), [12]).hidden[0].requires_grad_()
        sizes: list[int] = []
        with module._counted([hidden], sizes):
            model.call(model.templates[0], 0, hidden, model.checkpoint.block(0))
        counted[family] = sizes[0] / (4 * 12 * model.checkpoint.heads * 256 * 256)
    assert counted["llama"] < 1 and counted["gemma2"] > 2


# Quantised variants

GRIDS = {"symmetric": Rounding(4, 16), "zero points": Rounding(4, 16, False)}


def scheme(rounding: Rounding, dtype: torch.dtype) -> Scheme:
    return Scheme(rounding.bits, rounding.group, rounding.symmetric, dtype)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "mixtral"])
@pytest.mark.parametrize("kind", list(GRIDS))
def test_quantised_weights_stay_on_their_grids(tmp_path: Path, family: str, kind: str) -> None:
    """The models come together, and every weight is the new scale times the old whole number.
    Oracle: the weights over the scales, before and after.
    """
    rounding = GRIDS[kind]
    models = make(tmp_path, family, rounding)
    grid = scheme(rounding, models[1].dtype)
    how = params(epochs=6, rate=0.02)
    data, blocks = begin(models, how, held_out=0, grid=grid)
    before = held_out_divergence(data, models[1].block)
    list(train(data, blocks, how))
    stored = [block.stored() for block in blocks]
    assert held_out_divergence(data, lambda index: stored[index]) < 0.95 * before
    moved, compared = 0, 0
    for index, block in enumerate(blocks):
        start, folder = models[1].block(index), models[1].path.parent / "quantization"
        old, _ = artifacts.read_tensors(artifacts.block_file(folder, index))
        assert block.grids and block.rest.keys() >= {matrix.parameter for matrix in block.grids}
        for matrix, now in block.grids.items():
            scales = (old[f"{matrix.label}.scale"], now.scale)
            weights = (matrix.view(one[matrix.parameter]).float() for one in (start, stored[index]))
            first, last = (
                w / one.repeat_interleave(16, 1)[:, : w.shape[1]]
                for w, one in zip(weights, scales, strict=True)
            )
            assert (
                torch.equal(first.round(), last.round()) and float((last - last.round()).abs().max()) < 0.05
            )
            assert torch.equal(first == 0, last == 0) and not torch.signbit(last[last == 0]).any()
            assert torch.equal(now.scale.to(models[1].dtype).float(), now.scale)  # as it is stored
            moved += int((scales[0] != scales[1]).sum())
            compared += scales[0].numel()
        norms = [name for name, one in start.items() if one.ndim == 1 and name.endswith("weight")]
        assert norms and all(not torch.equal(stored[index][name], start[name]) for name in norms)
    assert moved > compared / 2


def test_a_scale_moves_by_the_gradient_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: transformers' two models and autograd: of a logarithm of a scale the sum of weights
    times gradients of its group.
    """
    models = make(tmp_path, "llama", GRIDS["zero points"])
    how = params(batch_rows=12, epochs=1)
    data, blocks = begin(models, how, grid=scheme(GRIDS["zero points"], models[1].dtype))
    noted: dict[int, dict[str, torch.Tensor]] = {}

    def note(self: Trained, gradients: list[torch.Tensor], rate: float, done: int) -> None:
        noted[blocks.index(self)] = dict(zip(self.leaves, gradients, strict=True))

    monkeypatch.setattr(Trained, "step", note)
    list(train(data, blocks, how))
    dense, pruned = load_full(models[0].path), load_full(models[1].path)
    rows = token_rows(12, LENGTH, seed=1)
    pruned.requires_grad_(True)
    p, q = dense(input_ids=rows).logits.log_softmax(-1), pruned(input_ids=rows).logits.log_softmax(-1)
    (p.exp() * (p - q)).sum(-1).mean().backward()
    own = dict(pruned.named_parameters())
    for index, block in enumerate(blocks):
        assert not {matrix.parameter for matrix in block.grids} & block.leaves.keys()
        for matrix in block.grids:
            parameter = own[models[1].block_prefix(index) + matrix.parameter]
            assert parameter.grad is not None
            by_group = (parameter.detach() * parameter.grad).split(16, 1)
            wanted = torch.stack([part.sum(1) for part in by_group], 1)
            torch.testing.assert_close(noted[index][f"{matrix.label}.scale"], wanted, rtol=1e-2, atol=1e-5)


def test_without_weights_the_grids_stay(tmp_path: Path) -> None:
    rounding = GRIDS["symmetric"]
    models = make(tmp_path, "llama-bias", rounding)
    how = params(parts=["norms", "biases"])
    data, blocks = begin(models, how, grid=scheme(rounding, models[1].dtype))
    list(train(data, blocks, how))
    start, stored = models[1].block(0), blocks[0].stored()
    assert {name for name in stored if not torch.equal(stored[name], start[name])} == {
        name for name, one in start.items() if one.ndim == 1
    }


# The stage

MODEL = {"layers": 2}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workspace with two pruned variants: one asks for training, the other does not. Read only."""
    home = tmp_path_factory.mktemp("distil")
    trained = {**WANDA, "distil": {"epochs": 3, "rate": 0.01}, "export": ["dense"]}
    workspace = make_workspace(
        home / "project",
        model=MODEL,
        variants={"trained": trained, "wanda": WANDA},
        report={"baseline": "wanda"},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSELINE_SCRATCH", str(home / "scratch"))
        patch.chdir(workspace)
        steps = [
            f"{stage} {name}"
            for name in ("trained", "wanda")
            for stage in ("curves", "allocate", "induce", "prune")
        ]
        build(
            "keys",
            "prepare",
            *(f"text {name}" for name in ("calibration", "validation", "test")),
            "calibrate",
            "sensitivity",
            *steps,
        )
    yield workspace


@pytest.fixture
def workspace(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = Path(shutil.copytree(ready, tmp_path / "project"))
    monkeypatch.chdir(copy)
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(scratch(copy)))
    return copy


def outputs(workspace: Path) -> dict[str, str]:
    return {
        path: one
        for path, one in tree(workspace / "build").items()
        if path.split("/")[0] in ("distil", "training")
    }


def test_a_kept_result_takes_the_place_of_the_pruned_checkpoint(workspace: Path) -> None:
    """What is measured and exported is the trained checkpoint, of the same zeros."""
    build(
        "distil trained",
        "evaluate dense",
        "evaluate trained",
        "tasks dense",
        "tasks trained",
        "export trained",
    )
    facts = load_artifact(workspace / "build/training/trained.json")
    assert facts["kept"] and facts["held_out_after"] < facts["held_out_before"]
    assert facts["steps"] == len(facts["curve"]) == 3 * math.ceil(facts["rows"] / 4)
    trained, pruned, exported = (
        all_tensors(workspace / path)
        for path in (
            "build/distil/trained/checkpoint",
            "build/prune/trained/checkpoint",
            "build/export/trained/dense",
        )
    )
    assert trained.keys() == pruned.keys() == exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in trained.items())
    matrices = [name for name, tensor in pruned.items() if tensor.ndim == 2 and "layers" in name]
    assert all(not trained[name][pruned[name] == 0].any() for name in matrices)
    assert any(not torch.equal(trained[name], pruned[name]) for name in matrices)
    zeros = sum(int((trained[name] == 0).sum()) for name in matrices)
    assert facts["zeros"] == zeros
    assert (
        load_artifact(workspace / "build/evaluate/trained.json")["perplexity"]
        != load_artifact(workspace / "build/evaluate/dense.json")["perplexity"]
    )
    card = (workspace / "build/export/trained/dense/README.md").read_text(encoding="utf-8")
    assert "| trained afterwards | 6 steps of distillation |" in card and "distillation 0" in card


def test_the_gate_refuses_a_result_that_is_worse(workspace: Path) -> None:
    """The learning rate is far too high, so the pruned checkpoint is measured. Oracle: the same
    variant without training.
    """
    change_params(workspace, "variants.trained.distil.rate", 5.0)
    result = invoke("distil", "trained")
    assert result.exit_code == 0 and "not kept, the pruned checkpoint is used" in result.output, result.output
    assert not load_artifact(workspace / "build/training/trained.json")["kept"]
    assert sorted(tree(workspace / "build/distil/trained")) == ["seal.json"]
    build("evaluate trained", "evaluate wanda")
    perplexities = [load_artifact(workspace / f"build/evaluate/{name}.json") for name in ("trained", "wanda")]
    assert perplexities[0] == perplexities[1]


def test_training_that_diverges_ends_early_and_is_not_kept(workspace: Path) -> None:
    change_params(workspace, "variants.trained.distil.rate", 1e30)
    result = invoke("distil", "trained")
    assert result.exit_code == 0 and "is not a number; lower distil.rate" in result.output, result.output
    facts = load_artifact(workspace / "build/training/trained.json")
    assert not facts["kept"] and facts["held_out_after"] is None and facts["steps"] < 6


@pytest.mark.parametrize("damage", [False, True])
def test_a_killed_run_goes_on_and_writes_the_same_bytes(
    ready: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch, damage: bool
) -> None:
    """The training is stopped after three of six steps. Once, the state is damaged afterwards,
    which the log says. Oracle: an undisturbed run.
    """
    undisturbed = Path(shutil.copytree(ready, workspace.parent / "undisturbed" / "project"))
    with monkeypatch.context() as patch:
        patch.chdir(undisturbed)
        build("distil trained")
    monkeypatch.setattr(job, "SECONDS", 0.0)
    monkeypatch.setattr(job._States, "keep", stopping(job._States.keep, 3))
    assert invoke("distil", "trained").exit_code == 130
    states = list(scratch(workspace).glob("distil/*/states/*"))
    assert [path.name for path in states] == ["3"]
    if damage:
        path = next(states[0].iterdir())
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    monkeypatch.undo()
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(scratch(workspace)))
    result = invoke("distil", "trained")
    assert result.exit_code == 0, result.output
    assert ("the stored step 3 is damaged" if damage else "resuming after 3 of 6 steps") in result.output
    assert outputs(workspace) == outputs(undisturbed)
    assert not tree(scratch(workspace))


def stopping(keep: Any, after: int) -> Any:
    """``keep`` each state, at once, and be interrupted after so many."""

    def kept(self: Any, blocks: Any, curve: list[float]) -> None:
        self._next = 0.0
        keep(self, blocks, curve)
        if len(curve) == after:
            raise KeyboardInterrupt

    return kept


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("form", ["bitmask", "compressed-tensors"])
def test_a_trained_quantised_variant_is_exported_as_it_was_trained(workspace: Path, form: str) -> None:
    """The file's own reader gives the trained checkpoint. Oracle: its tensors."""
    how = {"quantization": {"bits": 4, "group": 16}, "export": [form], "distil": {"epochs": 6, "rate": 0.05}}
    change_params(workspace, "variants.trained", {**WANDA, **how})
    build("keys", "prune trained", "distil trained", "evaluate dense", "evaluate trained")
    build("tasks dense", "tasks trained", "export trained")
    assert load_artifact(workspace / "build/training/trained.json")["kept"]
    trained, pruned = (
        all_tensors(workspace / f"build/{stage}/trained/checkpoint") for stage in ("distil", "prune")
    )
    folder = workspace / "build/export/trained" / form
    whole = {"dtype": torch.float32, "quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = load_model(folder) if form == "bitmask" else AutoModelForCausalLM.from_pretrained(folder, **whole)
    read = dict(model.named_parameters())
    matrices = [name for name in trained if name.endswith("proj.weight")]
    assert len(matrices) == 14
    for name in matrices:
        assert torch.equal(read[name], trained[name]), name
        assert torch.equal(trained[name] == 0, pruned[name] == 0)
    assert any(not torch.equal(trained[name], pruned[name]) for name in matrices)


def test_a_variant_that_does_not_ask_is_left_alone(workspace: Path) -> None:
    result = invoke("distil", "wanda")
    assert result.exit_code == 0 and "nothing to do" in result.output
    assert sorted(outputs(workspace)) == ["distil/wanda/seal.json", "training/wanda.json"]


def test_it_trains_on_the_samples_for_training_too(workspace: Path) -> None:
    """Oracle: counts. Those of the first split come first."""
    build("distil trained")
    before = load_artifact(workspace / "build/training/trained.json")
    change_params(workspace, "texts.calibration.training", 8)
    build("text calibration", "distil trained")
    after = load_artifact(workspace / "build/training/trained.json")
    assert after["rows"] == before["rows"] + 8
    assert after["steps"] == 3 * math.ceil(after["rows"] / 4)
    assert after["held_out_before"] == before["held_out_before"]


def test_blocks_train_on_the_first_samples_for_training(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``prune.training`` of them. Oracle: the file of the samples."""
    change_params(workspace, "texts.calibration.training", 8)
    change_params(workspace, "prune.training", 4)
    given: list[Any] = []
    of = Rows.of

    def seen(split: Any, recipe: Any) -> Rows:
        rows = of(split, recipe)
        given.append(rows.training)
        return rows

    monkeypatch.setattr(Rows, "of", seen)
    build("keys", "text calibration", "prune wanda")
    samples = artifacts.read_tensors(workspace / "build/texts/calibrate/calibration.safetensors")[0][
        "training"
    ]
    assert len(samples) == 8
    assert torch.equal(given[0], samples[:4])


def test_without_held_out_rows_the_fitting_rows_decide(workspace: Path) -> None:
    change_params(workspace, "texts.calibration.held_out", 0)
    build("text calibration")
    result = invoke("distil", "trained")
    assert result.exit_code == 0 and "the training samples decide what is kept" in result.output, (
        result.output
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"distil": {"beta2": 0.999, "state_dtype": "bfloat16"}}, ("beta2", "give beta2 0.99 or less")),
        ({"distil": {"rates": 1}}, ("variants.trained.distil.rates is not a known key",)),
        ({"distil": {"warmup": 1}}, ("variants.trained.distil.warmup = 1 ",)),
    ],
)
def test_what_cannot_be_trained_is_refused_by_a_sentence(
    workspace: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    change_params(workspace, "variants.trained", {**WANDA, **change})
    with pytest.raises(SparselineError) as told:
        read_variant("trained")
    assert all(word in str(told.value) for word in words), told.value
    result = invoke("keys")
    assert result.exit_code == 2 and result.output == f"error: {told.value}\n"


def test_the_preset_is_best_and_training() -> None:
    """Oracle: the shipped recipes."""
    shipped = read_all(Path(__file__).parent.parent / "params.yaml")
    assert (
        shipped["distilled"].recipe == shipped["best"].recipe
        and shipped["distilled"].measured == shipped["best"].measured
    )
    assert [name for name, variant in shipped.items() if variant.trained is not None] == ["distilled"]


def test_the_embedded_model_gains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real, if small, language model: held-out divergence falls in 24 steps. The params are the
    shipped ones, but for epochs.
    """
    root = Path(__file__).parent.parent
    source = open_checkpoint(root / "data/tiny-llama")
    left = make_pruned(tmp_path / "pruned", source)
    pruned = open_checkpoint(left / "checkpoint", source.architecture)
    monkeypatch.chdir(root)
    how = read.load(DistilParams, "distil").model_copy(update={"epochs": 2})
    model = BlockModel(source, torch.float32, CPU)
    text = (root / "pipeline_lib/fit/fit.py").read_text(encoding="utf-8")
    rows = torch.tensor(tokens(root, text))
    data = training_data(model, {"fit": rows[:24], "held_out": rows[24:28]}, how, None)
    blocks = job.opened(model, pruned, Masks(left / "masks", pruned), how)
    before = held_out_divergence(data, pruned.block)
    assert len(list(train(data, blocks, how))) == 12
    assert held_out_divergence(data, lambda index: blocks[index].stored()) < 0.8 * before


def tokens(root: Path, text: str) -> list[list[int]]:
    """28 rows of 64 tokens."""
    ids = load_tokenizer(root / "data/tiny-llama", open_checkpoint(root / "data/tiny-llama").vocabulary)(
        text
    )["input_ids"]
    return [ids[start : start + 64] for start in range(0, 28 * 64, 64)]
