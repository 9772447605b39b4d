"""Every mistake is told in one sentence that names the key or file, its value and the mend; nothing
is written, nothing is lost.

Oracle: the wording required of each mistake (words that must occur), exit code 2, and the output
tree before and after.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import Result
from project import (
    REMOVED,
    adopt,
    build,
    change_json,
    change_params,
    invoke,
    make_workspace,
    read_params,
    run,
    tree,
    write_params,
)
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoTokenizer

from pipeline_lib.core import artifacts
from pipeline_lib.models.architecture import Layout
from pipeline_lib.models.stream import BlockModel

Change = Callable[[Path], None]
STEPS = (
    "keys",
    "prepare",
    "text calibration",
    "text validation",
    "text test",
    "calibrate",
    "scale",
    "sensitivity",
    "curves sparseline",
    "allocate wanda",
    "allocate sparseline",
    "induce sparseline",
    "induce wanda",
)
LATER = (
    "prune wanda",
    "prune sparseline",
    "evaluate dense",
    "evaluate wanda",
    "evaluate sparseline",
    "tasks dense",
    "tasks wanda",
    "tasks sparseline",
    "export wanda",
    "export sparseline",
    "choose",
    "report",
)
FIRST = "layers.0.self_attn.q_proj"  # the first logical matrix
WEIGHTS = Path("data/model/model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which every stage has run. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("finished")
        patch.setenv("SPARSELINE_SCRATCH", str(home / "scratch"))
        workspace = make_workspace(home / "project")
        patch.chdir(workspace)
        build(*STEPS, *LATER)
    return workspace


@pytest.fixture
def workspace(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it to break, as the current directory."""
    copy = Path(shutil.copytree(finished, tmp_path / "project"))
    monkeypatch.chdir(copy)
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(tmp_path / "scratch"))
    threads = torch.get_num_threads()
    yield copy
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def copy(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For ``shared``."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("shared") / "project"))


@pytest.fixture
def shared(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One copy for all whose only change is to params.yaml, which is put back; ``check`` sees to it
    that stages leave the rest alone.
    """
    monkeypatch.chdir(copy)
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(tmp_path / "scratch"))
    before, threads = (copy / "params.yaml").read_bytes(), torch.get_num_threads()
    yield copy
    (copy / "params.yaml").write_bytes(before)
    torch.set_num_threads(threads)


def outputs(workspace: Path) -> dict[str, tuple[str, int]]:
    """Path -> digest and time of writing of all that stages write."""
    folders = [workspace / name for name in ("build", "report") if (workspace / name).exists()]
    return {
        f"{d.name}/{p}": (digest, (d / p).stat().st_mtime_ns)
        for d in folders
        for p, digest in tree(d).items()
    }


def told(result: Result) -> str:
    """The one error line of a stage that failed as it should."""
    assert result.exit_code == 2, f"{result.exit_code}: {result.output} {result.exception!r}"
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    # progress bars (with carriage returns) may stand before it, nothing after it
    assert lines[-1] == errors[0], result.stderr
    assert all("\r" in line or "%|" in line for line in lines[:-1]), result.stderr
    assert "Traceback" not in result.output
    message = errors[0].removeprefix("error: ")
    assert re.search(r"[a-z0-9)`}'\"\]>.]$", message), message
    assert "\r" not in message, message
    return message


def check(workspace: Path, stage: str, words: tuple[str, ...]) -> None:
    """The stage's error has all the words, and all outputs stay as they were."""
    before = outputs(workspace)
    message = told(invoke(*stage.split()))
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert outputs(workspace) == before


def params(**values: Any) -> Change:
    """Change keys of params.yaml; ``__`` stands for a dot."""

    def change(workspace: Path) -> None:
        for key, value in values.items():
            change_params(workspace, key.replace("__", "."), value)

    return change


class Mistake(NamedTuple):
    name: str
    stage: str  # the one that must tell it
    change: Change
    words: tuple[str, ...]  # key or file, value, mend
    before: tuple[str, ...] = ()  # stages that accept the changed workspace first


def wanda(**values: Any) -> Change:
    return params(**{f"variants__wanda__{key}": value for key, value in values.items()})


SELECTION = {"score": "wanda", "group": "row"}

PARAMETERS = [
    Mistake(
        "sparsity above 1",
        "prune wanda",
        wanda(selection={**SELECTION, "sparsity": 1.5}),
        ("variants.wanda.selection.sparsity", "1.5", "less than 1"),
    ),
    Mistake(
        "sparsity 0",
        "prune wanda",
        params(prune__selection__sparsity=0),
        ("prune.selection.sparsity = 0 ", "greater than 0", "quantization.bits"),
    ),
    Mistake(
        "nothing to induce",
        "induce sparseline",
        params(prune__selection__sparsity=0, prune__quantization__bits=4),
        ("variants.sparseline", "sparsity 0", "nothing to induce", "remove its section `induce`"),
    ),
    Mistake(
        "groups that GGUF has no blocks for",
        "prune wanda",
        wanda(quantization={"bits": 4, "group": 48, "scales": "gguf"}),
        ("variants.wanda.quantization.group = 48", "multiple of 32"),
    ),
    Mistake(
        "zero points that GGUF has not",
        "prune wanda",
        wanda(quantization={"bits": 8, "symmetric": False, "scales": "gguf"}),
        ("variants.wanda.quantization.symmetric = False", "set symmetric to true"),
    ),
    Mistake(
        "nine bits", "prune wanda", params(prune__quantization__bits=9), ("quantization.bits", "= 9 ", "8")
    ),
    Mistake(
        "no columns in a group",
        "prune wanda",
        params(prune__quantization__group=0),
        ("quantization.group", "= 0 ", "1"),
    ),
    Mistake(
        "unknown group",
        "prune wanda",
        params(prune__quantization__group="matrix"),
        ("quantization.group", "'matrix'"),
    ),
    Mistake(
        "codes fitted again",
        "prune wanda",
        params(prune__quantization__refit=["weights"]),
        ("quantization.refit", "'weights'", "scales"),
    ),
    Mistake(
        "sparsity of induction",
        "induce sparseline",
        params(prune__selection__sparsity=-1),
        ("selection.sparsity", "-1", "greater"),
    ),
    Mistake(
        "sparsities by hand without an overall one",
        "allocate wanda",
        wanda(selection={**SELECTION, "sparsity": {"*.v_proj": 0.3}}),
        ("variants.wanda.selection.sparsity", "needs the key overall"),
    ),
    Mistake(
        "a sparsity by hand that is none",
        "allocate wanda",
        wanda(selection={**SELECTION, "sparsity": {"overall": 0.5, "*.v_proj": True}}),
        ("variants.wanda.selection.sparsity", "'*.v_proj'", "from 0 to less than 1, not True"),
    ),
    Mistake(
        "a sparsity by hand for nothing",
        "allocate wanda",
        wanda(selection={**SELECTION, "sparsity": {"overall": 0.5, "*.gone": 0.3}}),
        ("selection.sparsity of wanda", "'*.gone' matches no matrix", FIRST),
    ),
    Mistake(
        "sparsities by hand that cannot be made up for",
        "allocate wanda",
        wanda(selection={**SELECTION, "sparsity": {"overall": 0.1, "*.mlp": 0.9}}),
        ("selection.sparsity of wanda", "overall = 0.1 is not met", "change overall or a pattern"),
    ),
    Mistake(
        "unknown key",
        "calibrate",
        params(calibrate__batch=3),
        ("calibrate.batch ", "not a known key", "batch_rows"),
    ),
    Mistake(
        "unknown nested key",
        "prune wanda",
        wanda(selection={**SELECTION, "sparcity": 0.5}),
        ("variants.wanda.selection.sparcity", "not a known key", "sparsity"),
    ),
    Mistake(
        "missing key",
        "sensitivity",
        params(sensitivity__seed=REMOVED),
        ("sensitivity.seed", "missing", "add it"),
    ),
    Mistake("missing section", "scale", params(scale=REMOVED), ("scale", "add it")),
    Mistake(
        "missing key of a variant",
        "prune wanda",
        params(prune__export=REMOVED),
        ("variants.wanda.export", "missing", "add it"),
    ),
    Mistake(
        "word for a number",
        "calibrate",
        params(calibrate__batch_rows="many"),
        ("calibrate.batch_rows", "'many'", "integer"),
    ),
    Mistake("number for a list", "prepare", params(model__include=3), ("model.include", "= 3 ", "list")),
    Mistake(
        "no rows in a batch of calibrate",
        "calibrate",
        params(calibrate__batch_rows=0),
        ("calibrate.batch_rows", "= 0 ", "1"),
    ),
    Mistake(
        "no tokens for medians",
        "calibrate",
        params(calibrate__median_tokens=0),
        ("calibrate.median_tokens", "= 0 ", "1"),
    ),
    Mistake(
        "no rows in a batch of prune", "prune wanda", params(prune__batch_rows=0), ("batch_rows", "= 0 ", "1")
    ),
    Mistake(
        "no rows in a batch of evaluate",
        "evaluate dense",
        params(evaluate__batch_rows=0),
        ("evaluate.batch_rows", "= 0 ", "1"),
    ),
    Mistake(
        "no such estimator",
        "sensitivity",
        params(sensitivity__estimator="hessian"),
        ("sensitivity.estimator", "hessian", "'fisher'"),
    ),
    Mistake(
        "agreement above 1",
        "sensitivity",
        params(sensitivity__agreement=90),
        ("sensitivity.agreement", "= 90 ", "1"),
    ),
    Mistake("one probe", "sensitivity", params(sensitivity__probes=1), ("sensitivity.probes", "= 1 ", "2")),
    Mistake("no steps", "induce sparseline", params(induce__steps=0), ("induce.steps", "= 0 ", "1")),
    Mistake(
        "negative limit of factors", "scale", params(scale__limit=-1), ("scale.limit", "-1", "greater than")
    ),
    Mistake(
        "unknown start", "scale", params(scale__start="median"), ("scale.start", "'median'", "second_moment")
    ),
    Mistake(
        "sparsity that the pattern denies",
        "prune wanda",
        params(prune__selection__pattern="2:4", prune__selection__sparsity=0.6),
        (
            "prune.selection.pattern = '2:4' with prune.selection.sparsity = 0.6",
            "sparsity must be 0.5, not 0.6",
        ),
    ),
    Mistake(
        "N:M that does not divide",
        "allocate wanda",
        params(prune__selection__pattern="3:5", prune__selection__sparsity=0.4),
        ("3:5", FIRST, "32 inputs", "choose another M", "exclude"),
    ),
    Mistake(
        "N:M that does not divide, curves",
        "curves sparseline",
        params(prune__selection__pattern="3:5", prune__selection__sparsity=0.4),
        ("3:5", FIRST, "32 inputs", "choose another M", "exclude"),
    ),
    Mistake(
        "malformed pattern",
        "prune wanda",
        params(prune__selection__pattern="2-4"),
        ("selection.pattern", "'2-4'", "N:M"),
    ),
    Mistake(
        "number as pattern",
        "prune wanda",
        params(prune__selection__pattern=124),
        ("selection.pattern", "= 124 ", "string"),
    ),
    Mistake(
        "4 of 2",
        "prune wanda",
        params(prune__selection__pattern="4:2"),
        ("selection.pattern", "'4:2'", "N < M"),
    ),
    Mistake(
        "unknown score",
        "prune wanda",
        params(prune__selection__score="sgpt", variants__wanda__selection={}),
        ("score", "'sgpt'", "obs"),
    ),
    Mistake(
        "unknown step",
        "prune wanda",
        wanda(reconstruction={"steps": ["gptq"]}),
        ("reconstruction.steps", "'gptq'", "finetune_channels"),
    ),
    Mistake(
        "steps in another order",
        "prune wanda",
        wanda(reconstruction={"steps": ["finetune", "obs"]}),
        (
            "variants.wanda.reconstruction.steps",
            "['finetune', 'obs']",
            "obs, lsq, finetune_channels, finetune",
        ),
    ),
    Mistake(
        "a step twice",
        "prune wanda",
        wanda(reconstruction={"steps": ["obs", "obs"]}),
        ("variants.wanda.reconstruction.steps", "['obs', 'obs']", "each step at most once"),
    ),
    Mistake(
        "steps in another order, induction",
        "induce sparseline",
        params(variants__sparseline__reconstruction={"steps": ["lsq", "obs"]}),
        (
            "variants.sparseline.reconstruction.steps",
            "['lsq', 'obs']",
            "obs, lsq, finetune_channels, finetune",
        ),
    ),
    Mistake(
        "a dense target with statistics per block",
        "prune wanda",
        wanda(reconstruction={"steps": ["obs"], "dense_target": 0.5}),
        ("variants.wanda.reconstruction", "dense_target", "statistics: per_site"),
    ),
    Mistake(
        "a dense target without a step that changes weights",
        "prune wanda",
        wanda(reconstruction={"steps": [], "statistics": "per_site", "dense_target": 0.5}),
        ("variants.wanda.reconstruction", "dense_target", "obs or lsq"),
    ),
    Mistake(
        "a dense target above 1",
        "prune wanda",
        wanda(reconstruction={"steps": ["obs"], "statistics": "per_site", "dense_target": 1.5}),
        ("variants.wanda.reconstruction.dense_target", "= 1.5 ", "less than or equal to 1"),
    ),
    Mistake(
        "unknown time of statistics",
        "prune wanda",
        wanda(reconstruction={"steps": ["obs"], "statistics": "matrix"}),
        ("variants.wanda.reconstruction.statistics", "'matrix'", "'per_site'"),
    ),
    Mistake(
        "empty window",
        "prune wanda",
        params(prune__reconstruction__finetune__window=0),
        ("reconstruction.finetune.window", "= 0 ", "1"),
    ),
    Mistake(
        "unknown part",
        "prune wanda",
        params(prune__reconstruction__finetune__parts=["weights", "embeddings"]),
        ("reconstruction.finetune.parts", "'embeddings'", "'norms'"),
    ),
    Mistake(
        "no part",
        "prune wanda",
        params(prune__reconstruction__finetune_channels__parts=[]),
        ("reconstruction.finetune_channels.parts", "[]", "1"),
    ),
    Mistake(
        "a window of channel factors",
        "prune wanda",
        params(prune__reconstruction__finetune_channels__window=2),
        ("reconstruction.finetune_channels.window", "not a known key"),
    ),
    Mistake(
        "a budget that is a setting now",
        "keys",
        params(prune__activation_budget_bytes=1),
        ("prune.activation_budget_bytes is no longer a key", "SPARSELINE_ACTIVATION_BYTES", "remove it"),
    ),
    Mistake(
        "a budget that is a setting now, of a variant",
        "prune wanda",
        wanda(activation_budget_bytes=1),
        ("variants.wanda.activation_budget_bytes is not a known key", "batch_rows"),
    ),
    Mistake(
        "prediction without curves",
        "allocate wanda",
        wanda(allocation={"method": "predicted"}),
        ("build/curves/wanda.json", "dvc repro"),
    ),
    Mistake(
        "densities out of order",
        "curves sparseline",
        params(curves__densities=[0.5, 0.2]),
        ("curves.densities", "[0.5, 0.2]", "increase"),
    ),
    Mistake(
        "densities of a variant out of order",
        "curves sparseline",
        params(variants__sparseline__curves={"densities": [0.5, 0.2]}),
        ("variants.sparseline.curves.densities", "[0.5, 0.2]", "increase"),
    ),
    Mistake("curves of no variant", "curves other", params(), ("variants.other", "add it")),
    Mistake(
        "bounds that miss the budget",
        "allocate wanda",
        wanda(allocation={"density_bounds": [0.6, 0.9]}),
        ("0.6", "0.9", "sparsity 0.5", "allocation.density_bounds"),
    ),
    Mistake(
        "bounds in the wrong order",
        "prune wanda",
        wanda(allocation={"density_bounds": [0.9, 0.1]}),
        ("allocation", "[0.9, 0.1]", "low <= high"),
    ),
    Mistake(
        "one bound",
        "prune wanda",
        wanda(allocation={"density_bounds": [0.9]}),
        ("allocation.density_bounds", "missing"),
    ),
    Mistake(
        "nothing included",
        "prepare",
        params(model__include=[]),
        ("model.include", "model.exclude", "widen include"),
    ),
    Mistake(
        "everything excluded",
        "prepare",
        params(model__exclude=["*"]),
        ("model.include", "model.exclude", "widen include"),
    ),
    Mistake(
        "a pattern that matches nothing",
        "prepare",
        params(model__include=["*.nothing"]),
        ("model.include", "'*.nothing' matches no matrix", FIRST, "layers.1.mlp.down_proj"),
    ),
    Mistake(
        "a set of letters",
        "prepare",
        params(model__exclude=["layers.[01].*"]),
        ("'layers.[01].*'", "brackets are literal"),
    ),
    Mistake(
        "what is never pruned",
        "prepare",
        params(model__exclude=["lm_head"]),
        ("'lm_head'", "lm_head.weight, which is never pruned"),
    ),
    Mistake(
        "a bad expression",
        "prepare",
        params(model__exclude=["re:layers.(0"]),
        ("'re:layers.(0'", "not a regular expression", "correct it"),
    ),
    Mistake(
        "a word for a list",
        "prepare",
        params(model__exclude="layers.0.*"),
        ("model.exclude", "'layers.0.*'", "list"),
    ),
    Mistake(
        "a word for a variant",
        "prune wanda",
        params(variants__wanda="on"),
        ("variants.wanda", "'on'", "mapping"),
    ),
    Mistake(
        "a word for induction",
        "induce sparseline",
        params(variants__sparseline__induce="on"),
        ("variants.sparseline.induce", "'on'", "mapping"),
    ),
    Mistake(
        "unknown key of induction",
        "induce sparseline",
        params(variants__sparseline__induce={"stepps": 3}),
        ("variants.sparseline.induce.stepps is not a known key", "steps"),
    ),
    Mistake(
        "induction of a variant that is not there",
        "induce nonsense",
        params(),
        ("variants.nonsense", "add it"),
    ),
    Mistake(
        "a word for the selection, induction",
        "induce sparseline",
        params(variants__sparseline__selection="obs"),
        ("variants.sparseline.selection", "'obs'", "mapping"),
    ),
    Mistake(
        "unknown step, induction",
        "induce sparseline",
        params(variants__sparseline__reconstruction={"steps": ["gptq"]}),
        ("variants.sparseline.reconstruction.steps", "'gptq'", "finetune_channels"),
    ),
    Mistake(
        "missing steps, induction",
        "induce sparseline",
        params(prune__reconstruction__steps=REMOVED, variants__sparseline__reconstruction={}),
        ("variants.sparseline.reconstruction.steps", "missing"),
    ),
    Mistake(
        "a word for the export",
        "export sparseline",
        params(variants__sparseline__export="on"),
        ("variants.sparseline.export", "'on'", "list"),
    ),
    Mistake(
        "a format that does not exist",
        "export sparseline",
        params(variants__sparseline__export=["onnx"]),
        ("variants.sparseline.export", "'onnx'", "bitmask"),
    ),
    Mistake(
        "compressed-tensors of a variant that is not quantised",
        "export sparseline",
        params(variants__sparseline__export=["compressed-tensors"]),
        ("sparseline", "not quantised", "variants.sparseline.export"),
    ),
    Mistake("unknown variant", "prune nonsense", params(), ("variants.nonsense", "add it")),
    Mistake("unknown text", "text nonsense", params(), ("texts.nonsense", "add it")),
    Mistake(
        "a preset that does not exist",
        "keys",
        wanda(tasks=["gone"]),
        ("variants.wanda.tasks names 'gone'", "presets: embedded"),
    ),
    Mistake(
        "a word for a candidate",
        "choose",
        wanda(candidate="maybe"),
        ("variants.wanda.candidate", "'maybe'", "bool"),
    ),
    Mistake(
        "half precision by another name",
        "prepare",
        params(model__compute_dtype="fp16"),
        ("model.compute_dtype", "'fp16'", "bfloat16"),
    ),
    Mistake(
        "a task that does not exist",
        "tasks dense",
        params(presets__embedded__names=["nonsense"]),
        ("'nonsense'", "data/tasks", "corrupted"),
    ),
    Mistake(
        "completions of a text that does not exist",
        "evaluate dense",
        params(evaluate__completions__text="nonsense"),
        ("evaluate.completions.text", "'nonsense'", "test"),
    ),
    Mistake(
        "longer prompts than rows",
        "evaluate dense",
        params(evaluate__completions__prompt_tokens=100),
        ("100 tokens", "'test'", "lower count or prompt_tokens"),
    ),
]


def replace_model(**arguments: Any) -> Change:
    def change(workspace: Path) -> None:
        shutil.rmtree(workspace / "data" / "model")
        make_model(workspace / "data" / "model", **{"family": "llama", **arguments})

    return change


def remove(*names: str) -> Change:
    def change(workspace: Path) -> None:
        for name in names:
            path = workspace / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def cut_short(workspace: Path) -> None:
    path = workspace / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def pickled(workspace: Path) -> None:
    torch.save(load_file(workspace / WEIGHTS), workspace / "data" / "model" / "pytorch_model.bin")
    (workspace / WEIGHTS).unlink()


def config(**values: Any) -> Change:
    return lambda workspace: change_json(
        workspace / "data" / "model" / "config.json", lambda old: old | values
    )


def written(name: str, content: str) -> Change:
    def change(workspace: Path) -> None:
        (workspace / name).write_text(content, encoding="utf-8")

    return change


def hub(model_id: str, revision: str | None) -> Change:
    return params(model__path="data/hub.json", model__id=model_id, model__revision=revision)


def added_token(workspace: Path) -> None:
    """A token without an embedding: the model's vocabulary has 320."""
    tokens = [f"<{number}>" for number in range(257, 320)] + ["<extra>"]
    tokenizer = AutoTokenizer.from_pretrained(workspace / "data/model")
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(workspace / "data/model")


def weights(
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    more: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> Change:
    """Replace one stored tensor, and add ``more``."""

    def apply(workspace: Path) -> None:
        tensors = load_file(workspace / WEIGHTS)
        tensors[name] = change(tensors[name].clone())
        tensors |= more
        save_file(tensors, workspace / WEIGHTS, metadata={"format": "pt"})

    return apply


def both(first: Change, second: Change) -> Change:
    def change(workspace: Path) -> None:
        first(workspace)
        second(workspace)

    return change


def with_entry(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1, 2] = value
        return tensor

    return change


KEY = "model.layers.1.self_attn.k_proj.weight"
HEAD = "lm_head.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
HUGE = weights(DOWN, lambda tensor: tensor.sign() * 3e38)
TEXTS = ("text calibration", "text validation", "text test")

MODELS = [
    Mistake(
        "no directory",
        "prepare",
        params(model__path="data/none"),
        ("model.path", "'data/none'", "config.json and *.safetensors"),
    ),
    Mistake(
        "no weights",
        "prepare",
        remove(str(WEIGHTS)),
        ("data/model", "model.safetensors", "give a directory with the weights"),
    ),
    Mistake("no config", "prepare", remove("data/model/config.json"), ("data/model", "config.json")),
    Mistake(
        "truncated weights", "prepare", cut_short, (str(WEIGHTS), "truncated", "fetch the checkpoint again")
    ),
    Mistake(
        "weights truncated after prepare",
        "calibrate",
        cut_short,
        (str(WEIGHTS), "truncated", "fetch the checkpoint again"),
    ),
    Mistake(
        "pickled weights only",
        "prepare",
        pickled,
        ("data/model", "pytorch_model.bin", "python -m stages.convert data/model OUT"),
    ),
    Mistake(
        "a commit without a hub model",
        "prepare",
        params(model__revision="0" * 40),
        ("model.revision", "model.id is null", "null too"),
    ),
    Mistake(
        "a directory as id",
        "prepare",
        hub("./data/model", None),
        ("'./data/model'", "local directory", "model.path"),
    ),
    Mistake(
        "a directory watched for a hub model",
        "prepare",
        params(model__id="org/name"),
        ("'data/model'", "'org/name'", "data/hub.json"),
    ),
    Mistake(
        "a hub model without a commit",
        "prepare",
        hub("org/name", None),
        ("model.revision = None", "full hash", "git ls-remote"),
    ),
    Mistake(
        "a branch as commit",
        "prepare",
        hub("org/name", "main"),
        ("model.revision = 'main'", "full hash", "git ls-remote"),
    ),
    Mistake(
        "a hub model that is not here",
        "prepare",
        hub("org/name", "0" * 40),
        ("'org/name'", "cannot be fetched from the hub"),
    ),
    Mistake(
        "another head",
        "prepare",
        config(architectures=["LlamaForSequenceClassification"]),
        ("config.json", "LlamaForSequenceClassification", "LlamaForCausalLM"),
    ),
    Mistake(
        "a value head",
        "prepare",
        weights(KEY, lambda tensor: tensor, {"v_head.summary.weight": torch.ones(1, 32)}),
        ("data/model", "v_head.summary.weight", "pruning would lose it"),
    ),
    Mistake(
        "a bias that the config does not know",
        "prepare",
        weights(KEY, lambda tensor: tensor, {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        ("self_attn.q_proj.bias", "LlamaForCausalLM has no place"),
    ),
    Mistake(
        "two sets of weights",
        "prepare",
        written("data/model/model.safetensors.index.json", "{}"),
        ("model.safetensors and model.safetensors.index.json", "keep the files of one set"),
    ),
    Mistake(
        "a tokenizer file that came later",
        "calibrate",
        written("data/model/special_tokens_map.json", "{}"),
        ("special_tokens_map.json has changed", "dvc repro"),
    ),
    Mistake(
        "a token beyond the embedding",
        "text calibration",
        both(
            added_token,
            both(
                params(texts__calibration__distinct=2),
                written("data/texts/calibration.txt", "letters <extra> " * 100),
            ),
        ),
        ("token 320 ('<extra>')", "vocabulary has 320"),
        ("prepare",),
    ),
    Mistake(
        "tokenizer of a larger vocabulary",
        "prepare",
        replace_model(vocab_size=100),
        ("data/model", "tokenizer", "plain text", "100", "own tokenizer"),
    ),
    Mistake(
        "no tokenizer",
        "prepare",
        remove("data/model/tokenizer.json", "data/model/tokenizer_config.json"),
        ("data/model", "tokenizer"),
    ),
    Mistake(
        "weights of another type",
        "prepare",
        config(model_type="mixtral", architectures=["MixtralForCausalLM"]),
        ("no tensor", "block_sparse_moe", "fetch the checkpoint again"),
    ),
    Mistake(
        "quantised",
        "prepare",
        config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
        ("quantised", "original checkpoint"),
    ),
    Mistake(
        "fewer blocks than the config",
        "prepare",
        config(num_hidden_layers=3),
        ("model.layers.2.", "config.json", "fetch"),
    ),
    Mistake(
        "weights changed after prepare",
        "calibrate",
        weights(KEY, with_entry(0.5)),
        (str(WEIGHTS), "changed", "dvc repro"),
    ),
    Mistake(
        "weights changed, scale",
        "scale",
        weights(KEY, with_entry(0.5)),
        (str(WEIGHTS), "changed", "dvc repro"),
    ),
    Mistake(
        "weights changed, sensitivity",
        "sensitivity",
        weights(KEY, with_entry(0.5)),
        (str(WEIGHTS), "changed", "dvc repro"),
    ),
    Mistake(
        "weights changed, prune",
        "prune wanda",
        weights(KEY, with_entry(0.5)),
        (str(WEIGHTS), "changed", "dvc repro"),
    ),
    Mistake(
        "weights changed, evaluate",
        "evaluate dense",
        weights(KEY, with_entry(0.5)),
        (str(WEIGHTS), "changed", "dvc repro"),
    ),
    *(
        Mistake(
            f"{value} in the weights, {stage}",
            stage,
            weights(KEY, with_entry(value)),
            (str(WEIGHTS), KEY, "NaN or infinity"),
            ("prepare",),
        )
        for value in (float("nan"), float("inf"))
        for stage in ("calibrate", "prune wanda")
    ),
    Mistake(
        "nan in the weights, prepare",
        "prepare",
        weights(KEY, with_entry(float("nan"))),
        (str(WEIGHTS), KEY, "NaN or infinity"),
    ),
    Mistake("overflow, prepare", "prepare", HUGE, ("layers.1", "NaN or infinity", "float32")),
    Mistake(
        "nan in the weights, sensitivity",
        "sensitivity",
        weights(KEY, with_entry(float("nan"))),
        ("NaN or infin",),
        ("prepare",),
    ),
    Mistake(
        "nan in the head, sensitivity",
        "sensitivity",
        weights(HEAD, with_entry(float("nan"))),
        ("NaN or infin",),
        ("prepare",),
    ),
    Mistake(
        "nan in the head, prune",
        "prune wanda",
        weights(HEAD, with_entry(float("nan"))),
        (HEAD, "NaN or infinity"),
        ("prepare",),
    ),
    Mistake(
        "nan in the head, evaluate",
        "evaluate dense",
        weights(HEAD, with_entry(float("nan"))),
        ("NaN or infin",),
        ("prepare",),
    ),
    *(
        Mistake(f"overflow, {stage}", stage, HUGE, ("layers.1", "NaN or infinity", "float32"), ("prepare",))
        for stage in ("calibrate", "sensitivity", "prune wanda", "prune sparseline")
    ),
    Mistake(
        "positions beyond the model's",
        "text test",
        both(replace_model(family="opt"), params(texts__test__length=200)),
        ("texts.test.length", "200", "128"),
        ("prepare",),
    ),
]


DATA = [
    Mistake(
        "empty text",
        "text test",
        written("data/texts/test.txt", " \n"),
        ("data/texts/test.txt", "empty", "non-empty"),
    ),
    Mistake(
        "short text",
        "text test",
        written("data/texts/test.txt", "a" * 99),
        ("data/texts/test.txt", "3 samples of 32 tokens", "8 are requested", "lower rows"),
    ),
    Mistake(
        "no such text",
        "text test",
        params(texts__test__path="data/texts/none.txt"),
        ("data/texts/none.txt", "path"),
    ),
    Mistake("a text's name", "keys", params(**{"texts__a b": {}}), ("text name 'a b'", "letters, digits")),
    Mistake(
        "a repeated letter",
        "text test",
        written("data/texts/test.txt", "a" * 999),
        ("2 different tokens", "`distinct` of 16"),
    ),
    Mistake(
        "calibration text taken whole",
        "text calibration",
        params(texts__calibration__rows=None),
        (
            "texts.calibration.use = 'calibrate' with texts.calibration.rows = None",
            "use: evaluate",
            "number of rows",
        ),
    ),
    Mistake(
        "unknown use",
        "text test",
        params(texts__test__use="train"),
        ("texts.test.use", "'train'", "evaluate"),
    ),
    *(
        Mistake(
            f"two calibration texts, {stage}",
            stage,
            params(texts__validation__use="calibrate"),
            ("texts", "exactly one", "use: calibrate", "not 2"),
            ("text validation",),
        )
        for stage in ("calibrate", "sensitivity", "induce sparseline", "prune wanda")
    ),
    Mistake(
        "no calibration text",
        "calibrate",
        remove("build/texts/calibrate"),
        ("build/texts/calibrate", "is missing", "dvc repro"),
    ),
    Mistake(
        "other packages",
        "calibrate",
        lambda workspace: change_json(workspace / "env.lock.json", lambda old: old | {"torch": "1.13"}),
        ("env.lock.json", "torch 1.13", torch.__version__.split("+")[0], "make environment"),
    ),
    Mistake(
        "damaged list of packages", "calibrate", written("env.lock.json", "{"), ("env.lock.json", "JSON")
    ),
    Mistake("no list of packages", "calibrate", remove("env.lock.json"), ("env.lock.json",)),
    Mistake(
        "a package that is not here",
        "calibrate",
        written("env.lock.json", '{"nonsense": "1.0"}'),
        ("env.lock.json", "nonsense"),
    ),
    Mistake(
        "no evaluation text",
        "evaluate dense",
        remove("build/texts/evaluate"),
        ("build/texts/evaluate/test.safetensors", "dvc repro"),
    ),
    Mistake(
        "damaged statistics",
        "scale",
        written("build/calibrate/block-001.safetensors", "x"),
        ("block-001.safetensors", "dvc repro"),
    ),
    Mistake(
        "a text that is not evaluated",
        "choose",
        params(choose__text="calibration"),
        ("choose.text = 'calibration'", "validation, test"),
    ),
    Mistake(
        "a baseline that is no variant",
        "keys",
        params(report__baseline="old"),
        ("report.baseline = 'old'", "variants: wanda, sparseline"),
    ),
    Mistake(
        "missing candidate",
        "choose",
        remove("build/evaluate/wanda.json"),
        ("build/evaluate/wanda.json", "dvc repro"),
    ),
    Mistake(
        "missing facts", "report", remove("build/facts/wanda.json"), ("build/facts/wanda.json", "dvc repro")
    ),
    Mistake(
        "missing evaluation",
        "report",
        remove("build/evaluate/dense.json"),
        ("build/evaluate/dense.json", "dvc repro"),
    ),
    Mistake(
        "params.yaml that is no YAML",
        "calibrate",
        written("params.yaml", "model: [1, 2"),
        ("params.yaml", "YAML"),
    ),
    Mistake("no params.yaml", "calibrate", remove("params.yaml"), ("params.yaml", "No such file")),
]


def ids(mistakes: list[Mistake]) -> list[str]:
    return [mistake.name for mistake in mistakes]


@pytest.mark.parametrize("mistake", PARAMETERS, ids=ids(PARAMETERS))
def test_bad_parameters(shared: Path, mistake: Mistake) -> None:
    """Oracle: the key with its place in params.yaml, the value that stands there, and what is allowed."""
    assert not mistake.before
    mistake.change(shared)
    check(shared, mistake.stage, mistake.words)


@pytest.mark.parametrize("mistake", MODELS, ids=ids(MODELS))
def test_bad_models(workspace: Path, monkeypatch: pytest.MonkeyPatch, mistake: Mistake) -> None:
    """Oracle: the error names the damaged file, tensor or block, and the remedy. If another stage
    finds the damage, `prepare` tries no coupling and does not see it.
    """
    if mistake.stage != "prepare":
        monkeypatch.setattr("pipeline_lib.jobs.prepare.verified", untried)
    mistake.change(workspace)
    build(*mistake.before)
    adopt(workspace)
    check(workspace, mistake.stage, mistake.words)


def untried(model: BlockModel) -> Iterator[tuple[Layout, tuple[str, ...]]]:
    return ((layout, ()) for layout in model.checkpoint.architecture.layouts)


@pytest.mark.parametrize("mistake", DATA, ids=ids(DATA))
def test_bad_data(workspace: Path, mistake: Mistake) -> None:
    """Oracle: the error names the file or key, and the remedy."""
    mistake.change(workspace)
    build(*mistake.before)
    check(workspace, mistake.stage, mistake.words)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SPARSELINE_THREADS", "zero", ("SPARSELINE_THREADS=zero", "positive whole number")),
        ("SPARSELINE_THREADS", "0", ("SPARSELINE_THREADS=0", "positive whole number")),
        ("SPARSELINE_THREADS", "1.5", ("SPARSELINE_THREADS=1.5", "positive whole number")),
        ("SPARSELINE_GRAM_BYTES", "4GB", ("SPARSELINE_GRAM_BYTES=4GB", "whole number of bytes")),
        ("SPARSELINE_DEVICE", "nonsense", ("SPARSELINE_DEVICE=nonsense", "use cpu")),
        ("SPARSELINE_DEVICE", "cuda:99", ("SPARSELINE_DEVICE=cuda:99", "use cpu")),
        ("SPARSELINE_DEVICE", "auto", ("SPARSELINE_DEVICE=auto", "this machine has none", "use cpu")),
    ],
)
def test_bad_settings(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: tuple[str, ...]
) -> None:
    """Oracle: the variable as it was set, and what it may be."""
    monkeypatch.setenv(name, value)
    check(workspace, "calibrate", words)


@pytest.mark.parametrize("stage", ["calibrate", "prune wanda"])
def test_nothing_is_written_where_nothing_was(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """A stage that fails half-way (block 1 overflows, block 0 is done) leaves no output behind.
    Oracle: the files that are there.
    """
    monkeypatch.setattr("pipeline_lib.jobs.prepare.verified", untried)
    HUGE(workspace)
    build("prepare")
    for path in ("build/calibrate", "build/prune", "build/facts", "build/costs", "build/keys"):
        shutil.rmtree(workspace / path)
    told(invoke(*stage.split()))
    assert {path.split("/")[0] for path in tree(workspace / "build")} == {
        "prepare",
        "texts",
        "scale",
        "sensitivity",
        "curves",
        "allocate",
        "induce",
        "distil",
        "training",
        "evaluate",
        "completions",
        "tasks",
        "export",
        "sizes",
        "choice.json",
    }
    assert not list((workspace / "build").rglob("*partial*"))


def test_an_unquoted_pattern_is_read_as_it_is_meant(workspace: Path) -> None:
    """YAML 1.1 reads 2:4 as 124; params.yaml is YAML 1.2. Oracle: two kept of every four inputs in
    every mask.
    """
    change_params(workspace, "variants.wanda.selection", {**SELECTION, "pattern": "PATTERN"})
    path = workspace / "params.yaml"
    path.write_text(re.sub(r"['\"]?PATTERN['\"]?", "2:4", path.read_text(encoding="utf-8")), encoding="utf-8")
    assert "pattern: 2:4" in path.read_text(encoding="utf-8")
    build("prune wanda")
    tensors = load_file(workspace / "build/prune/wanda/checkpoint/model-00001-of-00003.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            assert (tensor.reshape(-1, 4).ne(0).sum(1) == 2).all(), name


def test_an_empty_section_is_an_empty_mapping(workspace: Path) -> None:
    """``reconstruction:`` with nothing behind it is YAML's null. Oracle: the bytes that
    ``reconstruction: {}`` gives.
    """
    change_params(workspace, "variants.sparseline.reconstruction", {})
    build("induce sparseline")
    before = tree(workspace / "build" / "induce" / "sparseline")
    change_params(workspace, "variants.sparseline.reconstruction", None)
    build("induce sparseline")
    assert tree(workspace / "build" / "induce" / "sparseline") == before


def test_an_empty_section_induce_learns_and_null_does_not(workspace: Path) -> None:
    """``induce: {}`` takes the defaults. Oracle: the files."""
    change_params(workspace, "variants.sparseline.induce", None)
    shutil.rmtree(workspace / "build" / "induce" / "sparseline")
    build("induce sparseline")
    assert tree(workspace / "build" / "induce" / "sparseline").keys() == {"curve.json", "seal.json"}
    change_params(workspace, "variants.wanda.induce", {})
    build("keys", "induce wanda")
    assert "transform.safetensors" in tree(workspace / "build" / "induce" / "wanda")


def test_a_variant_may_say_nothing(workspace: Path) -> None:
    """It is the defaults then. Oracle: the bytes of one that repeats a default."""
    change_params(workspace, "variants.wanda", None)
    build("prune wanda")
    before = tree(workspace / "build" / "prune" / "wanda")
    change_params(workspace, "variants.wanda", {"batch_rows": read_params(workspace)["prune"]["batch_rows"]})
    build("prune wanda")
    assert tree(workspace / "build" / "prune" / "wanda") == before


@pytest.mark.parametrize("empty", [None, {}], ids=["null", "mapping"])
def test_a_variant_that_changes_nothing_can_be_induced(workspace: Path, empty: Any) -> None:
    """Oracle: the bytes of a variant that repeats the defaults in full."""
    defaults = read_params(workspace)["prune"]
    change_params(workspace, "variants.sparseline.selection", defaults["selection"])
    change_params(workspace, "variants.sparseline.reconstruction", defaults["reconstruction"])
    build("induce sparseline")
    before = tree(workspace / "build" / "induce")
    change_params(workspace, "variants.sparseline.selection", empty)
    change_params(workspace, "variants.sparseline.reconstruction", empty)
    build("induce sparseline")
    assert tree(workspace / "build" / "induce") == before


def test_a_renamed_text_takes_the_place_of_the_old(workspace: Path) -> None:
    """DVC keeps the outputs of deleted stages. Oracle: only one text is for calibration, so there
    is no error.
    """
    values = read_params(workspace)
    values["texts"]["other"] = values["texts"].pop("calibration")
    write_params(workspace, values)
    build("keys", "text other", "calibrate")


def test_a_singular_second_moment_raises_the_damping(workspace: Path) -> None:
    """Oracle: 8 tokens cannot span 32 channels, so without damping no factorisation exists; facts
    and log name what was needed.
    """
    change_params(workspace, "texts.calibration.rows", 1)
    change_params(workspace, "texts.calibration.held_out", 0)
    change_params(workspace, "texts.calibration.length", 8)
    change_params(workspace, "texts.calibration.distinct", 1)
    change_params(workspace, "prune.selection.damping", 1e-12)
    change_params(workspace, "variants.wanda.reconstruction.steps", ["obs"])
    build("text calibration")
    result = invoke("prune", "wanda")
    assert result.exit_code == 0, result.output
    matrices = artifacts.read_json(workspace / "build" / "facts" / "wanda.json")["matrices"]
    raised = {name for name, facts in matrices.items() if facts["damping"] > 1e-12}
    assert FIRST in raised
    line = next(line for line in result.stdout.splitlines() if "damping was raised" in line)
    assert set(line.split("damping was raised for ")[1].split(", ")) == raised


def test_a_second_moment_of_nan_is_told(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the site. Finite weights whose activations overflow inside a block must not become a mask."""
    monkeypatch.setattr("pipeline_lib.jobs.prepare.verified", untried)
    weights("model.layers.0.mlp.up_proj.weight", lambda tensor: tensor.sign() * 3e38)(workspace)
    build("prepare")
    adopt(workspace)
    check(workspace, "prune wanda", ("layers.0", "NaN or infinity"))
    check(workspace, "calibrate", ("layers.0", "NaN or infinity"))


@pytest.mark.parametrize(
    ("stage", "change", "words"),
    [
        (("prepare",), cut_short, (str(WEIGHTS), "truncated")),
        (("prune", "wanda"), wanda(selection={"sparsity": 2}), ("variants.wanda.selection.sparsity", "= 2 ")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and isinstance(value[0], str) else "",
)
def test_stages_as_dvc_runs_them(
    workspace: Path, stage: tuple[str, ...], change: Change, words: tuple[str, ...]
) -> None:
    """A real process: the whole of its output is the error, without warnings of the interpreter.
    Oracle: the text and the exit code.
    """
    change(workspace)
    before = outputs(workspace)
    output = run(workspace, "python", "-m", f"stages.{stage[0]}", *stage[1:], code=2)
    assert output.startswith("error: ") and output.count("\n") == 1, output
    assert all(word in output for word in words), output
    assert outputs(workspace) == before
