"""A killed prune or induction goes on where it was. Oracle: the bytes of a run that nobody killed."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from project import build, change_params, environment, make_workspace, run, tree

from pipeline_lib.core.artifacts import block_file, read_tensors

COMMAND = ("python", "-m", "stages.prune", "sparseline")
BLOCKS = 4
EPOCHS = 40  # a block takes most of a second, a look at the scratch directory a hundredth of one
VARIANT: dict[str, Any] = {
    "factors": "scale/transform.safetensors",
    "sensitivity": "prepare/unmeasured.json",
    "reconstruction": {"steps": ["obs", "channel"], "channel": {"epochs": EPOCHS, "patience": EPOCHS}},
}
# Blocks in windows of two, aiming at the dense stream, quantised after the fit, and with streams that are files beside the finished blocks.
WINDOWS: dict[str, Any] = {
    "factors": "scale/transform.safetensors",
    "sensitivity": "prepare/unmeasured.json",
    "activation_budget_bytes": 0,
    "quantization": {"bits": 4, "group": 20, "symmetric": False},
    "reconstruction": {
        "steps": ["obs", "lsq", "block"],
        "collect": "site",
        "towards_dense": 1.0,
        "lsq": {"iterations": 5},
        "block": {"window": 2},
    },
}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with all that prune needs. Read only."""
    home = tmp_path_factory.mktemp("ready")
    with pytest.MonkeyPatch.context() as patch:
        variants = {"sparseline": VARIANT, "windows": WINDOWS}
        workspace = make_workspace(home / "project", model={"layers": BLOCKS}, induced={}, variants=variants)
        patch.chdir(workspace)
        build("prepare", "text calibration", "calibrate", "scale")
    return workspace


@pytest.fixture
def workspace(ready: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ready, tmp_path / "project"))


@pytest.fixture(scope="module")
def undisturbed(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an uninterrupted run writes, and nothing of it left in its scratch."""
    workspace = Path(shutil.copytree(ready, tmp_path_factory.mktemp("undisturbed") / "project"))
    output = run(workspace, *COMMAND)
    assert "resuming" not in output
    assert not tree(scratch(workspace))
    return results(workspace)


def scratch(workspace: Path) -> Path:
    return workspace.parent / "scratch"


def results(workspace: Path) -> dict[str, str]:
    """All that a prune stage writes, its cost aside."""
    return {path: digest for path, digest in tree(workspace / "build").items() if path.split("/")[0] in ("prune", "facts")}


def finished(workspace: Path) -> int:
    """Blocks whose facts, the last of their files, are in the scratch directory."""
    return len(list(scratch(workspace).glob("prune/*/facts/block-*.json")))


def kill_after(workspace: Path, blocks: int) -> int:
    """Start the stage, kill it (SIGKILL) as soon as so many blocks are finished; how many were."""
    with (workspace.parent / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(COMMAND, cwd=workspace, env=environment(workspace), stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while finished(workspace) < blocks:
                assert process.poll() is None, (workspace.parent / "log").read_text(encoding="utf-8")
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == -9
    return finished(workspace)


def test_a_killed_run_goes_on_and_gives_the_same_bytes(workspace: Path, undisturbed: dict[str, str]) -> None:
    """Killed after the first block and again after the third."""
    before = tree(workspace / "build")
    for blocks in (1, 3):
        done = kill_after(workspace, blocks)
        assert blocks <= done < BLOCKS
        assert tree(workspace / "build") == before  # no output, whole or partial
    output = run(workspace, *COMMAND)
    assert f"prune sparseline: resuming after {done} of {BLOCKS} blocks" in output
    assert results(workspace) == undisturbed
    assert not tree(scratch(workspace))


def test_another_run_does_not_resume(workspace: Path) -> None:
    """Oracle: the log, and the interrupted run's blocks, which stay for whoever goes on with it. Other parameters, then other code."""
    kill_after(workspace, 1)
    kept = tree(scratch(workspace))
    key = "variants.sparseline.reconstruction.channel.epochs"
    change_params(workspace, key, 1)
    assert "resuming" not in run(workspace, *COMMAND)
    assert tree(scratch(workspace)) == kept
    change_params(workspace, key, EPOCHS)
    with (workspace / "pipeline_lib" / "reconstruction" / "fit.py").open("a", encoding="utf-8") as file:
        file.write("# another version\n")
    assert "resuming" not in run(workspace, *COMMAND)
    assert tree(scratch(workspace)) == kept


def test_damaged_leftovers_are_no_blocks(workspace: Path, undisturbed: dict[str, str]) -> None:
    """A kill can come between a block's files: without its facts a block is done again. Oracle: the bytes of an undisturbed run."""
    done = kill_after(workspace, 2)
    (directory,) = scratch(workspace).glob("prune/*")
    (directory / "facts" / f"block-{done - 1:03d}.json").unlink()
    for path in (*directory.glob(f"checkpoint/model-{done:05d}-*"), *directory.glob(f"masks/block-{done - 1:03d}.*")):
        path.write_bytes(path.read_bytes()[:100])
    (directory / "checkpoint" / f".model-{done + 1:05d}-of-{BLOCKS + 1:05d}.safetensors.partial").write_bytes(b"half")
    output = run(workspace, *COMMAND)
    assert f"resuming after {done - 1} of {BLOCKS} blocks" in output
    assert results(workspace) == undisturbed


def test_a_kill_while_results_move_into_place(workspace: Path, undisturbed: dict[str, str]) -> None:
    """Between file systems a move takes long. Oracle: what was there before, then the bytes of an undisturbed run."""
    code = """
import os, sys
from stages.prune import main

def kill(event, arguments):
    # an audit hook sees whichever way the files take: the checkpoint is in place, the masks would follow
    if event != "import" and any(".sparseline.partial/masks" in str(argument) for argument in arguments):
        os.kill(os.getpid(), 9)

sys.addaudithook(kill)
main(["sparseline"], standalone_mode=False)
"""
    before = results(workspace)
    run(workspace, "python", "-c", code, code=-9)
    assert finished(workspace) == BLOCKS
    assert results(workspace).keys() - {path for path in results(workspace) if ".partial" in path} == before.keys()
    run(workspace, *COMMAND)
    assert results(workspace) == undisturbed
    assert not tree(scratch(workspace))


def test_a_window_that_was_killed_is_done_again(workspace: Path) -> None:
    """Killed after the first block of a window, after its last, and after the first of the next. Oracles: the bytes of a run that nobody
    killed, which comes first; and which blocks are kept each time: a window that is not whole is done again as a whole.
    """
    code = """
import json, os
from pathlib import Path
import stages.prune as stage
from transformers.models.llama import modeling_llama  # once, before the forks
keep = stage.Progress.keep

def run(last):
    def told(self, index, result):
        keep(self, index, result)
        kept.append(index)
        if index == last:
            files = {path.name.split("-")[0] for path in self.directory.glob("streams/*.safetensors")}
            print()
            print(json.dumps([kept, sorted(files)]), flush=True)
            os.kill(os.getpid(), 9)

    kept, stage.Progress.keep = [], told
    stage.main(["windows"], standalone_mode=False)
    print()
    print(json.dumps([kept, []]), flush=True)
    os._exit(0)

for last in (None, 0, 1, 2, None):
    if os.fork() == 0:
        run(last)
    print(json.dumps(os.waitstatus_to_exitcode(os.wait()[1])), flush=True)
    if last is None:
        Path("build/prune").rename(Path("build/prune").with_name(f"prune-{len(list(Path('build').glob('prune-*')))}"))
        Path("build/facts/windows.json").rename(sorted(Path("build").glob("prune-*"))[-1] / "facts.json")
"""
    output = run(workspace, "python", "-c", code)
    told = [json.loads(line) for line in output.splitlines() if re.match(r"[\[\d-]", line)]
    streams = ["ahead", "dense", "pruned"]
    assert told == [[[0, 1, 2, 3], []], 0, [[0], streams], -9, [[0, 1], streams], -9, [[2], streams], -9, [[2, 3], []], 0]
    assert [int(done) for done in re.findall(r"resuming after (\d) of 4 blocks", output)] == [1, 2, 3]
    undisturbed, resumed = (tree(workspace / "build" / f"prune-{number}") for number in (0, 1))
    assert resumed == undisturbed
    assert len([path for path in undisturbed if "/quantization/block-" in path]) == BLOCKS
    assert len(undisturbed) > 3 * BLOCKS
    told = json.loads((workspace / "build" / "prune-0" / "facts.json").read_text(encoding="utf-8"))
    assert told["quantization"].keys() == {"bits", "group", "symmetric", "bits_per_weight", "rounding_error"}
    assert 0 < told["quantization"]["rounding_error"] < 0.1
    for index, steps in told["blocks"].items():
        assert steps.keys() == {"block", "refit"}
        scales, facts = read_tensors(block_file(workspace / "build" / "prune-0" / "windows" / "quantization", int(index)))
        assert (facts["bits"], facts["group"], facts["symmetric"]) == (4, 20, False)
        assert scales.keys() == {f"{label}.{part}" for label in facts["shapes"] for part in ("scale", "zero_point")}
        for label, (rows, columns) in facts["shapes"].items():
            assert scales[f"{label}.scale"].shape == scales[f"{label}.zero_point"].shape == (rows, -(-columns // 20))
        sizes = [rows * columns for rows, columns in facts["shapes"].values()]
        groups = [scales[f"{label}.scale"].numel() for label in facts["shapes"]]
        expected = 1 + 4 * 0.5 + 20 * sum(groups) / sum(sizes)  # mask, half of the codes, scales and zero points
        assert told["quantization"]["bits_per_weight"] == pytest.approx(expected)
    assert not tree(scratch(workspace))


def test_a_killed_induction_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    """Killed once two of four blocks are kept. Oracle: a run that nobody killed; only the other two blocks are learned again."""
    workspace = make_workspace(tmp_path / "project", model={"layers": BLOCKS})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        build("prepare", "text calibration", "calibrate", "scale")
    code = """
import os, stages.induce as stage
keep, induce_block = stage.keep, stage.induce_block

def last(directory, index, outcome):
    keep(directory, index, outcome)
    os.kill(os.getpid(), 9)

def told(*arguments):
    print("learning", arguments[7])
    return induce_block(*arguments)

stage.induce_block = told
if {killed}:
    stage.keep = lambda directory, index, outcome: (last if index == 1 else keep)(directory, index, outcome)
stage.main(["sparseline"], standalone_mode=False)
"""
    before = tree(workspace / "build")
    run(workspace, "python", "-c", code.format(killed=True), code=-9)
    assert tree(workspace / "build") == before
    output = run(workspace, "python", "-c", code.format(killed=False))
    assert f"induce sparseline: resuming after 2 of {BLOCKS} blocks" in output
    assert re.findall(r"learning (\S+)", output) == ["layers.2", "layers.3"]
    assert not tree(scratch(workspace))
    resumed = {path: digest for path, digest in tree(workspace / "build").items() if path.startswith("induce/")}
    output = run(workspace, "python", "-c", code.format(killed=False))
    assert output.count("learning") == BLOCKS
    assert resumed == {path: digest for path, digest in tree(workspace / "build").items() if path.startswith("induce/")}
