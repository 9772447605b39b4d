"""Models, texts and bitmask files from strangers. Oracles: one sentence and exit code 2; a digest
of everything around them; a limit of time.
"""

import gzip
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from project import WANDA, build, change_json, change_params, invoke, make_workspace, tree
from pruned import Rounding, card, make_pruned
from safetensors.torch import load_file, save_file
from tiny import make_model

import stages.unpack
from pipeline_lib.core import bounded
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.export import load
from pipeline_lib.export.export import Variant, export
from pipeline_lib.models.checkpoint import open_checkpoint
from pipeline_lib.texts import chat

SECONDS = 20  # that a refusal may take
Change = Callable[[Path], Any]


def around(directory: Path) -> dict[str, tuple[int, str]]:
    """All that is there: kinds, links' targets and files' digests."""
    found = {}
    for path in sorted(directory.rglob("*")):
        mode = path.lstat().st_mode
        told = (
            str(path.readlink())
            if path.is_symlink()
            else hashlib.sha256(path.read_bytes()).hexdigest()
            if stat.S_ISREG(mode)
            else ""
        )
        found[str(path.relative_to(directory))] = (stat.S_IFMT(mode), told)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that has prepared its model, and a neighbour whose files are nobody's business. Read only."""
    home = tmp_path_factory.mktemp("hostile")
    (home / "neighbour").mkdir()
    (home / "neighbour" / "weights.safetensors").write_bytes(b"the user's own")
    project = make_workspace(
        home / "project",
        model={"shard_size": "20kB"},
        variants={"wanda": WANDA | {"export": ["dense", "bitmask"]}},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setenv("SPARSELINE_SCRATCH", str(home / "scratch"))
        texts = (f"text {name}" for name in ("calibration", "validation", "test"))
        build("keys", "prepare", *texts, "curves wanda", "allocate wanda", "induce wanda", "prune wanda")
        build("evaluate dense", "evaluate wanda", "tasks dense", "tasks wanda", "export wanda")
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "home", symlinks=True)
    monkeypatch.chdir(tmp_path / "home" / "project")
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path / "home"


def refused(home: Path, stage: str, *words: str) -> None:
    """In one sentence, in time, with nothing changed anywhere."""
    before, began = around(home), time.monotonic()
    result = invoke(*stage.split())
    assert result.exit_code == 2, result.output
    (said,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert all(word in said for word in words), said
    assert time.monotonic() - began < SECONDS
    assert around(home) == before


# Models


def index(name: str) -> Change:
    """All tensors of the first shard are said to be in another file."""

    def change(model: Path) -> None:
        def renamed(value: Any) -> None:
            first = min(value["weight_map"].values())
            value["weight_map"] = {
                tensor: name if file == first else file for tensor, file in value["weight_map"].items()
            }

        change_json(model / "model.safetensors.index.json", renamed)

    return change


def config(**values: Any) -> Change:
    return lambda model: change_json(model / "config.json", lambda found: found | values)


def link(name: str, target: str) -> Change:
    def change(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(target)

    return change


def written(name: str, text: str) -> Change:
    return lambda model: (model / name).write_text(text, encoding="utf-8")


MODELS: dict[str, tuple[Change, str]] = {
    "an absolute path in the index": (index("/tmp/weights.safetensors"), "weights.safetensors"),
    "a path upwards in the index": (index("../../../neighbour/weights.safetensors"), "weights.safetensors"),
    "a link to another's weights": (
        link("model-00001-of-00009.safetensors", "../../../neighbour/weights.safetensors"),
        "outside",
    ),
    "a link to a system's file": (link("vocab.txt", "/etc/passwd"), "/etc/passwd"),
    "a link to a device": (link("merges.txt", "/dev/zero"), "not a regular file"),
    "a circle of links": (link("merges.txt", "merges.txt"), "merges.txt"),
    "a pipe": (lambda model: os.mkfifo(model / "merges.txt"), "named pipe"),
    "ten million blocks": (config(num_hidden_layers=10_000_000), "num_hidden_layers"),
    "a billion heads": (config(num_attention_heads=10**9), "attention heads"),
    "a word for a number": (config(hidden_size="wide"), "config.json"),
    "null for a number": (config(num_hidden_layers=None), "config.json"),
    "a fraction for a number": (config(vocab_size=64.5), "config.json"),
    "true for a number": (config(num_hidden_layers=True), "config.json"),
    "a config that is a list": (written("config.json", "[1, 2]"), "config.json"),
    "a deep config": (written("config.json", "[" * 100_000), "config.json"),
    "no generation config": (written("generation_config.json", "null"), "generation_config.json"),
    "a header of the largest size": (
        lambda model: next(model.glob("*.safetensors")).write_bytes(b"\xff" * 8 + b"{}"),
        ".safetensors",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_hostile_models(home: Path, name: str) -> None:
    change, word = MODELS[name]
    change(home / "project/data/model")
    refused(home, "prepare", word)


@pytest.mark.parametrize(
    "name",
    [name for name in MODELS if "config" not in name and "header" not in name and "number" not in name],
)
def test_hostile_models_at_the_last_stage(home: Path, name: str) -> None:
    """`prepare` saw the model before it was hostile."""
    change, _ = MODELS[name]
    change(home / "project/data/model")
    refused(home, "export wanda")


def test_links_of_the_hub_and_of_dvc_are_followed(home: Path) -> None:
    """Both keep a model's files elsewhere, with links in their places. Exports hold files."""
    model = home / "project/data/model"
    cache = home / "project/.dvc/cache/files/md5"
    (home / "hub/blobs").mkdir(parents=True)
    (home / "hub/snapshots/abc").mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        moved = (cache / "ab" if number % 2 else cache / "cd") / path.name
        moved.parent.mkdir(parents=True, exist_ok=True)
        path.rename(moved)
        path.symlink_to(moved)
        shutil.copyfile(moved, home / "hub/blobs" / path.name)
        (home / "hub/snapshots/abc" / path.name).symlink_to(f"../../blobs/{path.name}")
    build("prepare", "export wanda")
    assert not any(path.is_symlink() for path in Path("build/export").rglob("*"))
    assert open_checkpoint(home / "hub/snapshots/abc").files == open_checkpoint(model).files
    (home / "hub/blobs").rename(home / "neighbour/blobs")
    (home / "hub/blobs").symlink_to(home / "neighbour/blobs")
    with pytest.raises(SparselineError, match="outside"):
        open_checkpoint(home / "hub/snapshots/abc")


def test_code_of_a_model_is_never_run_or_asked_for(home: Path) -> None:
    """Whoever answers y to all questions."""
    model = home / "project/data/model"
    evil = (
        f"import pathlib\npathlib.Path({str(home / 'ran')!r}).write_text('x')\nfrom transformers import"
        " LlamaConfig as C, LlamaForCausalLM as M\n"
    )
    (model / "evil.py").write_text(evil, encoding="utf-8")
    named = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    for file in ("config.json", "tokenizer_config.json"):
        change_json(model / file, lambda found: found | {"auto_map": named})
    for stage, *arguments in (("prepare",), ("text", "test"), ("evaluate", "dense"), ("export", "wanda")):
        said = CliRunner().invoke(
            __import__(f"stages.{stage}", fromlist=["main"]).main, arguments, input="y\n" * 9
        )
        assert said.exit_code in (0, 2) and "[y/N]" not in said.output
    change_json(model / "config.json", lambda found: found | {"model_type": "unheard"})
    assert (
        CliRunner().invoke(__import__("stages.prepare", fromlist=["main"]).main, [], input="y\n").exit_code
        == 2
    )
    assert not (home / "ran").exists()


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_a_matrix_of_zeros(home: Path, sparsity: float) -> None:
    """In the source, or all of it pruned: every format takes it, and unpacked it is what was pruned."""
    for path in (home / "project/data/model").glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if "layers.0.mlp.up_proj" in name:
                tensors[name].zero_()
        save_file(tensors, path, {"format": "pt"})
    change_params(
        home / "project",
        "variants.wanda.selection",
        {"score": "magnitude", "group": "matrix", "sparsity": sparsity},
    )
    change_params(
        home / "project",
        "variants.wanda.allocation",
        {"method": "depth", "alpha": 1.0, "density_bounds": [0.0, 1.0]},
    )
    texts = (f"text {name}" for name in ("calibration", "validation", "test"))
    build(
        "prepare",
        *texts,
        "curves wanda",
        "allocate wanda",
        "induce wanda",
        "prune wanda",
        "distil wanda",
        "evaluate dense",
        "evaluate wanda",
        "tasks dense",
        "tasks wanda",
    )
    build("export wanda", "unpack build/export/wanda/bitmask unpacked")
    before, after = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (Path("build/prune/wanda/checkpoint"), Path("unpacked"))
    )
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert sum(not tensor.any() for tensor in after.values()) >= 1


# Texts


TEXTS: dict[str, tuple[Change, str]] = {
    "a pipe": (lambda folder: os.mkfifo(folder / "more.txt"), "named pipe"),
    "a link to a device": (link("more.txt", "/dev/zero"), "not a regular file"),
    "a link to a system's file": (link("more.txt", "/etc/passwd"), "/etc/passwd"),
    "a bomb": (
        lambda folder: (folder / "more.txt.gz").write_bytes(gzip.compress(bytes(2**29), 1)),
        "not text",
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_texts(home: Path, name: str) -> None:
    change, word = TEXTS[name]
    folder = home / "project/data/texts"
    change(folder)
    change_params(home / "project", "texts.test.path", "data/texts")
    refused(home, "text test", word)


class Template:
    """What a tokenizer does with a chat template: Jinja, in its sandbox."""

    chat_template = "there is one"

    def __init__(self, text: str) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self.compiled = _compile_jinja_template(text)

    def apply_chat_template(self, messages: list[Any], tokenize: bool) -> str:
        return str(self.compiled.render(messages=messages))


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        (
            "{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x"
            " %}{% endfor %}{{ ns.x }}"
        ),
    ],
    ids=["time", "memory"],
)
def test_a_chat_template_comes_to_an_end(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(bounded.each, "__defaults__", (2.0,))
    tokenizer: Any = Template(text)
    with pytest.raises(
        SparselineError,
        match=r"a\.jsonl, line 7: the model's chat template (does not finish|does not take this record)",
    ):
        chat.render(tokenizer, [[{"role": "user", "content": "hello"}]], ["a.jsonl, line 7"])
    whole: Any = Template("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    assert chat.render(whole, [[{"role": "user", "content": f"{i}"}] for i in range(3)], ["a"] * 3) == [
        "<user>0",
        "<user>1",
        "<user>2",
    ]


def test_a_bomb_of_aliases(home: Path) -> None:
    lines = [
        "a0: &a0 [x, x, x, x, x, x, x, x, x]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)),
    ]
    path = home / "project/params.yaml"
    path.write_text("\n".join(lines) + "\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    refused(home, "keys", "params.yaml", "values")


# Bitmask files


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bitmask checkpoint with masks and codes. Read only."""
    home = tmp_path_factory.mktemp("packed")
    source = open_checkpoint(make_model(home / "source", "llama", dtype=torch.bfloat16))
    make_pruned(home / "prune", source, "unstructured", Rounding(4, 16, symmetric=False))
    export(source, Variant("mine", "unstructured", home / "prune"), home / "export", ["bitmask"], card)
    return home / "export/bitmask"


@pytest.fixture
def bitmask(packed: Path, tmp_path: Path) -> Path:
    (tmp_path / "neighbour").mkdir()
    (tmp_path / "neighbour/file").write_text("the user's own", encoding="utf-8")
    return Path(shutil.copytree(packed, tmp_path / "bitmask"))


def forge(directory: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """Change the manifest, or a header with what it says of tensors, and make every checksum right again."""
    manifest = json.loads((directory / "bitmask.json").read_text(encoding="utf-8"))
    (name,) = manifest["weights"]
    raw = (directory / name).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    told = json.loads(header["__metadata__"]["sparseline"])
    header["told"] = told
    change(manifest, header)
    header.pop("told")
    header["__metadata__"]["sparseline"] = json.dumps(told, sort_keys=True, separators=(",", ":"))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    (directory / name).write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])
    for entry in (manifest["weights"] or {}).values():
        if isinstance(entry, dict):
            entry |= {"bytes": (directory / name).stat().st_size}
            entry |= {"header_sha256": hashlib.sha256(len(text).to_bytes(8, "little") + text).hexdigest()}
    manifest.pop("sha256")
    whole = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    manifest["sha256"] = hashlib.sha256(whole.encode()).hexdigest()
    (directory / "bitmask.json").write_text(
        json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def manifest(**values: Any) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    """Values of the one file of weights."""

    def change(found: dict[str, Any], _header: dict[str, Any]) -> None:
        next(iter(found["weights"].values())).update(values)

    return change


def told(part: str, **values: Any) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    """Facts of the first tensor that has such a part."""

    def change(_found: dict[str, Any], header: dict[str, Any]) -> None:
        name = next(name for name in sorted(header["told"]["tensors"]) if name + part in header)
        header["told"]["tensors"][name].update(values)

    return change


def tensor(part: str, **values: Any) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    """The header's entry of the first such part."""

    def change(_found: dict[str, Any], header: dict[str, Any]) -> None:
        header[next(name for name in sorted(header) if name.endswith(part))].update(values)

    return change


FORGED: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "the directory above": manifest(dense=".."),
    "this directory": manifest(dense="."),
    "no name": manifest(dense=""),
    "a path upwards": manifest(dense="../neighbour/file"),
    "an absolute path": manifest(dense="/tmp/file"),
    "a name with a NUL": manifest(dense="a\0b"),
    "the name of another file": manifest(dense="config.json"),
    "a file upwards": lambda found, _: found["files"].update({"../neighbour/file": "0" * 64}),
    "a number for a name": manifest(dense=5),
    "a list for the files": lambda found, _: found.update(files=[]),
    "null for the weights": lambda found, _: found.update(weights=None),
    "no group": told(".codes", group=0),
    "a group of less than nothing": told(".codes", group=-16),
    "true for a number": told(".codes", bits=True),
    "forty bits": told(".codes", bits=40),
    "a petabyte": told(".mask", shape=[2**25, 2**25]),
    "less than nothing": told(".mask", shape=[-64, -64]),
    "a fraction of a row": told(".mask", shape=[0.5, 64]),
    "a type that is none": told(".mask", dtype="X9"),
    "a type as wide as another": told(".mask", dtype="F64"),
    "an unknown key": told(".mask", more=1),
    "tensors that overlap": tensor(".mask", data_offsets=[0, 8]),
    "a tensor behind the end": tensor(".mask", data_offsets=[10**12, 10**12 + 8]),
    "offsets in the wrong order": tensor(".mask", data_offsets=[8, 0]),
    "a shape of texts": tensor(".mask", shape=["8"]),
    "a part of another type": tensor(".mask", dtype="F32"),
    "a part that is missing": lambda _, header: header.pop(
        next(name for name in sorted(header) if name.endswith(".mask"))
    ),
    "metadata of another kind": lambda _, header: header["told"].update(tensors=[1]),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_bitmask_files(bitmask: Path, tmp_path: Path, name: str) -> None:
    """All checksums are right."""
    forge(bitmask, FORGED[name])
    before = around(tmp_path)
    result = CliRunner().invoke(stages.unpack.main, [str(bitmask), str(tmp_path / "out" / "deep")])
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ") and result.output.count("\n") == 1
    assert {path: one for path, one in around(tmp_path).items() if path != "out"} == before
    with pytest.raises(SparselineError):
        load.load_model(bitmask)


def test_the_forger_is_no_fault(bitmask: Path, tmp_path: Path) -> None:
    """What the test above rests on: forging nothing changes nothing."""
    forge(bitmask, lambda _manifest, _header: None)
    assert CliRunner().invoke(stages.unpack.main, [str(bitmask), str(tmp_path / "out")]).exit_code == 0


@pytest.mark.parametrize("out", ["bitmask", "neighbour", "bitmask/below", "neighbour/file"])
def test_unpack_takes_no_place_that_is_taken(bitmask: Path, tmp_path: Path, out: str) -> None:
    before = around(tmp_path)
    result = CliRunner().invoke(stages.unpack.main, [str(bitmask), str(tmp_path / out)])
    assert result.exit_code == (0 if out == "bitmask/below" else 2), result.output
    kept = {path: one for path, one in around(tmp_path).items() if not path.startswith("bitmask/below")}
    assert kept == before


@pytest.mark.parametrize(
    "change",
    [
        lambda path: link("README.md", "/etc/passwd")(path),
        lambda path: link("config.json", "/dev/zero")(path),
    ],
)
def test_links_in_bitmask_directories(bitmask: Path, tmp_path: Path, change: Change) -> None:
    change(bitmask)
    result = CliRunner().invoke(stages.unpack.main, [str(bitmask), str(tmp_path / "out")])
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert tree(tmp_path / "neighbour").keys() == {"file"}
