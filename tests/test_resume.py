"""A killed prune or induction resumes, two at once do not disturb each other, and a stage ends with
its `dvc`. Oracle: the bytes of an undisturbed run.

Oracle: the bytes of a run that nobody killed or disturbed.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from project import (
    build,
    change_params,
    environment,
    holder,
    invoke,
    make_workspace,
    run,
    scratch,
    start,
    tree,
)

from pipeline_lib.core import artifacts, process, runtime
from pipeline_lib.core.artifacts import block_file, read_tensors
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.prune.window import Block

COMMAND = ("python", "-m", "stages.prune", "sparseline")
BLOCKS = 4
EPOCHS = 40  # a block takes most of a second, a look at the scratch directory a hundredth of one
VARIANT: dict[str, Any] = {
    # a block takes about a second; pruning starts from ``ready``'s factors, which nothing learned
    "induce": {"steps": 100},
    "selection": {"score": "obs", "group": "block"},
    "reconstruction": {
        "steps": ["obs", "finetune_channels"],
        "finetune_channels": {"epochs": EPOCHS, "patience": EPOCHS},
    },
}
# Blocks in windows of two, aiming at the dense stream, quantised after the fit; with FILES, streams
# are files beside the finished blocks.
WINDOWS: dict[str, Any] = {
    "induce": {},
    "quantization": {"bits": 4, "group": 20, "symmetric": False},
    "reconstruction": {
        "steps": ["obs", "lsq", "finetune"],
        "statistics": "per_site",
        "dense_target": 1.0,
        "lsq": {"iterations": 5},
        "finetune": {"window": 2},
    },
}


FILES = ("SPARSELINE_ACTIVATION_BYTES", "0")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with all that prune needs. Read only."""
    home = tmp_path_factory.mktemp("ready")
    with pytest.MonkeyPatch.context() as patch:
        variants = {"sparseline": VARIANT, "windows": WINDOWS}
        report = {"baseline": "sparseline"}
        workspace = make_workspace(
            home / "project", model={"layers": BLOCKS}, report=report, variants=variants
        )
        patch.chdir(workspace)
        build(
            "keys",
            "prepare",
            "text calibration",
            "calibrate",
            "scale",
            *(f"allocate {name}" for name in variants),
        )
        for name in variants:
            with Workspace().directory(Path("build/induce") / name) as made:
                shutil.copyfile("build/scale/transform.safetensors", made / "transform.safetensors")
    return workspace


@pytest.fixture
def workspace(ready: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ready, tmp_path / "project"))


def results(workspace: Path) -> dict[str, str]:
    """All that prune and induce write, costs aside."""
    return {
        path: digest
        for path, digest in tree(workspace / "build").items()
        if path.split("/")[0] in ("prune", "facts", "induce")
    }


@pytest.fixture(scope="module")
def alone(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """What a stage writes that nobody interrupts or disturbs, and nothing of it left in its scratch."""

    @cache
    def build_alone(stage: str) -> dict[str, str]:
        workspace = Path(shutil.copytree(ready, tmp_path_factory.mktemp("alone") / "project"))
        name, variant = stage.split()
        assert "resuming" not in run(workspace, "python", "-m", f"stages.{name}", variant)
        assert not tree(scratch(workspace))
        return results(workspace)

    return build_alone


@pytest.fixture
def undisturbed(alone: Callable[[str], dict[str, str]]) -> dict[str, str]:
    return alone("prune sparseline")


def finished(workspace: Path) -> int:
    """Blocks whose checksums, the last of their files, are in the scratch directory."""
    return len(list(scratch(workspace).glob("prune/*/finished-*.json")))


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
    """Killed after the first block and again after the third. A kill can also come between a
    block's files: without its checksums a block is done again, whatever else of it lies there.
    """
    before = tree(workspace / "build")
    for blocks in (1, 3):
        done = kill_after(workspace, blocks)
        assert blocks <= done < BLOCKS
        assert tree(workspace / "build") == before  # no output, whole or partial
    (directory,) = scratch(workspace).glob("prune/*/")
    (directory / f"finished-{done - 1:03d}.json").unlink()
    for path in (
        *directory.glob(f"checkpoint/model-{done:05d}-*"),
        *directory.glob(f"masks/block-{done - 1:03d}.*"),
    ):
        path.write_bytes(path.read_bytes()[:100])
    (directory / "checkpoint" / f".model-{done + 1:05d}-of-{BLOCKS + 1:05d}.safetensors.partial").write_bytes(
        b"half"
    )
    output = run(workspace, *COMMAND)
    assert f"prune sparseline: resuming after {done - 1} of {BLOCKS} blocks" in output
    assert results(workspace) == undisturbed
    assert not tree(scratch(workspace))


def test_another_run_does_not_resume(workspace: Path) -> None:
    """Oracle: the log, and the blocks of the interrupted run, which stay for a run that can resume
    it. First with other parameters, then with other code.
    """
    kill_after(workspace, 1)
    kept = tree(scratch(workspace))
    key = "variants.sparseline.reconstruction.finetune_channels.epochs"
    change_params(workspace, key, 1)
    assert "resuming" not in run(workspace, *COMMAND)
    assert tree(scratch(workspace)) == kept
    change_params(workspace, key, EPOCHS)
    with (workspace / "pipeline_lib" / "fit" / "fit.py").open("a", encoding="utf-8") as file:
        file.write("# another version\n")
    assert "resuming" not in run(workspace, *COMMAND)
    assert tree(scratch(workspace)) == kept


def test_a_kill_while_results_move_into_place(workspace: Path, undisturbed: dict[str, str]) -> None:
    """Between file systems a move takes long. Oracle: what was there before, then the bytes of an
    undisturbed run.
    """
    code = r"""
import os, re, sys
from stages.prune import main

def kill(event, arguments):
    # an audit hook sees whichever way the files take: the checkpoint is in place, the masks would follow
    masks = r"\.sparseline\.[^/]+\.partial/masks"
    if event != "import" and any(re.search(masks, str(argument)) for argument in arguments):
        os.kill(os.getpid(), 9)

sys.addaudithook(kill)
main(["sparseline"], standalone_mode=False)
"""
    before = results(workspace)
    run(workspace, "python", "-c", code, code=-9)
    assert finished(workspace) == BLOCKS
    assert (
        results(workspace).keys() - {path for path in results(workspace) if ".partial" in path}
        == before.keys()
    )
    run(workspace, *COMMAND)
    assert results(workspace) == undisturbed
    assert not tree(scratch(workspace))


def test_a_window_that_was_killed_is_done_again(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the first block of a window, after its last, and after the first of the next.
    Oracles: the bytes of a run that nobody killed, which comes first; and which blocks are kept
    each time: a window that is not whole is done again as a whole.
    """
    code = """
import json, os
from pathlib import Path
import stages.prune as stage
from pipeline_lib.jobs.prune import FinishedBlocks  # once, before the forks
from transformers.models.llama import modeling_llama
keep = FinishedBlocks.keep

def run(last):
    def told(self, index, result):
        keep(self, index, result)
        kept.append(index)
        if index == last:
            files = {path.name.split("-")[0] for path in self.directory.glob(".own.*.partial/*.safetensors")}
            print()
            print(json.dumps([kept, sorted(files)]), flush=True)
            os.kill(os.getpid(), 9)

    kept, FinishedBlocks.keep = [], told
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
    monkeypatch.setenv(*FILES)
    output = run(workspace, "python", "-c", code)
    told = [json.loads(line) for line in output.splitlines() if re.match(r"[\[\d-]", line)]
    streams = ["ahead", "dense", "pruned"]
    assert told == [
        [[0, 1, 2, 3], []],
        0,
        [[0], streams],
        -9,
        [[0, 1], streams],
        -9,
        [[2], streams],
        -9,
        [[2, 3], []],
        0,
    ]
    assert [int(done) for done in re.findall(r"resuming after (\d) of 4 blocks", output)] == [1, 2, 3]
    undisturbed, resumed = (tree(workspace / "build" / f"prune-{number}") for number in (0, 1))
    assert resumed == undisturbed
    assert len([path for path in undisturbed if "/quantization/block-" in path]) == BLOCKS
    assert len(undisturbed) > 3 * BLOCKS
    told = json.loads((workspace / "build" / "prune-0" / "facts.json").read_text(encoding="utf-8"))
    assert told["quantization"].keys() == {"bits", "group", "symmetric", "bits_per_weight", "rounding_error"}
    assert 0 < told["quantization"]["rounding_error"] < 0.1
    for index, steps in told["blocks"].items():
        assert steps.keys() == {"finetune", "refit"}
        scales, facts = read_tensors(
            block_file(workspace / "build" / "prune-0" / "windows" / "quantization", int(index))
        )
        assert (facts["bits"], facts["group"], facts["symmetric"]) == (4, 20, False)
        assert scales.keys() == {
            f"{label}.{part}" for label in facts["shapes"] for part in ("scale", "zero_point")
        }
        for label, (rows, columns) in facts["shapes"].items():
            assert (
                scales[f"{label}.scale"].shape
                == scales[f"{label}.zero_point"].shape
                == (rows, -(-columns // 20))
            )
        sizes = [rows * columns for rows, columns in facts["shapes"].values()]
        groups = [scales[f"{label}.scale"].numel() for label in facts["shapes"]]
        # mask, half of the codes, scales and zero points
        expected = 1 + 4 * 0.5 + 20 * sum(groups) / sum(sizes)
        assert told["quantization"]["bits_per_weight"] == pytest.approx(expected)
    assert not tree(scratch(workspace))


def test_a_killed_induction_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    """Killed once two of four blocks are kept. Oracle: a run that nobody killed; only the other two
    blocks are learned again, and the kill left build/ as it was.
    """
    workspace = make_workspace(
        tmp_path / "project", model={"layers": BLOCKS}, variants={"sparseline": {"induce": {}}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        build("prepare", "text calibration", "calibrate", "scale", "allocate sparseline")
    code = """
import os, pathlib, shutil, sys
import pipeline_lib.jobs.induce as job, stages.induce as stage
from transformers.models.llama import modeling_llama  # once, before the forks
keep, induce_block = job.keep, job.induce_block

def last(directory, index, outcome):
    keep(directory, index, outcome)
    os.kill(os.getpid(), 9)

def told(dense, *arguments):
    print("learning", dense.where, flush=True)
    return induce_block(dense, *arguments)

def files():
    return {path: path.read_bytes() for path in pathlib.Path("build").rglob("*") if path.is_file()}

job.induce_block = told
before = files()
for number, killed in enumerate((True, False, False)):
    if os.fork() == 0:
        if killed:
            job.keep = lambda at, index, outcome: (last if index == 1 else keep)(at, index, outcome)
        stage.main(["sparseline"], standalone_mode=False)
        sys.stdout.flush()
        os._exit(0)
    print("ended", os.waitstatus_to_exitcode(os.wait()[1]), files() == before, flush=True)
    if not killed:
        shutil.move("build/induce", f"build/induce-{number}")
"""
    output = run(workspace, "python", "-c", code)
    told = re.findall(r"learning (\S+)|ended (.+)|(resuming after .+)", output)
    blocks = [f"layers.{index}" for index in range(BLOCKS)]
    goes_on = f"resuming after 2 of {BLOCKS} blocks"
    assert ["".join(parts) for parts in told] == [
        *blocks[:2],
        "-9 True",
        goes_on,
        *blocks[2:],
        "0 False",
        *blocks,
        "0 False",
    ]
    resumed, undisturbed = (tree(workspace / "build" / f"induce-{number}") for number in (1, 2))
    assert resumed == undisturbed
    assert not tree(scratch(workspace))


# Two runs at once


def line_of(process: subprocess.Popen[str], part: str) -> str:
    """Reads on until a line holds this."""
    assert process.stdout
    for line in process.stdout:
        if part in line:
            return line
    raise AssertionError(f"ended without {part!r}")


@pytest.mark.parametrize(
    ("stage", "killed"), [("prune sparseline", True), ("prune windows", False), ("induce sparseline", False)]
)
def test_two_runs_at_once(
    ready: Path,
    tmp_path: Path,
    alone: Callable[[str], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    killed: bool,
) -> None:
    """Two clones, one scratch. The second says whom it waits for, and takes over what is finished,
    all of it or what was so at a kill. Streams are in memory, or files (windows).
    """
    name, variant = stage.split()
    if variant == "windows":
        monkeypatch.setenv(*FILES)
    command = ("python", "-m", f"stages.{name}", variant)
    one, two = (Path(shutil.copytree(ready, tmp_path / place)) for place in ("one", "two"))
    first = start(one, *command)
    os.kill(holder(one, first, name), signal.SIGSTOP)
    second = start(two, *command)
    said = line_of(second, "waiting")
    owner = rf"process {first.pid} on \S+ \(`\S*python.* -m stages.{name} {variant}` in {one}, for .+\)"
    assert re.fullmatch(rf"{stage}: {owner} has these blocks; waiting until it ends\n", said)
    os.kill(first.pid, signal.SIGCONT)
    if killed:
        while not list(scratch(one).glob(f"{name}/*/finished-*.json")):
            time.sleep(0.01)
        first.kill()
    first.communicate()
    rest, _ = second.communicate()
    assert (first.returncode, second.returncode) == (-9 if killed else 0, 0), rest
    (done,) = re.findall(rf"resuming after (\d) of {BLOCKS} blocks", rest)
    assert "has these blocks" not in rest and (0 < int(done) < BLOCKS if killed else int(done) == BLOCKS)
    assert results(two) == alone(stage)
    if not killed:
        assert results(one) == alone(stage)
    assert not tree(scratch(one))


# The end of a stage


@pytest.fixture
def project(workspace: Path) -> Path:
    """The workspace with DVC, whose stages are run one at a time."""
    run(workspace, "dvc", "init", "--no-scm", "--quiet")
    return workspace


def runs(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def ended(pid: int) -> bool:
    """Whether it ends within five seconds: it takes two at most, this machine may be busy."""
    deadline = time.monotonic() + 5
    while (running := runs(pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not running


@pytest.mark.parametrize(
    ("stage", "number", "stays"),
    [("prune sparseline", signal.SIGKILL, True), ("induce sparseline", signal.SIGTERM, False)],
)
def test_a_stage_ends_with_its_dvc(
    project: Path, alone: Callable[[str], dict[str, str]], stage: str, number: signal.Signals, stays: bool
) -> None:
    """`dvc` alone is killed. Oracles: the processes, and the same command again, which gives an
    undisturbed run's bytes.
    """
    shell = project.parent / "shell"  # that stays beside its last command, as fish does
    shell.write_text('#!/bin/sh\n/bin/sh "$@"\nexit $?\n', encoding="utf-8")
    shell.chmod(0o755)
    command = ("dvc", "repro", "--single-item", stage.replace(" ", "@"))
    dvc = start(project, *command, SHELL=str(shell) if stays else "/bin/bash")
    pid = holder(project, dvc, stage.split()[0])
    assert pid != dvc.pid
    dvc.send_signal(number)
    dvc.wait()
    assert ended(pid)
    said, _ = dvc.communicate()
    assert dvc.returncode == -number and "Traceback" not in said
    assert not re.search("prunable weights|mask entries", said)  # of its last line: it was not just done
    assert not [path for path in tree(project / "build") if ".partial" in path]
    run(project, *command)
    assert results(project) == alone(stage)


def test_a_stage_whose_dvc_is_gone_before_it_looks(project: Path) -> None:
    """`dvc` dies while the stage imports torch, when it cannot know yet who started it. Oracle: no
    output, no scratch.
    """
    before = tree(project / "build")
    dvc = start(project, "dvc", "repro", "--single-item", "prune@sparseline")
    while not (stages := psutil.Process(dvc.pid).children(recursive=True)):
        time.sleep(0.005)
    dvc.kill()
    said, _ = dvc.communicate()
    assert all(ended(stage.pid) for stage in stages)  # its pipes close a moment before it is gone
    assert "error: The `dvc` that started this stage has ended; run the same command again" in said
    assert tree(project / "build") == {
        path: digest for path, digest in before.items() if path in tree(project / "build")
    }
    assert not tree(scratch(project))


@pytest.mark.parametrize("parent", ["ends", "lives"])
def test_a_stage_by_hand_lives_on(project: Path, undisturbed: dict[str, str], parent: str) -> None:
    """Started from a shell that then ends, at once or in the midst, and that has DVC's variables
    from wherever. Oracle: an undisturbed run.
    """
    wait = "" if parent == "ends" else "; sleep 1000"
    (project / "script").write_text(
        f"nohup {' '.join(COMMAND)} >log 2>&1 & echo $!{wait}\n", encoding="utf-8"
    )
    shell = start(project, "sh", "script", DVC_STAGE="prune@sparseline", DVC_ROOT=str(project))
    assert shell.stdout
    pid = int(shell.stdout.readline())
    while not tree(scratch(project)):
        assert runs(pid)
        time.sleep(0.02)
    shell.kill()
    shell.wait()
    while runs(pid):
        time.sleep(0.05)
    assert "kept" in (project / "log").read_text(encoding="utf-8").splitlines()[-1]
    assert results(project) == undisturbed


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_a_signal_ends_a_stage_in_one_line(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, name: str
) -> None:
    """In the midst of a block. Oracles: exit code, last line, and that nothing half-written or of
    the process's own is left.
    """
    monkeypatch.setenv(*FILES)
    before = tree(workspace / "build")
    process = start(workspace, "python", "-m", "stages.prune", "windows")
    pid = holder(workspace, process)
    while not list(scratch(workspace).glob("prune/*/.own.*/*")):
        time.sleep(0.01)
    process.send_signal(number)
    said, _ = process.communicate()
    assert pid == process.pid and process.returncode == 128 + number
    assert said.splitlines()[-1] == f"error: {name} came; run the same command again: finished work is kept."
    assert "Traceback" not in said
    assert tree(workspace / "build") == before
    assert not [path for path in scratch(workspace).rglob("*") if re.search(r"partial|lock", path.name)]


@pytest.mark.parametrize("number", process.SIGNALS)
@pytest.mark.parametrize("library", ["turns it into an error", "calls a file damaged", "swallows it"])
def test_a_signal_in_a_library_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, library: str
) -> None:
    """Safetensors in torch does the first with Ctrl-C. Oracles: exit code, the line, and that what
    came of it is not written.
    """
    with pytest.raises(SystemExit) as ended, runtime.told():
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt as error:
            if library == "turns it into an error":
                raise ValueError("could not determine the shape") from error
            if library == "calls a file damaged":
                raise SparselineError("a file is damaged") from error
        artifacts.write_json(tmp_path / "result.json", 1)
    assert ended.value.code == 128 + number
    assert (
        capsys.readouterr().err
        == f"error: {number.name} came; run the same command again: finished work is kept.\n"
    )
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    artifacts.write_json(tmp_path / "result.json", 1)


class _Removed:
    """Removing a directory takes time, and a signal arrives meanwhile."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        time.sleep(0)


@pytest.mark.parametrize("number", process.SIGNALS)
def test_a_signal_while_an_object_is_removed(
    capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """Python drops an exception that is raised there. Oracles: the body ends anyway, at once, and
    only the one line is printed.
    """
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended, runtime.told():
        thing = _Removed(number)
        del thing
        time.sleep(20)
    assert ended.value.code == 128 + number
    assert time.monotonic() - began < 10
    assert (
        capsys.readouterr().err
        == f"error: {number.name} came; run the same command again: finished work is kept.\n"
    )


def test_an_interrupt_before_a_stage_begins(workspace: Path) -> None:
    """Click reads the command line then, and would say no more than that it was aborted."""
    code = """
import os, runpy, signal, sys
import click
make = click.Command.make_context
kill = lambda: os.kill(os.getpid(), signal.SIGINT)
click.Command.make_context = lambda *given, **named: (kill(), make(*given, **named))[1]
sys.orig_argv = ["python", "-m", "stages.prune", "sparseline"]
runpy.run_module("stages.prune", run_name="__main__", alter_sys=True)
"""
    process = start(workspace, "python", "-c", code, "sparseline")
    said, _ = process.communicate()
    assert (
        process.returncode == -signal.SIGINT and said == "error: SIGINT came; run the same command again.\n"
    )


@pytest.mark.parametrize(("module", "status"), [("pydantic", -signal.SIGINT), ("torch", 128 + signal.SIGINT)])
def test_an_interrupt_while_importing(workspace: Path, module: str, status: int) -> None:
    """Ctrl-C in the seconds before a stage begins, or before it has torch. Oracle: one line, and a
    status that a shell calls 130.
    """
    code = f"""
import os, runpy, signal, sys
kill = lambda: os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(lambda event, given: event == "import" and given[0] == "{module}" and kill())
sys.orig_argv = ["python", "-m", "stages.prune", "sparseline"]
runpy.run_module("stages.prune", run_name="__main__", alter_sys=True)
"""
    process = start(workspace, "python", "-c", code, "sparseline")
    said, _ = process.communicate()
    assert process.returncode == status
    kept = ": finished work is kept" if module == "torch" else ""
    assert said.splitlines()[-1] == f"error: SIGINT came; run the same command again{kept}."
    assert "Traceback" not in said


def test_a_mask_that_misses_the_budget_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count is taken again from the masks. Oracle: one entry is lost when a mask is put into
    the block.
    """
    take = Block.take

    def lose_one(block: Block, matrix: Matrix, mask: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        less = mask.clone()
        less.view(-1)[int(less.view(-1).nonzero()[0])] = False
        take(block, matrix, less, dtype)

    monkeypatch.chdir(workspace)
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(scratch(workspace)))
    monkeypatch.setattr(Block, "take", lose_one)
    result = invoke("prune", "sparseline")
    assert result.exit_code == 3 and "weights kept instead of" in result.output
