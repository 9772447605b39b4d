"""What of a model directory is loaded, copied, left out or refused; patterns over matrices;
conversion; the hub. Oracle: transformers, and the files.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from project import build, change_params, invoke, make_workspace
from safetensors.torch import load_file, save_file
from tiny import all_tensors, load_full, make_model, token_rows
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import _get_resolved_checkpoint_files

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.export import manifest
from pipeline_lib.export.load import tensors as bitmask_tensors
from pipeline_lib.models import source, tokenizer
from pipeline_lib.models.checkpoint import Checkpoint, ShardWriter, open_checkpoint
from pipeline_lib.models.files import INDEX, find_files
from pipeline_lib.models.names import select
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.source import fetch, not_fetched
from pipeline_lib.models.tokenizer import load_tokenizer
from pipeline_lib.models.whole import load_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def touch(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"x")


def write_unchanged(checkpoint: Checkpoint, directory: Path) -> None:
    writer = ShardWriter(checkpoint, directory)
    for block in range(checkpoint.architecture.depth):
        writer.write(block, checkpoint.block(block))
    writer.finish()


# Weights


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_weights_are_those_that_transformers_resolves(tmp_path: Path, shard_size: str) -> None:
    path = make_model(tmp_path / "model", "llama", shard_size=shard_size)
    touch(
        path,
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors",
        "onnx/model.safetensors",
    )
    resolved, _ = _get_resolved_checkpoint_files(path, None, None, None, None, False)
    assert [str(path / name) for name in find_files(path).weights] == [str(file) for file in resolved]


def test_an_index_of_one_file_is_no_second_set(tmp_path: Path) -> None:
    """Some repositories have one beside model.safetensors. Oracle: its own weight_map; transformers
    reads the file, not the index.
    """
    path = make_model(tmp_path / "model", "llama")
    weight_map = dict.fromkeys(load_file(path / "model.safetensors"), "model.safetensors")
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    checkpoint = open_checkpoint(path)
    assert not checkpoint.indexed and INDEX in checkpoint.left_out and INDEX not in checkpoint.others
    write_unchanged(checkpoint, tmp_path / "out")
    assert all_tensors(tmp_path / "out").keys() == weight_map.keys()


@pytest.mark.parametrize("name", [INDEX, "model-00001-of-00002.safetensors"])
def test_measuring_refuses_a_second_set_too(copy_of: Callable[[str], Path], name: str) -> None:
    """Weights that someone puts into a pruned checkpoint are not measured in its name."""
    path = copy_of("llama")
    touch(path, name)
    with pytest.raises(SparselineError, match=f"model.safetensors and {name}"):
        load_model(path, "float32", torch.device("cpu"))


def index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        value = json.loads((path / INDEX).read_text())
        change(value)
        (path / INDEX).write_text(json.dumps(value))

    return apply


def twice(path: Path) -> None:
    """One tensor in two shards."""
    first, second = sorted(path.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second, metadata={"format": "pt"})


def nested(path: Path) -> None:
    (path / "sub").mkdir()
    for file in path.glob("model*"):
        file.rename(path / "sub" / file.name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda path: touch(path, "model.safetensors"),
            ("model.safetensors and model.safetensors.index.json", "keep the files of one set"),
        ),
        (
            lambda path: touch(path, "model-00009-of-00009.safetensors"),
            (INDEX, "model-00009-of-00009.safetensors"),
        ),
        (lambda path: touch(path, "model.fp16.safetensors"), (INDEX, "model.fp16.safetensors")),
        (lambda path: (path / INDEX).unlink(), ("model-00001-of-00006.safetensors", "fetch the index")),
        (
            lambda path: (path / "model-00002-of-00006.safetensors").unlink(),
            ("model-00002-of-00006.safetensors is missing", INDEX),
        ),
        (twice, ("model-00001-of-00006.safetensors and model-00002-of-00006.safetensors both hold",)),
        (
            index(lambda value: value["weight_map"].update(lost="model-00001-of-00006.safetensors")),
            ("names lost in model-00001",),
        ),
        (
            index(lambda value: value["weight_map"].update(lost="../model.safetensors")),
            ("../model.safetensors", "one directory"),
        ),
        (
            index(lambda value: value["weight_map"].update(lost="config.json")),
            ("names config.json", ".safetensors file"),
        ),
        (index(lambda value: value["weight_map"].update(lost=3)), ("is damaged",)),
        # without which transformers fails
        (index(lambda value: value.pop("metadata")), ("is damaged", "metadata")),
        (lambda path: touch(path, "adapter_config.json"), ("adapter_config.json", "merge_and_unload")),
        (
            lambda path: (path / "LICENSE").symlink_to("nowhere"),
            ("LICENSE is a link to a file that is not there",),
        ),
        (lambda path: os.mkfifo(path / "pipe"), ("pipe is not a regular file (a named pipe)",)),
        (nested, ("model/sub holds weights", "side by side")),
    ],
)
def test_what_is_ambiguous_is_refused(
    tmp_path: Path, change: Callable[[Path], object], words: tuple[str, ...]
) -> None:
    """Oracle: both files by name."""
    path = make_model(tmp_path / "model", "llama", shard_size="20KB")
    change(path)
    with pytest.raises(SparselineError) as refused:
        open_checkpoint(path)
    assert all(word in str(refused.value) for word in words), str(refused.value)


@pytest.mark.parametrize("name", ["LICENSE", "model.safetensors"])
def test_an_unreadable_file_is_named(
    copy_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Before anything is computed. Root reads every file, so that the refusal is the system's in
    name only.
    """
    path, plain = copy_of("llama"), os.open
    touch(path, "LICENSE")

    def refuse(file: Any, *args: Any, **kwargs: Any) -> int:
        if file == path / name:
            raise PermissionError(13, "Permission denied")
        return plain(file, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SparselineError, match=rf"{name} cannot be read \(Permission denied\)"):
        open_checkpoint(path)


# Parts


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_a_tie_goes_both_ways(tmp_path: Path, family: str) -> None:
    """OPT-125M's files hold the head alone. Oracle: the logits of the same weights under the
    embedding's name, and the tie after loading.
    """
    path = make_model(tmp_path / "model", family, tie_word_embeddings=True)
    before = load_full(path)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop(
        next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
    )
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    write_unchanged(open_checkpoint(path), tmp_path / "out")
    after, rows = load_full(tmp_path / "out"), token_rows(2, 9)
    assert all_tensors(tmp_path / "out").keys() == tensors.keys()
    assert after.get_input_embeddings().weight.data_ptr() == after.get_output_embeddings().weight.data_ptr()
    with torch.no_grad():
        assert torch.equal(after(rows).logits, before(rows).logits)


def test_a_base_model_needs_a_head(copy_of: Callable[[str], Path]) -> None:
    """LlamaModel: refused by name where the head is a weight of its own, taken where it is the embedding."""
    path = copy_of("llama")
    config = json.loads((path / "config.json").read_text()) | {"architectures": ["LlamaModel"]}
    tensors = load_file(path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        SparselineError, match=r"is a LlamaModel, saved without the head .*save the model as LlamaForCausalLM"
    ):
        open_checkpoint(path)
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "lm_head.weight" not in open_checkpoint(path).files


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": -32},
        {"num_attention_heads": 0},
        {"num_hidden_layers": "two"},
        {"hidden_act": "none"},
        {"head_dim": 0},
        {"model_type": ["llama"]},
        {"architectures": 3},
        {"transformers_weights": "other.safetensors"},
        {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
    ],
    ids=str,
)
def test_a_config_that_makes_no_model_is_told(copy_of: Callable[[str], Path], change: dict[str, Any]) -> None:
    path = copy_of("llama")
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | change))
    with pytest.raises(SparselineError, match=r"config\.json"):
        open_checkpoint(path)


def test_every_file_is_copied_or_named(tmp_path: Path) -> None:
    """Oracle: the directory's listing: each file is a weight, is copied, or has a reason; through
    prune's writer, every format and unpack.
    """
    workspace = make_workspace(tmp_path / "project")
    model = workspace / "data" / "model"
    copied = [
        "LICENSE",
        "USE_POLICY.md",
        "modeling_own.py",
        "additional_chat_templates/rag.jinja",
        "vocab.bpe",
        "tekken.json",
    ]
    named = [
        "README.md",
        ".gitattributes",
        "tf_model.h5",
        "training_args.bin",
        "pytorch_model.bin.index.json",
        "original/params.json",
    ]
    touch(model, *copied, *named)
    (model / "tekken.json").unlink()
    (model / "tekken.json").symlink_to("original/params.json")
    checkpoint = open_checkpoint(model)
    listed = {path.relative_to(model).as_posix() for path in model.rglob("*") if not path.is_dir()}
    assert listed == {
        *checkpoint.files.values(),
        *checkpoint.others,
        *(set(named) - {"original/params.json"}),
        "original/params.json",
    }
    assert checkpoint.left_out.keys() == {*(set(named) - {"original/params.json"}), "original/"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        patch.setenv("SPARSELINE_SCRATCH", str(tmp_path / "scratch"))
        told = invoke("prepare").stdout
        assert all(name in told for name in checkpoint.left_out), told
        assert json.loads(Path("build/prepare/model.json").read_text())["sha256"].keys() == {
            "model.safetensors",
            *checkpoint.others,
        }
        change_params(workspace, "variants.wanda.export", ["dense", "bitmask"])
        build(
            "text calibration",
            "text validation",
            "text test",
            "prune wanda",
            "evaluate wanda",
            "evaluate dense",
            "tasks wanda",
            "tasks dense",
            "export wanda",
        )
        build("unpack build/export/wanda/bitmask unpacked")
        for out in (
            "build/prune/wanda/checkpoint",
            "build/export/wanda/dense",
            "build/export/wanda/bitmask",
            "unpacked",
        ):
            for name in checkpoint.others:
                assert (Path(out) / name).read_bytes() == (model / name).read_bytes() and not (
                    Path(out) / name
                ).is_symlink(), name
            assert not [name for name in named if (Path(out) / name).exists() and name != "README.md"]
        taken = invoke("unpack", "build/export/wanda/bitmask", "data")  # a directory with other things in it
        assert (
            taken.exit_code == 2
            and "data already exists" in taken.stderr
            and (workspace / "data" / "model").exists()
        )


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", ".", "a//b"])
def test_a_manifest_names_nothing_outside(tmp_path: Path, name: str) -> None:
    manifest.write(tmp_path, {"weights": {}, "files": {name: "0"}, "indexed": False})
    with pytest.raises(SparselineError, match="names files outside its directory"):
        manifest.read(tmp_path)


def test_tokens_without_an_embedding_are_told(model_paths: dict[str, Path]) -> None:
    """By the whole model, as tasks call it: no error of an index. Oracle: the sentence, and the
    logits of a row without such a token.
    """
    model, rows = load_model(model_paths["llama"], "float32", torch.device("cpu")), token_rows(1, 4)
    assert torch.equal(model(rows).logits, load_full(model_paths["llama"])(rows).logits)
    with pytest.raises(SparselineError, match="The text holds token 320, but the model's vocabulary has 320"):
        model(torch.tensor([[5, 320]]))


def test_a_missing_package_is_named(copy_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer.model alone, without the package that reads it: not transformers' word for it,
    which names another.
    """
    path = copy_of("llama")
    (path / "tokenizer.json").rename(path / "tokenizer.model")

    def lacking(package: str) -> str:
        if package == "protobuf":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(tokenizer, "version", lacking)
    with pytest.raises(
        SparselineError,
        match=r"tokenizer\.model needs the package protobuf, which is not installed; run `make environment`",
    ):
        load_tokenizer(path, 320)


def test_a_tokenizer_s_own_code_is_not_run(copy_of: Callable[[str], Path]) -> None:
    """Oracle: the module that was not imported leaves no trace."""
    path = copy_of("llama")
    (path / "tokenizer.json").unlink()
    own = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    (path / "tokenizer_config.json").write_text(json.dumps(own))
    (path / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(path / 'ran')!r}).touch()\nclass Tokenizer: pass\n"
    )
    with pytest.raises(SparselineError, match=r"tokenizer"):
        load_tokenizer(path, 320)
    assert not (path / "ran").exists()


def test_a_model_s_own_code_is_not_run(copy_of: Callable[[str], Path]) -> None:
    """transformers has the family's code, which is taken. Oracle: the same weights without
    ``auto_map``; no trace of the module.
    """
    path = copy_of("llama")
    rows = token_rows(1, 5)
    before = load_full(path)(rows).logits
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (path / "config.json").write_text(
        json.dumps(json.loads((path / "config.json").read_text()) | {"auto_map": own})
    )
    (path / "own.py").write_text(f"import pathlib\npathlib.Path({str(path / 'ran')!r}).touch()\n")
    assert open_checkpoint(path).architecture.family == "llama" and "own.py" in open_checkpoint(path).others
    assert torch.equal(load_model(path, "float32", torch.device("cpu"))(rows).logits, before)
    assert not (path / "ran").exists()


def test_float64_goes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of step on a checkpoint in float64. Oracle: dtypes, the masks' counts, and the
    bitmask format's bits.
    """
    variants: dict[str, Any] = {
        name: {"selection": {"score": "obs", "group": "block"}, "export": ["dense", "bitmask"]}
        for name in ("fitted", "quantised")
    }
    variants["fitted"] |= {
        "induce": {},
        "allocation": {"method": "predicted"},
        "reconstruction": {"steps": ["obs", "lsq", "finetune"]},
    }
    variants["quantised"] |= {"reconstruction": {"steps": ["obs"]}, "quantization": {"bits": 4, "group": 16}}
    workspace = make_workspace(
        tmp_path / "project",
        model={"dtype": torch.float64},
        variants=variants,
    )
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(tmp_path / "scratch"))
    build(
        "prepare",
        "text calibration",
        "text validation",
        "text test",
        "calibrate",
        "scale",
        "sensitivity",
        "curves fitted",
        "induce fitted",
    )
    build("evaluate dense", "tasks dense")
    for name in variants:
        build(f"prune {name}", f"evaluate {name}", f"tasks {name}", f"export {name}")
        pruned = all_tensors(Path(f"build/prune/{name}/checkpoint"))
        assert {tensor.dtype for tensor in pruned.values()} == {torch.float64}
        facts = json.loads(Path(f"build/facts/{name}.json").read_text())
        assert facts["kept"] * 2 == facts["prunable"] and all(
            one["layer_error"] < 1 for one in facts["matrices"].values()
        )
        assert all(
            torch.equal(tensor, pruned[key])
            for key, tensor in bitmask_tensors(Path(f"build/export/{name}/bitmask"))
        )


# Patterns


@pytest.mark.parametrize(
    ("family", "pattern", "meant"),
    [
        ("llama", "*", ["layers"]),
        ("llama", "layers.0.*", ["layers.0."]),
        ("llama", "model.layers.0.*", ["layers.0."]),
        ("llama", "model.layers.1.mlp.up_proj.weight", ["layers.1.mlp.up_proj"]),
        ("llama", "layers.1.mlp.up_proj", ["layers.1.mlp.up_proj"]),
        ("llama", "*.self_attn.?_proj", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("llama", "*.mlp", ["mlp"]),
        ("llama", "model.layers.1", ["layers.1."]),
        ("llama", r"re:.*layers\.(0|7)\.", ["layers.0."]),
        ("llama", "re:model.*down_proj$", ["down_proj"]),
        ("phi3", "layers.0.self_attn.qkv_proj[0:32]", ["layers.0.self_attn.qkv_proj[0:32]"]),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", ["layers.0.self_attn.qkv_proj["]),
        ("phi3", "*.qkv_proj", ["qkv_proj["]),
        ("gpt2", "transformer.h.1.attn.c_attn", ["h.1.attn.c_attn["]),
        ("opt", "model.decoder.layers.0.fc1.weight", ["decoder.layers.0.fc1"]),
        ("gpt_neox", "gpt_neox.layers.*.dense", ["attention.dense"]),
    ],
)
def test_patterns_match_what_they_name(
    model_paths: dict[str, Path], family: str, pattern: str, meant: list[str]
) -> None:
    """Names as the project, the checkpoint, transformers and llm-compressor have them. Oracle:
    parts of the matrices' own names.
    """
    checkpoint = open_checkpoint(model_paths[family])
    entry = checkpoint.architecture
    names = [
        checkpoint.aliases(block, matrix)
        for block in range(entry.depth)
        for matrix in entry.layouts[0].matrices
    ]
    wanted = [any(part in own[0] for part in meant) for own in names]
    assert select(names, [pattern], [], []).included == wanted
    if not all(wanted):
        excluded = select(names, ["*"], [pattern], [])
        assert excluded.included == [not one for one in wanted]
        assert (
            str(excluded)
            == f"included {wanted.count(False)} of {len(names)} matrices; exclude {pattern!r} matched"
            f" {wanted.count(True)}"
        )


@pytest.mark.parametrize(
    "pattern",
    ["", " ", "layers.0", "Layers.10.*", "ayers.10.q", "layers.1", "re:ayers", "layers.10.q.weight.x"],
)
def test_near_misses_match_nothing(pattern: str) -> None:
    """``layers.1`` is not the beginning of ``layers.10``; an expression begins where the name does."""
    with pytest.raises(
        SparselineError,
        match=r"matches no matrix; names are, for example, 'layers\.10\.q' and 'layers\.11\.q'",
    ):
        select([["layers.10.q", "layers.10.q.weight"], ["layers.11.q"]], ["*"], [pattern], [])


# Conversion


def pickled(
    directory: Path, family: str, shards: int = 1, legacy: bool = False, **model: Any
) -> dict[str, torch.Tensor]:
    """A directory of pytorch_model.bin files as torch saves a state dict; what they hold."""
    tensors = AutoModelForCausalLM.from_pretrained(
        make_model(directory, family, **model), dtype="auto"
    ).state_dict()
    (directory / "model.safetensors").unlink()
    names = (
        ["pytorch_model.bin"]
        if shards == 1
        else [f"pytorch_model-{n:05d}-of-{shards:05d}.bin" for n in range(1, shards + 1)]
    )
    parts = {
        name: {key: tensors[key] for key in list(tensors)[number::shards]}
        for number, name in enumerate(names)
    }
    for name, part in parts.items():
        torch.save(part, directory / name, _use_new_zipfile_serialization=not legacy)
    if shards > 1:
        weight_map = {key: name for name, part in parts.items() for key in part}
        (directory / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    return tensors


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("opt", {}),
        ("opt", {"legacy": True}),
        ("opt", {"shards": 5}),
        ("gpt_neox", {"dtype": torch.bfloat16}),
        ("llama", {"shards": 2, "legacy": True, "dtype": torch.float64}),
        ("gemma", {}),
    ],
)
def test_converted_weights_are_the_same(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    """Oracle: torch's state dict, through transformers' own loading of the result; a tied head that
    shares its memory is stored once.
    """
    before = pickled(tmp_path / "source", family, **options)
    (tmp_path / "source" / "README.md").write_text("the model's own")
    result = invoke("convert", str(tmp_path / "source"), str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before
    )
    assert (tmp_path / "out" / "README.md").read_text() == "the model's own" and not list(
        (tmp_path / "out").glob("*.bin*")
    )
    checkpoint = open_checkpoint(tmp_path / "out")
    tied = checkpoint.config.tie_word_embeddings
    assert len(checkpoint.files) == len(before) - (1 if tied and options.get("shards", 1) == 1 else 0)


class _Code:
    """What a hostile pickle asks to run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda path: path.write_bytes(pickle.dumps({"x": _Code(path.parent / "ran")})),
            ("code, which is never run",),
        ),
        (lambda path: torch.save({"x": _Code(path.parent / "ran")}, path), ("code, which is never run",)),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
            ("damaged", "fetch the checkpoint again"),
        ),
        (lambda path: os.truncate(path, path.stat().st_size // 2), ("pytorch_model.bin cannot be read",)),
        (lambda path: os.truncate(path, 0), ("pytorch_model.bin cannot be read",)),
        (
            lambda path: torch.save({"state_dict": {}, "epoch": 1}, path),
            ("not a mapping of names to tensors", "training state"),
        ),
        (lambda path: torch.save({"x": torch.ones(2, dtype=torch.complex64)}, path), ("complex64",)),
        (lambda path: torch.save({"x": torch.eye(2).to_sparse()}, path), ("sparse",)),
        (lambda path: path.unlink(), ("holds no pytorch_model.bin",)),
        (lambda path: touch(path.parent, "model.safetensors"), ("holds safetensors already",)),
    ],
)
def test_a_bad_pickle_is_told(
    tmp_path: Path, damage: Callable[[Path], object], words: tuple[str, ...]
) -> None:
    """Oracle: one sentence, nothing run, nothing left on disk."""
    pickled(tmp_path / "source", "opt")
    damage(tmp_path / "source" / "pytorch_model.bin")
    result = invoke("convert", str(tmp_path / "source"), str(tmp_path / "out"))
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, (
        result.stderr
    )
    assert all(word in result.stderr for word in words), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"] and not (
        tmp_path / "source" / "ran"
    ).exists()


# The hub


def params(
    hub_id: str | None = "org/name", revision: str | None = COMMIT, path: str = "data/hub.json"
) -> ModelParams:
    rest = {
        "include": ["*"],
        "exclude": [],
        "compute_dtype": "float32",
        "products": "float32",
        "remote_code": False,
        "dequantize": False,
    }
    return ModelParams.model_validate({"path": path, "id": hub_id, "revision": revision, **rest})


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model where the hub's client keeps a commit of org/name."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return make_model(tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT, "llama")


def test_later_stages_find_the_snapshot_without_the_hub(
    tmp_path: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the result of the same files as a directory; no call of the hub's functions after prepare."""
    workspace = make_workspace(tmp_path / "project")
    touch(workspace, "data/hub.json")
    shutil.rmtree(workspace / "data" / "model")
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(tmp_path / "scratch"))
    for key, value in {"path": "data/hub.json", "id": "org/name", "revision": COMMIT}.items():
        change_params(workspace, f"model.{key}", value)
    build("prepare")
    facts = json.loads(Path("build/prepare/model.json").read_text())
    assert (facts["id"], facts["revision"]) == ("org/name", COMMIT) and str(tmp_path) not in json.dumps(facts)
    for name in ("HfApi", "snapshot_download", "get_cached_repo_tree"):
        monkeypatch.delattr(source, name)
    build("text calibration", "text test", "text validation", "calibrate", "prune wanda", "evaluate dense")
    assert json.loads(Path("build/evaluate/dense.json").read_text())["perplexity"]["test"] > 1


class Api:
    """The hub as far as ``fetch`` asks it."""

    files: tuple[str, ...] = ()

    def list_repo_files(self, _id: str, revision: str) -> list[str]:
        return list(self.files)

    def model_info(self, _id: str, revision: str | None, timeout: float) -> Any:
        return type("Info", (), {"sha": COMMIT})


def test_a_name_of_a_commit_is_refused_with_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "HfApi", Api)
    for revision in (None, "main", COMMIT[:7]):
        with pytest.raises(
            SparselineError, match=f"give the full hash of a commit .{revision or 'main'} is {COMMIT} now"
        ):
            fetch(params(revision=revision))


def test_what_is_fetched_from_the_hub(
    tmp_path: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is loaded or copied, and nothing else; the rest is named. Oracle: the list written down here."""
    wanted = [
        "config.json",
        "model.safetensors",
        "LICENSE",
        "tokenizer[1].json",
        "additional_chat_templates/rag.jinja",
    ]
    rest = [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "onnx/model.onnx",
        "original/config.json",
        "README.md",
        ".gitattributes",
    ]
    asked = []
    monkeypatch.setattr(source, "HfApi", type("Full", (Api,), {"files": (*wanted, *rest)}))
    monkeypatch.setattr(
        source,
        "snapshot_download",
        lambda _id, revision, allow_patterns: asked.extend(allow_patterns) or snapshot,
    )
    assert fetch(params()) == snapshot
    # as patterns, these match only themselves
    assert asked == [name.replace("[", "[[]") for name in sorted(wanted)]
    assert not_fetched(params()).keys() == set(rest)


def test_a_repository_of_pickles_is_refused_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        source, "HfApi", type("Pickles", (Api,), {"files": ("config.json", "pytorch_model.bin")})
    )
    with pytest.raises(
        SparselineError,
        match=(
            "no safetensors .*but pytorch_model.bin; .*`python -m stages.convert org/name OUT --revision"
            f" {COMMIT}`"
        ),
    ):
        fetch(params())
