"""Artifacts and parameters. Oracles: bytes, subprocesses, and the YAML 1.2 that DVC reads."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import stages.environment
from pipeline_lib.core import environment, runtime
from pipeline_lib.core.artifacts import (
    read_json,
    read_tensors,
    replacing,
    write_json,
    write_tensors,
    write_text,
)
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.files import sha256
from pipeline_lib.core.params import Merged, Params, load, merge, parse, section
from pipeline_lib.core.random import generator
from pipeline_lib.core.runtime import compute, resume_key, stage, told
from pipeline_lib.core.scratch import hold
from pipeline_lib.masks.settings import SelectionParams
from pipeline_lib.models.transform import Transform, read_transforms, write_transforms
from pipeline_lib.recipe.settings import PruneParams

ROOT = Path(__file__).resolve().parent.parent


# Atomic


def test_a_failed_write_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="half way"), replacing(path) as temporary:
        temporary.write_text("new but ha")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_first_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    with pytest.raises(SparselineError, match=r"a\.json would contain NaN or infinity"):
        write_json(tmp_path / "deep" / "a.json", {"x": float("nan")})
    with pytest.raises(Exception):  # noqa: B017 - whatever the serialiser raises
        write_tensors(tmp_path / "deep" / "a.safetensors", {"x": torch.empty(2, device="meta")})
    assert list((tmp_path / "deep").iterdir()) == []


def test_directories_are_replaced_whole(tmp_path: Path) -> None:
    """The old directory's files go with it; a failure leaves the old directory as it was."""
    path = tmp_path / "d"
    for name in ("old", "new"):
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [p.name for p in path.iterdir()] == ["new"]
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "third").write_text("x")
        raise RuntimeError
    assert [p.name for p in path.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_leftovers_of_a_kill_are_swept(tmp_path: Path) -> None:
    """The next write deletes what a killed process left. It keeps the files of a running process,
    and those of another host until they are two weeks old.
    """
    code = """
import os, sys
from pathlib import Path
from pipeline_lib.core.artifacts import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.mkdir()
    (temporary / "stale").write_text("x")
    print(temporary.name, flush=True)
    if sys.argv[2:]:
        os.kill(os.getpid(), 9)
    sys.stdin.read()
"""
    start = [sys.executable, "-c", code, str(tmp_path / "d")]
    dead = subprocess.run(
        [*start, "kill"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    assert (tmp_path / dead / "stale").exists()
    elsewhere, older = (tmp_path / f".d.{host}-{os.getpid()}-00000000.partial" for host in ("0" * 8, "1" * 8))
    for path in (elsewhere, older, tmp_path / ".d.partial"):
        path.write_text("x")
    os.utime(older, (0, 0))
    with subprocess.Popen(
        start, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as living:
        assert living.stdout and living.stdin
        name = living.stdout.readline().strip()
        with replacing(tmp_path / "d") as temporary:
            temporary.mkdir()
            (temporary / "fresh").write_text("x")
        assert {path.name for path in tmp_path.iterdir()} == {"d", name, elsewhere.name}
        assert [path.name for path in (tmp_path / "d").iterdir()] == ["fresh"]
        living.stdin.close()
    assert living.returncode == 0
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["stale"]  # the last one wins, whole


def test_two_writers_of_a_directory_do_not_mix(tmp_path: Path) -> None:
    """Both are under way at once; a file in the place of a directory, and the other way round, is
    replaced as well.
    """
    with replacing(tmp_path / "d") as one, replacing(tmp_path / "d") as other:
        assert one != other
        for path in (one, other):
            path.mkdir()
            (path / path.name).write_text("x")
    assert [path.name for path in (tmp_path / "d").iterdir()] == [one.name]
    write_text(tmp_path / "d", "a file")
    assert (tmp_path / "d").read_text() == "a file"
    with replacing(tmp_path / "d") as temporary:
        temporary.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["d"] and list((tmp_path / "d").iterdir()) == []


def test_a_file_is_never_absent_while_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: at the moment of the rename the old file is still there, so that a kill at any point
    leaves old or new.
    """
    path = tmp_path / "a.txt"
    write_text(path, "old")
    seen: list[str] = []
    real = os.replace

    def spy(source: Any, destination: Any) -> None:
        seen.append(Path(destination).read_text() if Path(destination).exists() else "absent")
        real(source, destination)

    monkeypatch.setattr(os, "replace", spy)
    write_text(path, "new")
    assert seen == ["old"]
    assert path.read_text() == "new"


# Deterministic

WRITER = """
import sys, torch
from pathlib import Path
from pipeline_lib.core.artifacts import write_json, write_tensors
out = Path(sys.argv[1])
names = sys.argv[2].split(",")
tensors, facts = {n: torch.arange(float(len(n))) for n in names}, {n: n for n in names}
write_tensors(out / "t.safetensors", tensors, facts | {"x": {"b": 1, "a": 2}})
write_json(out / "j.json", {n: {"z": 1, "é": [1.5, None]} for n in names})
"""


def test_bytes_are_the_same_in_every_process(tmp_path: Path) -> None:
    """Two processes with other hash seeds and another order of the keys write the same bytes."""
    for name, seed, order in (("a", "1", "one,two,three,four,five"), ("b", "2", "five,four,three,two,one")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, "-c", WRITER, str(tmp_path / name), order], check=True, env=environment
        )
    for file in ("t.safetensors", "j.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_json_is_sorted_utf_8_with_a_final_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": "é", "a": 1})
    assert (tmp_path / "a.json").read_bytes() == '{\n "a": 1,\n "b": "é"\n}\n'.encode()
    assert read_json(tmp_path / "a.json") == {"a": 1, "b": "é"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_tensors_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    """Values, types and facts; transposed and partial views are written as what they show."""
    base = torch.arange(12).view(3, 4).to(dtype)
    views = {
        "turned": base.T,
        "part": base.clone()[1:, ::2],
        "empty": base.clone()[:0],
        "scalar": base.clone()[0, 1],
    }
    tensors = {"base": base.clone(), **views}
    write_tensors(tmp_path / "t.safetensors", tensors, {"grams": True, "n": [1, 2]})
    found, facts = read_tensors(tmp_path / "t.safetensors")
    assert facts == {"grams": True, "n": [1, 2]}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("content", [None, b"", b"garbage that is not a safetensors file"])
def test_unreadable_artifacts_are_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "artifact"
    if content is not None:
        path.write_bytes(content)
    for read in (read_json, read_tensors):
        with pytest.raises(SparselineError, match=r"artifact cannot be read .*run `dvc repro`"):
            read(path)


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_transforms_round_trip(tmp_path: Path) -> None:
    """Every part of every block comes back; blocks without any get the identity; dots in names survive."""
    one = Transform(
        {"v_o": torch.ones(2), "q_k": torch.full((3,), 2.0)},
        {"mlp.input": torch.zeros(4)},
        {"mlp.input": torch.full((4,), 0.5)},
    )
    write_transforms(
        tmp_path / "t.safetensors",
        {0: one, 12: Transform(factors={"v_o": torch.ones(1)})},
        {"choice": ["start"]},
    )
    transforms, facts = read_transforms(tmp_path / "t.safetensors", 13)
    assert facts == {"choice": ["start"]}
    assert len(transforms) == 13
    for part in ("factors", "shifts", "importance"):
        again, before = getattr(transforms[0], part), getattr(one, part)
        assert again.keys() == before.keys()
        assert all(torch.equal(again[name], before[name]) for name in before)
    assert transforms[12].factors["v_o"].tolist() == [1]
    assert transforms[5] == Transform()


# Parameters

SELECTION = """
prune:
  selection:
    sparsity: 0.5
    pattern: "2:4"
    score: wanda
    group: row
    block: 128
    damping: 1e-4
    damping_of: mean
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_1_2(tmp_path: Path) -> None:
    """``1e-4`` is a number, ``2:4`` a string quoted or not, ``on`` and ``no`` are strings: as DVC
    reads them, not as PyYAML does.
    """
    path = written(
        tmp_path, 'a:\n  x: 1e-4\n  y: 2:4\n  z: "2:4"\n  w: on\n  v: no\n  u: true\n  t: null\n  s: 010\n'
    )
    assert section("a", path) == {
        "x": 1e-4,
        "y": "2:4",
        "z": "2:4",
        "w": "on",
        "v": "no",
        "u": True,
        "t": None,
        "s": 10,
    }


def test_a_section_is_read_into_its_model(tmp_path: Path) -> None:
    found = load(SelectionParams, "prune.selection", written(tmp_path, SELECTION))
    assert found.damping == 1e-4
    assert found.pattern == "2:4"
    assert (found.shape.n, found.shape.m) == (2, 4)
    with pytest.raises(ValueError, match="frozen"):
        found.block = 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "block: 128",
            "block: 128\n    blok: 1",
            r"prune\.selection\.blok is not a known key; .* use one of: block, damping, damping_of",
        ),
        ("    block: 128\n", "", r"prune\.selection\.block is missing; add it"),
        (
            "sparsity: 0.5",
            "sparsity: 1.5",
            r"prune\.selection\.sparsity = 1\.5 cannot be used: .*less than 1",
        ),
        (
            "sparsity: 0.5",
            "sparsity: -1",
            r"prune\.selection\.sparsity = -1 cannot be used: .*greater than or equal to 0",
        ),
        ("sparsity: 0.5", "sparsity: .nan", r"prune\.selection\.sparsity = nan cannot be used"),
        ("sparsity: 0.5", "sparsity: half", r"prune\.selection\.sparsity = 'half' cannot be used: .*number"),
        ("sparsity: 0.5", "sparsity: 0.6", r"pattern 2:4 keeps 2 of 4, so sparsity must be 0\.5, not 0\.6"),
        ("block: 128", "block: 1.5", r"prune\.selection\.block = 1\.5 cannot be used: .*integer"),
        (
            "block: 128",
            "block: 0",
            r"prune\.selection\.block = 0 cannot be used: .*greater than or equal to 1",
        ),
        ("damping: 1e-4", "damping: 0", r"prune\.selection\.damping = 0 cannot be used"),
        (
            "score: wanda",
            "score: wonder",
            r"prune\.selection\.score = 'wonder' cannot be used: .*'magnitude', 'wanda'",
        ),
        (
            '"2:4"',
            '"4:2"',
            r'prune\.selection\.pattern = \'4:2\' cannot be used: a pattern is unstructured or "N:M"',
        ),
        ('"2:4"', "124", r"prune\.selection\.pattern = 124 cannot be used: .*string"),
        ("score: wanda", "score: [wanda]", r"prune\.selection\.score = \['wanda'\] cannot be used"),
    ],
)
def test_wrong_parameters_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    """One sentence: the key, its value, what is allowed."""
    assert old in SELECTION
    with pytest.raises(SparselineError, match=message) as caught:
        load(SelectionParams, "prune.selection", written(tmp_path, SELECTION.replace(old, new)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("a: 1\n", "b", "has no section 'b'; add it"),
        ("a: 1\n", "a.b", r"has no section 'a\.b'"),
        ("a: {b: {c: 1}}\n", "a.c", r"has no section 'a\.c'"),
        ("", "a", "has no section 'a'"),
        ("a: [1\n", "a", "cannot be read as YAML"),
        ("a: 1\na: 2\n", "a", "cannot be read as YAML: .*duplicate"),
    ],
)
def test_broken_files_and_missing_sections_are_told(
    tmp_path: Path, text: str, name: str, message: str
) -> None:
    with pytest.raises(SparselineError, match=message) as caught:
        section(name, written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_or_non_utf_8_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(SparselineError, match="cannot be read as YAML"):
        section("a", tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes("a: é\n".encode("latin-1"))
    with pytest.raises(SparselineError, match="cannot be read as YAML"):
        section("a", tmp_path / "latin.yaml")


def test_a_section_that_is_no_mapping_is_told() -> None:
    with pytest.raises(SparselineError, match=r"params\.yaml: prune\.selection = 3 cannot be used"):
        parse(SelectionParams, 3, "prune.selection")


def test_nested_keys_are_told_in_full() -> None:
    class Inner(Params):
        x: int

    class Outer(Params):
        inner: Inner

    with pytest.raises(SparselineError, match=r"params\.yaml: outer\.inner\.x = 'a' cannot be used"):
        parse(Outer, {"inner": {"x": "a"}}, "outer")
    with pytest.raises(
        SparselineError, match=r"outer\.inner\.y is not a known key; remove it or use one of: x\."
    ):
        parse(Outer, {"inner": {"x": 1, "y": 2}}, "outer")


@pytest.mark.parametrize(
    ("below", "above", "message"),
    [
        ({}, {"selection": {"sparsty": 1}}, r"variants\.v\.selection\.sparsty is not a known key"),
        (
            {"selection": {"sparsty": 1}},
            {"selection": {"score": "obs"}},
            r"prune\.selection\.sparsty is not a known key",
        ),
        ({}, {"selection": {"sparsity": 1.5}}, r"variants\.v\.selection\.sparsity = 1\.5 cannot"),
        (
            {"selection": {"sparsity": 1.5}},
            {"selection": {"score": "obs"}},
            r"prune\.selection\.sparsity = 1\.5 cannot",
        ),
        (
            {"selection": {"pattern": "2:4"}},
            {"selection": {"sparsity": 0.6}},
            r"prune\.selection\.pattern = '2:4' with variants\.v\.selection\.sparsity = 0\.6",
        ),
        ({}, {"selection": {"sparsity": 0}}, r"variants\.v\.selection\.sparsity = 0 cannot"),
        ({}, {"selection": 3}, r"variants\.v\.selection = 3 cannot"),
        (
            {},
            {"reconstruction": {"dense_target": 1}},
            (
                r"variants\.v\.reconstruction\.dense_target = 1 with prune\.reconstruction\.statistics ="
                r" 'per_block' cannot"
            ),
        ),
        (
            {},
            {"reconstruction": {"steps": ["lsqq"]}},
            r"variants\.v\.reconstruction\.steps\.0 = 'lsqq' cannot",
        ),
        ({}, {"quantization": {"group": 0}}, r"variants\.v\.quantization\.group = 0 cannot"),
        (
            {},
            {"allocation": {"density_bounds": [0.9, 0.1]}},
            r"variants\.v\.allocation\.density_bounds = \[0\.9, 0\.1\] cannot",
        ),
        ({}, {"allocation": {"method": "x" * 900}}, r"variants\.v\.allocation\.method = 'xxx"),
    ],
)
def test_the_place_that_is_named_is_where_the_value_was_written(
    below: dict[str, Any], above: dict[str, Any], message: str
) -> None:
    """Oracle: the section that was changed. No error shows a whole section, or a value of any length."""
    section_below = merge(section("prune"), below)
    with pytest.raises(SparselineError, match=message) as caught:
        parse(PruneParams, Merged("prune", "variants.v", section_below, above), "elsewhere")
    assert len(str(caught.value)) < 300
    assert "elsewhere" not in str(caught.value)


def test_merge() -> None:
    """Mappings merge level by level, null as an empty one; anything else, lists and null included,
    is replaced; the defaults stay.
    """
    defaults = {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2], "c": 3}
    before = json.dumps(defaults)
    merged = merge(defaults, {"a": {"y": {"w": 4}}, "b": [5], "c": None, "d": 6})
    assert merged == {"a": {"x": 1, "y": {"z": 2, "w": 4}}, "b": [5], "c": None, "d": 6}
    assert json.dumps(defaults) == before
    assert merge(defaults, {"a": 1})["a"] == 1
    assert merge(defaults, {"a": {"y": None}}) == merge(defaults, {"a": None}) == defaults
    assert merge(defaults, {"c": {"q": 1}})["c"] == {"q": 1}
    assert merge(defaults, {}) == defaults


# How stages run


def test_generators_are_keyed() -> None:
    """The same key the same numbers, another seed or name others."""
    first = torch.rand(4, generator=generator(0, "a"))
    assert torch.equal(first, torch.rand(4, generator=generator(0, "a")))
    assert not torch.equal(first, torch.rand(4, generator=generator(1, "a")))
    assert not torch.equal(first, torch.rand(4, generator=generator(0, "b")))


def test_a_stage_tells_its_error_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    environment.write()
    with pytest.raises(SystemExit) as caught, stage():
        raise SparselineError("bad input; correct it.")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: bad input; correct it.\n"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as caught, stage("trial", tmp_path / "out.json"):
        _ = 1 / 0
    assert caught.value.code == 3
    told = capsys.readouterr().err
    (file,) = tmp_path.glob("sparseline-bug-*.txt")
    assert (
        told
        == "error: This is an error in Sparseline, not in your input (ZeroDivisionError: division by zero)."
        f" Attach {file} to a bug report.\n"
    )
    assert "_ = 1 / 0" in file.read_text(encoding="utf-8")
    record = tmp_path / "build" / "costs" / "trial.json"
    assert not record.exists()
    with stage("trial", tmp_path / "out.json"):
        write_json(tmp_path / "out.json", {})
    told = read_json(record)
    assert told.keys() == {"wall_s", "cpu_s", "peak_rss_bytes", "peak_gpu_bytes", "output"}
    assert told["peak_gpu_bytes"] is None
    assert told["output"] == {
        "path": str(tmp_path / "out.json"),
        "sha256": hashlib.sha256(b"{}\n").hexdigest(),
    }


def test_a_stage_records_its_gpus_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: what torch says of the device that the stage computed on; null for one that did not
    compute, and for one on a CPU.
    """
    monkeypatch.chdir(tmp_path)
    environment.write()
    monkeypatch.setattr(runtime, "_used", set())
    monkeypatch.setattr(
        torch.cuda, "max_memory_allocated", lambda device: {torch.device("cuda:1"): 123_456_789}[device]
    )
    for name, expected in ((None, None), ("cpu", None), ("cuda:1", 123_456_789)):
        with stage("trial", tmp_path / "out.json"):
            if name is not None:
                monkeypatch.setenv("SPARSELINE_DEVICE", name)
                with monkeypatch.context() as patch:
                    patch.setattr(
                        torch, "empty", lambda size, device: SimpleNamespace(device=torch.device(device))
                    )
                    compute()
            write_json(tmp_path / "out.json", {})
        assert read_json(tmp_path / "build" / "costs" / "trial.json")["peak_gpu_bytes"] == expected


@pytest.mark.parametrize(
    ("error", "gpu"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory"),
            False,
        ),
        (MemoryError(), False),
    ],
)
def test_memory_that_ran_out_is_told(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    gpu: bool,
) -> None:
    """One sentence, exit code 2: where to look, and of a GPU the setting that makes it less."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught, told():
        raise error
    said = capsys.readouterr().err
    assert (
        caught.value.code == 2
        and said.startswith("error: Out of ")
        and said.count("\n") == 1
        and "`make plan`" in said
    )
    assert ("SPARSELINE_GPU_ACTIVATION_BYTES" in said) == ("Out of GPU memory" in said) == gpu


def refusals(tmp_path: Path) -> dict[str, Callable[[], None]]:
    """Ways in which a system refuses a file, also as root; each name is the path that must be named."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {
        "/proc/none": lambda: write_text(Path("/proc/none/a.json"), "x"),
        f"{tmp_path}/file/below": lambda: write_tensors(
            tmp_path / "file" / "below" / "t.safetensors", {"x": torch.ones(1)}
        ),
        f"{tmp_path}/loop": lambda: write_json(tmp_path / "loop" / "a.json", 1),
        f"{tmp_path}/.nnn": lambda: write_json(tmp_path / ("n" * 256), 1),
        f"{tmp_path}/nowhere": lambda: print((tmp_path / "nowhere").read_text(encoding="utf-8")),
    }


def test_a_refused_file_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence that names the path, exit code 2; what has no number is a bug. Oracle: what this
    machine really refuses.
    """
    monkeypatch.chdir(tmp_path)
    environment.write()
    for path, refused in refusals(tmp_path).items():
        with pytest.raises(SystemExit) as caught, stage():
            refused()
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and path in said and said.count("\n") == 1
        assert "then run the same command again" in said
    (tmp_path / "build").write_text("x")
    with pytest.raises(SystemExit), stage("trial", tmp_path / "file"):
        pass
    assert capsys.readouterr().err.startswith("error: build")
    with pytest.raises(SystemExit) as caught, stage():
        raise OSError("a library's own, without a number")
    assert caught.value.code == 3


def test_a_full_disk_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Linux's device that is always full; and a limit on the size of files, which the text, the
    tensors and the shards all meet.
    """
    monkeypatch.chdir(tmp_path)
    environment.write()
    with (
        pytest.raises(SystemExit) as caught,
        stage(),
        replacing(tmp_path / "text"),
        Path("/dev/full").open("w") as full,
    ):
        full.write("x")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(
        f"error: {tmp_path}/text: No space left on device; make room, `make plan` says what a run takes"
    )
    code = """
import os, resource, torch
from pathlib import Path
from pipeline_lib.core.artifacts import save_tensors, write_tensors, write_text
from pipeline_lib.core.runtime import told
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
out, big = Path("out"), {"x": torch.ones(1000)}
by_text, by_tensors = lambda: write_text(out, "x" * 9999), lambda: write_tensors(out, big)
for write in (by_text, by_tensors, lambda: save_tensors(out, big)):
    if os.fork() == 0:
        with told():
            write()
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 2
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(
        r"(error: \S*out\S*: File too large; correct the cause, then run the same command again:"
        r" [^\n]*\n){3}",
        done.stderr,
    )
    assert {path.name for path in tmp_path.iterdir()} <= {"env.lock.json", "out"}


@pytest.mark.parametrize("threads", ["0", "-1", "two", "1.5"])
def test_bad_thread_counts_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: str
) -> None:
    monkeypatch.chdir(tmp_path)
    environment.write()
    monkeypatch.setenv("SPARSELINE_THREADS", threads)
    with pytest.raises(SystemExit), stage():
        compute()
    assert f"SPARSELINE_THREADS={threads} is not a positive whole number" in capsys.readouterr().err


def test_other_packages_are_refused(tmp_path: Path) -> None:
    """The sentence names what differs, what runs and the remedy. Oracles: this process's versions."""
    path = tmp_path / "env.json"
    here = {
        "python": platform.python_version(),
        **{name: version(name).split("+")[0] for name in ("numpy", "torch", "transformers")},
    }
    write_json(path, here)
    environment.check(path)
    wrong: list[tuple[Any, str]] = [
        ({**here, "torch": "2.13.9"}, rf"torch 2\.13\.9, but {here['torch']} runs"),
        ({**here, "python": "3.1"}, r"python 3\.1, but"),
    ]
    wrong += [
        ({**here, "gone": "1.0"}, r"gone 1\.0, but no such package"),
        ({}, "python not at all, but"),
        ([], "python not at all"),
        ({**here, "numpy": None}, "numpy None"),
    ]
    for locked, wanted in wrong:
        write_json(path, locked)
        with pytest.raises(SparselineError, match=wanted + ".*make environment"):
            environment.check(path)


def test_the_versions_that_run_are_written_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As `make environment` does. Oracle: the checks afterwards, and the file's bytes, which are
    the same wherever these versions run.
    """
    monkeypatch.chdir(tmp_path)
    Path("env.lock.json").write_text('{"python": "2.7"}', encoding="utf-8")
    first = CliRunner().invoke(stages.environment.main)
    assert (first.exit_code, "python" in first.output) == (0, True)
    environment.check()
    written = Path("env.lock.json").read_bytes()
    assert CliRunner().invoke(stages.environment.main).output == ""
    assert Path("env.lock.json").read_bytes() == written


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSELINE_DEVICE", raising=False)
    assert compute() == torch.device("cpu")
    monkeypatch.setenv("SPARSELINE_DEVICE", "abacus")
    with pytest.raises(SparselineError, match="SPARSELINE_DEVICE=abacus is not a usable device"):
        compute()


def test_resume_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key follows the stage, the facts and the inputs' bytes, not their paths, nor which
    modules happen to be loaded.
    """
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"1")
    b.write_bytes(b"1")
    key = resume_key("prune", "facts", [a])
    assert key == resume_key("prune", "facts", [b])
    assert key not in (resume_key("prune", "other", [a]), resume_key("induce", "facts", [a]))
    b.write_bytes(b"2")
    assert key != resume_key("prune", "facts", [b])
    for name in [name for name in sys.modules if name.startswith("pipeline_lib.export")]:
        monkeypatch.delitem(sys.modules, name)
    assert key == resume_key("prune", "facts", [a])


# Scratch


KEY, OTHER = "0" * 32, "f" * 32


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A current directory, and no setting that says where scratch is."""
    for name in ("SPARSELINE_SCRATCH", "XDG_CACHE_HOME", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def placed() -> Path:
    with hold("prune", KEY, "prune it") as scratch:
        return scratch.kept.parent.parent


def test_scratch_lies_where_the_setting_says(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(nowhere / "here"))
    assert placed() == nowhere / "here" / ".cache" / "sparseline" / "resume"
    monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere / "c"))
    assert placed() == nowhere / "c" / "sparseline" / "resume"
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(nowhere / "s" / "deep"))
    assert placed() == nowhere / "s" / "deep"
    for bad in ("/proc/none", "/dev/null", "/dev/null/below"):
        monkeypatch.setenv("SPARSELINE_SCRATCH", bad)
        with pytest.raises(
            SparselineError,
            match=rf"SPARSELINE_SCRATCH={bad} cannot be used \(.+\); give a directory that can be written",
        ):
            placed()


def test_a_home_that_cannot_be_written(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The project's .dvc/tmp, the experiment's original first; else a temporary directory that is
    nobody else's. The log says so.
    """
    own = nowhere / "tmp" / f"sparseline-{os.getuid()}"
    for home in ("/proc/none", str(nowhere / "none"), "/dev/null"):
        monkeypatch.setenv("HOME", home)
        assert placed() == own
        said = capsys.readouterr().out
        assert re.fullmatch(
            rf"prune it: no cache directory in this user's home \(.+\); finished blocks are kept in {own}\n",
            said,
        )
    assert not (nowhere / "none").exists()
    assert own.stat().st_mode & 0o777 == 0o700
    (nowhere / "here" / ".dvc").mkdir()
    assert placed() == nowhere / "here" / ".dvc" / "tmp" / "sparseline"
    monkeypatch.setenv("DVC_ROOT", str(nowhere / "original"))
    (nowhere / "original" / ".dvc").mkdir(parents=True)
    assert placed() == nowhere / "original" / ".dvc" / "tmp" / "sparseline"
    monkeypatch.setenv("DVC_ROOT", str(nowhere))
    own.chmod(0o770)
    with pytest.raises(
        SparselineError, match=r"There is no directory for finished blocks \(.+\); set SPARSELINE_SCRATCH"
    ):
        placed()
    own.rename(own.with_name("elsewhere"))
    own.symlink_to(own.with_name("elsewhere"))
    own.with_name("elsewhere").chmod(0o700)
    with pytest.raises(SparselineError, match="There is no directory"):
        placed()


def test_no_home_at_all(nowhere: Path) -> None:
    """An arbitrary user without a home and an entry in /etc/passwd, as containers have them.
    Oracle: the directory that such a user can use.
    """
    code = """
import os
from pipeline_lib.core.scratch import hold
os.setgroups([]); os.setgid(12345); os.setuid(12345)
with hold("prune", "0" * 32, "prune it") as scratch:
    print(scratch.kept)
"""
    if os.getuid() != 0:
        pytest.skip("only root becomes another user")
    (nowhere / "tmp").chmod(0o1777)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "TMPDIR": "/tmp",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"/tmp/sparseline-12345/prune/{KEY}"
    shutil.rmtree("/tmp/sparseline-12345")


def test_scratch_is_dropped_when_all_went_well_and_kept_otherwise(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process's own directory is always deleted. That of a dead process is deleted when the next
    one gets the lock.
    """
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(nowhere / "s"))
    with pytest.raises(ZeroDivisionError), hold("prune", KEY, "prune it") as scratch:
        (scratch.kept / "facts").mkdir()
        (scratch.kept / "facts" / "block").write_text("x")
        (scratch.kept / "facts" / ".block.partial").write_text("x")
        (scratch.own / "stream").write_text("x")
        _ = 1 / 0
    assert {path.name for path in (nowhere / "s").rglob("*")} == {
        "prune",
        KEY,
        "facts",
        "block",
        ".block.partial",
    }
    with hold("prune", KEY, "prune it") as scratch:
        assert {path.name for path in scratch.kept.rglob("*")} == {"facts", "block", scratch.own.name}
    assert [path.name for path in (nowhere / "s").rglob("*")] == ["prune"]
    with pytest.raises(ZeroDivisionError), hold("prune", KEY, "prune it"):
        _ = 1 / 0
    assert [path.name for path in (nowhere / "s").rglob("*")] == ["prune"]  # nothing was finished


def test_abandoned_scratch_is_removed(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory is deleted after two weeks without a new file, unless a process holds its lock.
    Other files in the folder are not touched.
    """
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(nowhere / "s"))
    place = nowhere / "s" / "prune"
    names = {
        "old": "1" * 32,
        "young": "2" * 32,
        "held": "3" * 32,
        "foreign": "notes",
        "fresh inside": "4" * 32,
    }
    for name in names.values():
        (place / name / "facts").mkdir(parents=True)
        (place / name / "facts" / "block").write_text("x")
    (place / f".{OTHER}.half.partial").mkdir()
    (place / f"{'1' * 32}.lock").write_text("x")
    with hold("prune", names["held"], "prune it"):
        for path in place.rglob("*"):
            if names["young"] not in str(path) and path != place / names["fresh inside"] / "facts" / "block":
                os.utime(path, (0, time.time() - 15 * 24 * 3600))
        placed()
        assert {path.name for path in place.iterdir()} == {
            *(names[one] for one in ("young", "held", "foreign", "fresh inside")),
            f"{names['held']}.lock",
        }
    assert {path.name for path in place.iterdir()} == {
        names[one] for one in ("young", "foreign", "fresh inside")
    }


HOLDERS = """
import os, sys, time
from pathlib import Path
from pipeline_lib.core.scratch import hold

def work(number):
    sys.stdout = open(f"said-{number}", "w")
    with hold("prune", "0" * 32, "prune it"), open("log", "a") as log:
        print(f"+{number}", file=log, flush=True)
        time.sleep(0.02)
        print(f"-{number}", file=log, flush=True)
        if number % 3 == 0:
            sys.stdout.flush()
            os.kill(os.getpid(), 9)
    sys.stdout.flush()

for number in range(12):
    if os.fork() == 0:
        work(number)
        os._exit(0)
print(sorted(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(12)))
"""


def test_a_key_has_one_holder_at_a_time(nowhere: Path) -> None:
    """Twelve processes, of which every third is killed in the midst. Oracle: their log: who came in
    went out, or was killed, before the next.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SPARSELINE_SCRATCH": str(nowhere / "s")}
    done = subprocess.run(
        [sys.executable, "-c", HOLDERS], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [-9] * 4 + [0] * 8
    lines = Path("log").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 24 and all(
        came[1:] == went[1:] for came, went in zip(lines[::2], lines[1::2], strict=True)
    )
    said = [path.read_text(encoding="utf-8") for path in Path().glob("said-*")]
    owner = r"(process \d+ on \S+ \(`.+` in .+, for .+ s\)|another process)"
    assert any(said) and all(
        one == "" or re.fullmatch(rf"prune it: {owner} has these blocks; waiting until it ends\n", one)
        for one in said
    )


def test_a_lock_that_cannot_be_written_does_not_stay(tmp_path: Path) -> None:
    """A limit on the size of files, which the owner's name meets. Oracle: the directory, which a
    lock would stay in.
    """
    code = """
import os, resource, sys
from pathlib import Path
from pipeline_lib.core.scratch import hold
os.environ["SPARSELINE_SCRATCH"] = sys.argv[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try:
    with hold("prune", "0" * 32, "prune x"):
        print("held")
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "File too large\n", done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
