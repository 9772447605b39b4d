"""SPARSELINE_DEVICE=auto, without a GPU: torch and the driver's tool are stand-ins, processes and kills are
real. Oracle: which GPUs each of them says that it has.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from project import ROOT

from pipeline_lib.core import gpus, runtime

GPUS = 3
STAGE = f"""
import os, sys
from types import SimpleNamespace
named = lambda number: SimpleNamespace(uuid=f"{{os.environ['RUN']}}-{{number}}")
cuda = SimpleNamespace(device_count=lambda: {GPUS}, get_device_properties=named)
sys.modules["torch"] = SimpleNamespace(cuda=cuda)
from pipeline_lib.core import gpus
from pipeline_lib.core.errors import SparselineError
gpus.PATIENCE = float(os.environ["PATIENCE"])
try:
    print(gpus.take(int(sys.argv[1])), gpus.take(int(sys.argv[1])), flush=True)
except SparselineError as error:
    print(error, flush=True)
sys.stdin.read()
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process that takes GPUs and keeps them."""
    started: list[subprocess.Popen[str]] = []

    def begin(
        count: int = 1, used: tuple[str, ...] = ("0", "0", "0"), patience: float = 0.0
    ) -> "subprocess.Popen[str]":
        tool = tmp_path / "nvidia-smi"
        lines = [f"GPU-{tmp_path}-{number}, {one}, 80000" for number, one in enumerate(used)]
        tool.write_text("#!/bin/sh\n" + "\n".join(f"echo '{line}'" for line in lines), encoding="utf-8")
        tool.chmod(0o755)
        environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": str(tmp_path)}
        process = subprocess.Popen(
            (sys.executable, "-c", STAGE, str(count)),
            cwd=ROOT,
            env=environ | {"PATIENCE": str(patience)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_stages_side_by_side_get_a_gpu_each_until_there_is_none(start: Start) -> None:
    """And each keeps its own when it asks again. A killed one's is free at once."""
    stages = [start() for _ in range(GPUS)]
    held = [said(one) for one in stages]
    assert sorted(held) == ["(0,) (0,)", "(1,) (1,)", "(2,) (2,)"]
    refused = said(start())
    assert refused.startswith(
        "SPARSELINE_DEVICE=auto needs a GPU and finds none free: another stage uses cuda:0;"
    )
    assert "Start fewer stages at once" in refused
    stages[1].kill()
    stages[1].wait()
    assert said(start()) == held[1]


def test_a_gpu_that_comes_free_is_waited_for(start: Start) -> None:
    first = start(GPUS)
    assert said(first) == "(0, 1, 2) (0, 1, 2)"
    second = start(patience=60.0)
    first.kill()
    assert said(second) == "(0,) (0,)"


def test_gpus_that_other_programs_use_are_left_alone(start: Start) -> None:
    """Of the middle one a tenth may be in use, of the first more is; several are taken at once."""
    assert said(start(2, ("8001", "8000", "[N/A]"))) == "(1, 2) (1, 2)"
    assert "50% of cuda:0's memory is in use" in said(start(1, ("40000", "40000", "40000")))


def test_more_than_the_machine_has_are_refused_at_once(start: Start) -> None:
    """And those that were free stay so."""
    said_no = said(start(GPUS + 1, patience=60.0))
    assert said_no.startswith(f"SPARSELINE_DEVICE=auto needs {GPUS + 1} GPUs, and this machine has {GPUS};")
    assert said(start(GPUS)) == "(0, 1, 2) (0, 1, 2)"


def test_a_stage_computes_on_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSELINE_DEVICE", "auto")
    monkeypatch.setattr(runtime, "_used", set())
    monkeypatch.setattr(gpus, "take", lambda: (1,))
    monkeypatch.setattr(torch, "empty", lambda size, device: SimpleNamespace(device=torch.device(device)))
    assert runtime.compute() == torch.device("cuda:1")
