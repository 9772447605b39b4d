"""Fine-tuning that keeps zeros. Oracles: the lines of docs/fine-tuning.md as they stand, and zeros
counted before and after.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from project import COPIED, ROOT, build, change_params, environment, moved
from pruned import card, make_pruned
from tiny import load_full, make_model, token_rows
from transformers import Trainer, TrainingArguments

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.evaluation.perplexity import perplexity
from pipeline_lib.export.export import Variant, export
from pipeline_lib.export.finetuning import KeepZeros, merge, zeros_of
from pipeline_lib.fit.zeros import Zeros
from pipeline_lib.models.checkpoint import open_checkpoint

peft = pytest.importorskip("peft")
BLOCKS = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "fine-tuning.md").read_text(encoding="utf-8"), re.DOTALL
)


def zeros(path: Path) -> dict[str, torch.Tensor]:
    """Parameter -> where it is zero, of matrices."""
    return {
        name: tensor == 0
        for name, tensor in load_full(path, torch.bfloat16).named_parameters()
        if tensor.ndim > 1
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The page


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The embedded model, pruned by Wanda to 50% and exported, under the name that the page uses."""
    directory = tmp_path_factory.mktemp("page")
    for name in (*COPIED, "data/tiny-llama", "params.yaml"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, directory / name)
    wanda = {
        "selection": {"score": "wanda", "group": "row"},
        "reconstruction": {"steps": []},
        "export": ["bitmask"],
    }
    change_params(directory, "variants", {"best": wanda})
    change_params(directory, "report.baseline", "best")
    change_params(directory, "evaluate.completions.count", 1)
    with moved(directory, environment(directory)):
        texts = [f"text {name}" for name in ("calibration", "validation", "test")]
        build(
            "keys",
            "prepare",
            *texts,
            "allocate best",
            "induce best",
            "prune best",
            "distil best",
            "evaluate dense",
            "evaluate best",
        )
        build("tasks dense", "tasks best", "export best")
        yield directory


def test_the_page_keeps_zeros_and_lowers_perplexity(ran: Path) -> None:
    """Every block of the page in order. Oracles: zeros of the pruned checkpoint, and perplexity on
    validation text.
    """
    from safetensors.torch import load_file

    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block, names)
    pruned = ran / "build/prune/best/checkpoint"
    rows = load_file(ran / "build/texts/evaluate/validation.safetensors")["rows"][:32].long()
    before, kept = perplexity(load_full(pruned), rows, 8), zeros(pruned)
    for tuned in ("all", "lora"):
        assert same(zeros(ran / "tuned" / tuned), kept)
        assert perplexity(load_full(ran / "tuned" / tuned), rows, 8) < before
    assert sum(int(one.sum()) for one in kept.values()) >= 1_216_512  # half of the prunable weights


# Zeros


def steps(model: Any, directory: Path, callbacks: list[Any], **how: Any) -> None:
    rows = token_rows(8, 12)
    arguments = TrainingArguments(
        str(directory),
        max_steps=3,
        learning_rate=0.01,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **how,
    )
    Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=callbacks,
    ).train()


@pytest.fixture
def pruned(tmp_path: Path, family: str) -> Path:
    return (
        make_pruned(tmp_path / "prune", open_checkpoint(make_model(tmp_path / "source", family)))
        / "checkpoint"
    )


@pytest.fixture(params=["llama", "gpt2", "phi3"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    "how", [{}, {"weight_decay": 0.1, "gradient_accumulation_steps": 2}, {"optim": "sgd"}], ids=str
)
def test_weights_are_trained_and_zeros_stay(tmp_path: Path, pruned: Path, how: dict[str, Any]) -> None:
    """Zeros as bits: not one −0.0. Without the callback nearly all of them go."""
    found = {}
    for name, callbacks in (("kept", [KeepZeros()]), ("lost", [])):
        model = load_full(pruned).requires_grad_(True)
        steps(model, tmp_path / name, callbacks, **how)
        found[name] = dict(model.named_parameters())
    for name, old in load_full(pruned).named_parameters():
        if old.ndim > 1 and bool((old == 0).any()):
            new = found["kept"][name]
            assert torch.equal(new.view(torch.int32) == 0, old.view(torch.int32) == 0), name
            assert not torch.equal(new, old)
            assert int((found["lost"][name] == 0).sum()) < int((old == 0).sum()) / 2


def test_gradients_of_zeros_enter_no_moment(tmp_path: Path, pruned: Path) -> None:
    model = load_full(pruned).requires_grad_(True)
    rows = token_rows(8, 12)
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, save_strategy="no", report_to="none", disable_tqdm=True
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[KeepZeros()],
    )
    trainer.train()
    moments = trainer.optimizer.optimizer.state
    kept = Zeros.of(dict(load_full(pruned).named_parameters()))
    checked = 0
    for name, parameter in model.named_parameters():
        if name in kept and parameter in moments:
            assert not moments[parameter]["exp_avg_sq"][~kept[name]].any()
            checked += 1
    assert checked


@pytest.mark.parametrize("family", ["llama", "gpt2"], indirect=True)
def test_adapters_are_merged_through_the_masks(tmp_path: Path, pruned: Path) -> None:
    """Oracle: W + BA where W is not zero, from peft's own delta; peft's merge alone loses the zeros."""
    model = load_full(pruned)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    target = "all-linear" if "llama" in str(model.config.model_type) else ["c_attn", "c_fc", "c_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=target, init_lora_weights=False))
    deltas = {
        name.removeprefix("base_model.model.") + ".weight": module.get_delta_weight("default")
        for name, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    merged = dict(merge(adapted).named_parameters())
    assert merged.keys() == before.keys() and deltas
    for name, old in before.items():
        expected = old + deltas[name] * (old != 0) if name in deltas else old
        torch.testing.assert_close(merged[name], expected)
        assert torch.equal(merged[name] == 0, old == 0) or name not in deltas


def test_zeros_come_from_a_checkpoint_or_a_bitmask(tmp_path: Path) -> None:
    """The same masks from both, and from the model itself; also of weights that have been changed since."""
    source = open_checkpoint(make_model(tmp_path / "source", "llama"))
    make_pruned(tmp_path / "prune", source)
    export(
        source, Variant("mine", "unstructured", tmp_path / "prune"), tmp_path / "export", ["bitmask"], card
    )
    model = load_full(tmp_path / "prune" / "checkpoint")
    own = Zeros.of(dict(model.named_parameters()))
    for path in (tmp_path / "prune" / "checkpoint", tmp_path / "export" / "bitmask"):
        read = zeros_of(path)
        assert {name: read[name].tolist() for name in own} == {name: own[name].tolist() for name in own}
        changed = load_full(tmp_path / "prune" / "checkpoint")
        for parameter in changed.parameters():
            parameter.add_(1)
        steps(changed.requires_grad_(True), tmp_path / "out", [KeepZeros(read)])
        assert all(not changed.get_parameter(name)[~own[name]].any() for name in own)


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no zeros": (lambda model: None, "^The model has no zeros to keep"),
    "another model": (
        lambda model: Zeros({"model.other.weight": torch.zeros(2, 2, dtype=torch.bool)}),
        r"model.other.weight \[2, 2\], .* no such parameter",
    ),
    "another shape": (
        lambda model: Zeros({"lm_head.weight": torch.zeros(2, 2, dtype=torch.bool)}),
        r"lm_head.weight \[2, 2\], .* \[320, 32\] in its place",
    ),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_zeros_that_do_not_fit_are_refused(tmp_path: Path, name: str) -> None:
    given, reason = WRONG[name]
    model = load_full(make_model(tmp_path / "source", "llama")).requires_grad_(True)
    with pytest.raises(SparselineError, match=reason):
        steps(model, tmp_path / "out", [KeepZeros(given(model))])
