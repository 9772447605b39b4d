"""One stage on several processes. Oracle: the bytes that one process writes."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from architectures import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from project import (
    ROOT,
    SPARSELINE,
    WANDA,
    build,
    change_params,
    holder,
    make_workspace,
    preloaded,
    run,
    scratch,
    start,
    tree,
)
from tiny import make_tokenizer

from pipeline_lib.core import launch, ranks, runtime
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.stats import lanes

LSQ = {"mask_iterations": 12}
LONG = {
    "finetune_channels": {"epochs": 25, "patience": 25},
    "steps": ["obs", "finetune_channels"],
}  # a block takes a second
VARIANTS: dict[str, Any] = {
    "wanda": WANDA,
    "slow": {"reconstruction": LONG},
    "fast": {"allocation": {"method": "weight"}, "reconstruction": {"steps": ["obs", "lsq"], "lsq": LSQ}},
    "best": SPARSELINE
    | {
        "induce": None,
        "reconstruction": {
            "steps": ["obs", "lsq", "finetune"],
            "statistics": "per_site",
            "dense_target": 0.5,
            "lsq": LSQ,
            "finetune": {"refresh_epochs": 1},
        },
    },
    "papers": {
        "induce": {},
        "selection": {"score": "isc"},
        "allocation": {"method": "weight"},
        "reconstruction": {"steps": ["obs", "finetune_channels"]},
        "quantization": {"bits": 4, "group": 16},
    },
}
EVERY = {  # in their order; of the mixture those that treat experts apart
    "dense": "calibrate, sensitivity, curves best, induce papers, prune wanda, prune fast, prune best,"
    " prune papers, distil best, evaluate best, tasks best",
    "mixture": "calibrate, sensitivity, curves best, induce papers, prune fast, prune best, prune papers",
}


@pytest.fixture(scope="module", params=list(EVERY))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def prepared(home: Path, kind: str) -> Path:
    """A workspace in which one process has made all that the stages read. Read only."""
    workspace = make_workspace(
        home / "project",
        variants=VARIANTS,
        report={"baseline": "slow"},
        sensitivity={"probes": 8, "rows_per_probe": 1, "probes_per_pass": 8},
    )
    change_params(workspace, "texts.calibration.training", 12)
    if kind == "mixture":
        shutil.rmtree(workspace / "data" / "model")
        make_checkpoint(workspace / "data" / "model", "mixtral")
        make_tokenizer(workspace / "data" / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        build("keys", "prepare", *(f"text {name}" for name in ("calibration", "validation", "test")))
    steps = "calibrate, scale, sensitivity, curves best, curves papers"
    every = ", ".join(f"allocate {name}" for name in VARIANTS)
    for step in f"{steps}, {every}, induce slow, induce wanda, induce fast, induce best".split(", "):
        stage(workspace, step, 1)
    return workspace


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("ready"), "dense")


def stage(workspace: Path, step: str, processes: int, code: int = 0, **more: str) -> str:
    name, *arguments = step.split()
    own = {"SPARSELINE_PROCESSES": str(processes), **more}
    command = start(workspace, "python", "-m", f"stages.{name}", *arguments, **preloaded(), **own)
    said, _ = command.communicate()
    assert command.returncode == code, f"{step} on {processes} ended with {command.returncode}:\n{said}"
    return said


def outputs(workspace: Path) -> dict[str, str]:
    return {
        path: digest for path, digest in tree(workspace / "build").items() if not path.startswith("costs/")
    }


def copied(ready: Path, home: Path) -> Path:
    return Path(shutil.copytree(ready, home / "project"))


def spoken(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


# Every stage


def test_two_processes_write_the_bytes_of_one(kind: str, tmp_path: Path) -> None:
    alone = prepared(tmp_path / "alone", kind)
    together = copied(alone, tmp_path / "together")
    for step in EVERY[kind].split(", "):
        said = [stage(place, step, count) for place, count in ((alone, 1), (together, 2))]
        found, expected = outputs(together), outputs(alone)
        assert found == expected, [path for path in expected if expected[path] != found.get(path)]
        last = [re.sub(r"; [^;]* s$", "", text.splitlines()[-1]) for text in said]
        assert last[0] == last[1], step
    costs = (together / "build/costs/prune-best.json").read_text(encoding="utf-8")
    assert '"wall_s"' in costs
    assert not tree(scratch(together))


@pytest.mark.parametrize("count", [3, 5])
def test_more_processes_do(ready: Path, tmp_path: Path, count: int) -> None:
    """Of five, one has no lane, and prunes matrices of its own."""
    found = []
    for processes in (1, count):
        workspace = copied(ready, tmp_path / str(processes))
        for step in ("calibrate", "prune best"):
            stage(workspace, step, processes)
        found.append(outputs(workspace))
    assert found[0] == found[1]


STARTS = """
import os, psutil, torch, transformers
from pipeline_lib.core import launch, ranks

def job():
    return ranks.gathered(psutil.Process(os.getppid()).num_threads())

for _ in range(20):
    print(*launch.run(job))
"""


def test_workers_are_forks_of_a_process_with_one_thread() -> None:
    """A fork has a copy of every lock, but only the thread that forked: a lock that another one held
    stays locked.
    """
    command = start(ROOT, sys.executable, "-c", STARTS, SPARSELINE_PROCESSES="5")
    said, _ = command.communicate(timeout=120)
    assert said.splitlines() == ["1 1 1 1 1"] * 20


def test_experts_in_groups_and_streams_in_files(tmp_path: Path) -> None:
    """With small budgets: statistics of experts are collected in groups, and hidden states are in files."""
    small = {"SPARSELINE_GRAM_BYTES": "60000", "SPARSELINE_ACTIVATION_BYTES": "0"}
    alone = prepared(tmp_path / "alone", "mixture")
    together = copied(alone, tmp_path / "together")
    for step in ("calibrate", "curves best", "prune best"):
        for place, count in ((alone, 1), (together, 2)):
            stage(place, step, count, **small)
    assert outputs(alone) == outputs(together)


def test_an_outer_torchrun(ready: Path, tmp_path: Path) -> None:
    """Its processes are the stage's; the first alone speaks."""
    workspace = copied(ready, tmp_path)
    shutil.rmtree(workspace / "build/calibrate")
    command = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "stages.calibrate",
    )
    said = run(workspace, sys.executable, *command)
    assert said.count("calibrate: ") == 1
    assert outputs(workspace) == outputs(ready)


# Failure


def test_bad_input_is_told_once(ready: Path, tmp_path: Path) -> None:
    """Every process finds it."""
    workspace = copied(ready, tmp_path)
    rows = workspace / "build/texts/calibrate/calibration.safetensors"
    kept = rows.read_bytes()
    rows.unlink()
    said = spoken(stage(workspace, "calibrate", 2, code=2))
    assert len(said) == 1
    assert "is missing; run `dvc repro` to make it" in said[0]
    rows.write_bytes(kept)
    said = spoken(stage(workspace, "calibrate", 2, code=2, SPARSELINE_GRAM_BYTES="4GB"))
    assert said == ["error: SPARSELINE_GRAM_BYTES=4GB is not a whole number of bytes."]
    said = spoken(stage(workspace, "calibrate", 0, code=2))
    assert said == ["error: SPARSELINE_PROCESSES=0 is not a positive whole number."]


def begun(workspace: Path, **more: str) -> tuple[subprocess.Popen[str], psutil.Process, psutil.Process]:
    """`prune slow` on two processes that work: the command, its launcher, and the first process."""
    command = start(
        workspace, "python", "-m", "stages.prune", "slow", SPARSELINE_PROCESSES="2", **preloaded(), **more
    )
    first = psutil.Process(holder(workspace, command))
    launcher = first.parent()
    assert launcher is not None
    while not list(scratch(workspace).glob("prune/*/finished-000.json")):
        time.sleep(0.02)
    return command, launcher, first


def other(launcher: psutil.Process, first: psutil.Process) -> psutil.Process:
    (found,) = [one for one in launcher.children() if one.pid != first.pid]
    return found


def test_a_killed_process_ends_all_and_one_goes_on(ready: Path, tmp_path: Path) -> None:
    """Two processes began, one resumes what they finished."""
    undisturbed, workspace = copied(ready, tmp_path / "undisturbed"), copied(ready, tmp_path / "killed")
    stage(undisturbed, "prune slow", 1)
    command, launcher, first = begun(workspace)
    other(launcher, first).kill()
    said, _ = command.communicate(timeout=60)
    assert command.returncode == runtime.LOST, said
    (sentence,) = spoken(said)
    assert "run the same command again: finished work is kept." in sentence
    assert not launcher.is_running()
    assert not first.is_running()
    assert "resuming after" in stage(workspace, "prune slow", 1)
    assert outputs(workspace) == outputs(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_launcher_leaves_no_child(ready: Path, tmp_path: Path, number: signal.Signals) -> None:
    workspace = copied(ready, tmp_path)
    command, launcher, first = begun(workspace)
    children = [first, other(launcher, first)]
    launcher.send_signal(number)
    said, _ = command.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    if number == signal.SIGTERM:
        assert command.returncode == 128 + number
        assert spoken(said) == ["error: SIGTERM came; run the same command again: finished work is kept."]


def test_a_process_that_shows_no_sign_of_life_is_lost(ready: Path, tmp_path: Path) -> None:
    """As two machines between which the network is cut: each ends, within the timeout, with a sentence."""
    workspace = copied(ready, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outer = {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "SPARSELINE_TIMEOUT": "3",
    }
    both = [
        start(workspace, "python", "-m", "stages.prune", "slow", RANK=str(rank), **outer) for rank in range(2)
    ]
    assert holder(workspace, both[0]) == both[0].pid
    while not list(scratch(workspace).glob("prune/*/finished-000.json")):
        time.sleep(0.02)
    both[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    said, _ = both[0].communicate(timeout=60)
    assert time.monotonic() - stopped < 10
    assert both[0].returncode == runtime.LOST, said
    assert spoken(said)[0].startswith("error: Process 0 of 2 lost process 1: ")
    both[1].send_signal(signal.SIGCONT)
    said, _ = both[1].communicate(timeout=60)
    assert both[1].returncode == runtime.LOST, said
    assert len(spoken(said)) == 1


@pytest.mark.parametrize("device", ["cuda:1", "auto"])
def test_one_gpu_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv("SPARSELINE_PROCESSES", "2")
    monkeypatch.setenv("SPARSELINE_DEVICE", device)
    with pytest.raises(
        SparselineError, match=f"SPARSELINE_DEVICE={device} is one GPU, and SPARSELINE_PROCESSES=2"
    ):
        launch.run(int)


def test_a_fault_is_that_of_the_process_which_explains_it(tmp_path: Path) -> None:
    """Others only say that they lost it."""
    told = {
        0: {"message": "lost another", "status": 4, "lost": True},
        1: {"message": "no space", "status": 2, "lost": False},
    }
    for rank, fault in told.items():
        (tmp_path / f"fault-{rank}.json").write_text(json.dumps(fault), encoding="utf-8")
    found = launch._fault(tmp_path, [4])
    assert runtime.explained(found) == ("no space", 2)
    (tmp_path / "fault-1.json").unlink()
    message, status = runtime.explained(launch._fault(tmp_path, [-9]))
    assert (status, "SIGKILL" in message) == (4, True)
    assert runtime.explained(launch._fault(tmp_path, [4])) == ("lost another", 4)


# What falls to whom


@settings(max_examples=60, deadline=None, derandomize=True)
@given(count=st.integers(1, 9), items=st.integers(0, 20))
def test_parts_are_consecutive_and_even(count: int, items: int) -> None:
    found = [as_rank(rank, count, lambda: list(ranks.part(items))) for rank in range(count)]
    assert [number for part in found for number in part] == list(range(items))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(costs=st.lists(st.integers(1, 100), max_size=20), count=st.integers(1, 5))
def test_matrices_are_dealt_by_cost(costs: list[int], count: int) -> None:
    """Oracle: the bound of the greedy rule (Graham 1966): no load is more than the mean and the largest
    cost together. All processes deal alike.
    """
    found = as_rank(0, count, lambda: ranks.deal(dict(enumerate(costs))))
    loads = [sum(cost for item, cost in enumerate(costs) if found[item] == rank) for rank in range(count)]
    assert sorted(found) == list(range(len(costs)))
    if len(costs) <= count:
        assert max(loads) == max(costs, default=0)
    assert max(loads) <= sum(costs) / count + max(costs, default=0)
    assert as_rank(count - 1, count, lambda: ranks.deal(dict(enumerate(costs)))) == found


def as_rank(rank: int, count: int, what: Any) -> Any:
    ranks._place[:] = rank, count
    try:
        return what()
    finally:
        ranks._place[:] = 0, 1


def test_the_last_lane_is_of_the_last_process() -> None:
    """There a sum over all lanes ends: ``ranks.everyone`` begins with it."""
    for count in range(1, 10):
        own = [as_rank(rank, count, lambda: list(lanes.own_lanes())) for rank in range(count)]
        assert own[count - 1][-1] == lanes.LANES - 1
        assert [lane for part in own for lane in part] == list(range(lanes.LANES))
        first = as_rank(0, count, ranks.everyone)
        assert (first[0], sorted(first)) == (count - 1, list(range(count)))


def test_one_process_sends_nothing() -> None:
    value = {"x": torch.ones(3)}
    assert ranks.broadcast(value, 0) is value
    assert ranks.gathered(value) == [value]
    assert ranks.each({"a": 1.0, "b": 2.0}, str.upper) == {"a": "A", "b": "B"}
    assert ranks.writes()
