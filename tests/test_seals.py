"""Damaged and exchanged artifacts are noticed by the stage that reads them, whoever runs it.
Oracles: the sentence, the exit code, the outputs.
"""

import json
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner
from project import WANDA, build, invoke, make_workspace, tree
from safetensors.torch import load_file, save_file

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.kept import Kept
from pipeline_lib.core.process import Stopped
from pipeline_lib.core.workspace import Workspace

VARIANTS = {
    "one": WANDA
    | {
        "induce": {},
        "allocation": {"method": "predicted"},
        "quantization": {"bits": 4, "group": 20},
        "reconstruction": {"steps": ["obs"]},
        "export": ["bitmask"],
    },
    "two": WANDA | {"allocation": {"method": "predicted"}},
}
Damage = Callable[[Path], None]
# A file or directory of build/ -> the stage that reads it
READ = {
    "prepare/model.json": "calibrate",
    "prepare/matrices.json": "allocate one",
    "texts/calibrate/calibration.safetensors": "calibrate",
    "texts/evaluate/test.safetensors": "evaluate dense",
    "calibrate/block-001.safetensors": "scale",
    "scale/transform.safetensors": "induce one",
    "sensitivity/sensitivity.json": "curves one",
    "sensitivity/moments/block-000.safetensors": "curves one",
    "curves/one.json": "allocate one",
    "allocate/one.json": "prune one",
    "induce/one/transform.safetensors": "prune one",
    "prune/one/checkpoint/model-00001-of-00003.safetensors": "evaluate one",
    "prune/one/checkpoint/config.json": "evaluate one",
    "prune/one/masks/block-000.safetensors": "export one",
    "prune/one/quantization/block-001.safetensors": "export one",
    "facts/one.json": "export one",
    "evaluate/one.json": "export one",
    "evaluate/dense.json": "report",
    "completions/one.json": "report",
    "tasks/one.json": "report",
    "sizes/one.json": "report",
    "sensitivity/estimate.json": "report",
    "choice.json": "report",
}


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 2 // 3] ^= 4
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def null(path: Path) -> None:
    path.write_text("null\n", encoding="utf-8")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[Damage] = [flip, Path.unlink, truncate, null, pipe, endless, folder]


def tried(files: Iterable[str]) -> list[tuple[str, Damage]]:
    """The first two kinds of damage on every file; all kinds on the first file of each kind, and in
    the first directory that has its own seal.
    """
    first = {file.rpartition(".")[2]: file for file in reversed(list(files))}
    sealed = next((file for file in files if file.startswith("prune/")), "")
    return [
        (file, damage)
        for file in files
        for damage in (DAMAGES if file in (*first.values(), sealed) else DAMAGES[:2])
    ]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages, by hand. Read only."""
    home = tmp_path_factory.mktemp("seals")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSELINE_SCRATCH", str(home / "scratch"))
        project = make_workspace(home / "project", variants=VARIANTS, report={"baseline": "two"})
        patch.chdir(project)
        texts = [f"text {name}" for name in ("calibration", "validation", "test")]
        build("keys", "prepare", *texts, "calibrate", "scale", "sensitivity", "evaluate dense", "tasks dense")
        for name in VARIANTS:
            build(
                *(
                    f"{stage} {name}"
                    for stage in (
                        "curves",
                        "allocate",
                        "induce",
                        "prune",
                        "distil",
                        "evaluate",
                        "tasks",
                        "export",
                    )
                )
            )
        build("choose", "report")
    return project


@pytest.fixture
def project(ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    copied = Path(shutil.copytree(ran, tmp_path / "project"))
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(copied)
    return copied


def content(directory: Path) -> dict[str, object]:
    """What is below a directory, without opening pipes and devices."""
    found = {path: path.lstat() for path in sorted(directory.rglob("*"))}
    return {
        str(path): (stat.S_IFMT(one.st_mode), one.st_size, one.st_mtime_ns)
        for path, one in found.items()
        if not path.is_dir()
    }


def refused(project: Path, stage: str, *words: str) -> None:
    """One sentence, exit code 2, and no output is touched."""
    before = content(project / "build")
    result = invoke(*stage.split())
    assert result.exit_code == 2, result.output
    (said,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert all(word in said for word in (*words, "dvc repro")), said
    assert content(project / "build") == before


@pytest.mark.parametrize(("file", "damage"), tried(READ), ids=lambda value: getattr(value, "__name__", value))
def test_damage_is_named(project: Path, file: str, damage: Damage) -> None:
    path = project / "build" / file
    damage(path)
    before = content(project / "build")
    said = CliRunner().invoke(import_module(f"stages.{READ[file].split()[0]}").main, READ[file].split()[1:])
    assert said.exit_code == 2, said.output
    (line,) = [line for line in said.output.splitlines() if line.startswith("error: ")]
    assert (Path(file).name if path.exists() else Path(file).parent.name) in line, line
    assert content(project / "build") == before


@pytest.mark.parametrize(
    ("here", "there", "stage"),
    [
        ("allocate/one.json", "allocate/two.json", "prune one"),
        ("curves/one.json", "curves/two.json", "allocate one"),
        ("facts/one.json", "facts/two.json", "export one"),
        ("evaluate/one.json", "evaluate/two.json", "report"),
        ("sizes/one.json", "sizes/dense.json", "report"),
        ("texts/evaluate/test.safetensors", "texts/evaluate/validation.safetensors", "evaluate one"),
        ("calibrate/block-000.safetensors", "calibrate/block-001.safetensors", "scale"),
        ("prune/one/masks/block-000.safetensors", "prune/one/masks/block-001.safetensors", "export one"),
        (
            "prune/one/checkpoint/model-00001-of-00003.safetensors",
            "prune/two/checkpoint/model-00001-of-00003.safetensors",
            "evaluate one",
        ),
        ("induce/one", "induce/two", "prune one"),
        ("prune/one", "prune/two", "evaluate one"),
    ],
)
def test_another_s_artifact_is_named(project: Path, here: str, there: str, stage: str) -> None:
    own, other = project / "build" / here, project / "build" / there
    shutil.rmtree(own) if own.is_dir() else own.unlink()
    shutil.copytree(other, own) if other.is_dir() else shutil.copyfile(other, own)
    refused(project, stage, Path(here).name)


def test_a_file_too_many_is_named(project: Path) -> None:
    (project / "build/prune/one/checkpoint/chat_template.jinja").write_text(
        "{{ messages }}", encoding="utf-8"
    )
    refused(project, "evaluate one", "chat_template.jinja", "no stage wrote")


def test_another_model_s_artifacts_are_named(project: Path) -> None:
    """Everything is whole, and of two models. Oracle: which file the sentence names."""
    weights = project / "data/model/model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, {"format": "pt"})
    build("prepare")
    refused(project, "prune one", "build/allocate/one.json", "for another model")
    refused(project, "evaluate dense", "build/texts/evaluate/test.safetensors", "for another model")


def test_an_edited_value_is_named(project: Path) -> None:
    """A number of another value, with its comma and its length as before."""
    path = project / "build/allocate/one.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    first = next(iter(value["kept"]))
    value["kept"][first] += 1
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    refused(project, "prune one", "build/allocate/one.json", "checksum")


def test_a_seal_belongs_to_a_place(tmp_path: Path) -> None:
    """A project may move; an artifact in it may not. Another schema is another version's."""
    (tmp_path / "a").mkdir()
    path = tmp_path / "a/build/facts/x.json"
    Workspace(tmp_path / "a").save(path, {"value": 1})
    (tmp_path / "a").rename(tmp_path / "b")
    moved = tmp_path / "b/build/facts/x.json"
    assert Workspace(tmp_path / "b").load(moved) == {"value": 1}
    other = moved.rename(moved.with_name("y.json"))
    with pytest.raises(SparselineError, match=r"y\.json was written as build/facts/x\.json"):
        Workspace(tmp_path / "b").load(other)
    other.write_text(
        other.read_text(encoding="utf-8").replace('"schema": 1', '"schema": 9'), encoding="utf-8"
    )
    with pytest.raises(SparselineError, match="another version of Sparseline"):
        Workspace(tmp_path / "b").load(other)


# Finished blocks of a stage that was interrupted

KEPT = {  # in the scratch directory -> the stage that resumes
    "checkpoint/model-00001-of-00003.safetensors": "prune one",
    "masks/block-000.safetensors": "prune one",
    "quantization/block-000.safetensors": "prune one",
    "facts/block-000.json": "prune one",
    "finished-000.json": "prune one",
    "block-000.safetensors": "induce one",
}


@pytest.fixture
def interrupted(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A stage ends after its first block; where it keeps that."""

    def interrupt(stage: str) -> Path:
        finish = Kept.finish

        def stop(kept: Kept, block: int, written: list[Path]) -> None:
            finish(kept, block, written)
            raise Stopped(signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(Kept, "finish", stop)
            assert invoke(*stage.split()).exit_code == 128 + signal.SIGTERM
        (kept,) = (path for path in tmp_path.glob(f"scratch/{stage.split()[0]}/*") if path.is_dir())
        return kept

    return interrupt


def outputs(project: Path) -> dict[str, str]:
    return {
        path: digest
        for path, digest in tree(project / "build").items()
        if path.split("/")[0] in ("prune", "induce", "facts")
    }


@pytest.mark.parametrize(("file", "damage"), tried(KEPT), ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_block_is_computed_again(
    ran: Path, project: Path, tmp_path: Path, interrupted: Callable[[str], Path], file: str, damage: Damage
) -> None:
    """Oracles: the bytes of a run that nobody interrupted, and the log. Without its list of
    checksums a block was never finished.
    """
    kept = interrupted(KEPT[file])
    damage(kept / file)
    result = invoke(*KEPT[file].split())
    assert result.exit_code == 0, result.output
    assert ("the stored block 0 is damaged" in result.output) == (
        kept / file != kept / "finished-000.json" or damage is not Path.unlink
    )
    assert "resuming" not in result.output
    assert outputs(project) == outputs(ran)
    assert not tree(tmp_path / "scratch")


@pytest.mark.parametrize("what", ["checkpoint", "masks", "facts", ".", "lock"])
def test_what_is_no_directory_is_no_obstacle(
    ran: Path, project: Path, tmp_path: Path, interrupted: Callable[[str], Path], what: str
) -> None:
    """A file where a stage keeps files, and a directory where it has its lock."""
    kept = interrupted("prune one")
    if what == "lock":
        kept.with_name(f"{kept.name}.lock").mkdir()
    else:
        shutil.rmtree(kept / what)
        (kept / what).write_text("in the way", encoding="utf-8")
    result = invoke("prune", "one")
    assert result.exit_code == 0, result.output
    assert outputs(project) == outputs(ran)
    assert not tree(tmp_path / "scratch")


def test_a_whole_block_is_kept(ran: Path, project: Path, interrupted: Callable[[str], Path]) -> None:
    """What the test above rests on."""
    interrupted("prune one")
    result = invoke("prune", "one")
    assert "resuming after 1 of 2 blocks" in result.output and "damaged" not in result.output
    assert outputs(project) == outputs(ran)
