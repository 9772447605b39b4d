"""One stage on two hosts, a process on each: torch's launcher on both, over a network that can be cut.
Oracle: the bytes that one process writes on one host.
"""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import hosts
import pytest
from project import build, make_workspace, run, scratch, start, tree
from test_processes import VARIANTS, spoken

from pipeline_lib.core import runtime

TIMEOUT = 5  # seconds without a sign of life
LAYERS = 4
PORT = "29500"  # of a network that nobody else has


@pytest.fixture
def pair() -> Iterator[tuple[hosts.Host, hosts.Host]]:
    if reason := hosts.missing():
        pytest.skip(reason)
    with hosts.two_hosts() as found:
        yield found


def begin(
    workspace: Path, pair: tuple[hosts.Host, hosts.Host], stage: str, *arguments: str
) -> list[subprocess.Popen[str]]:
    """The commands of docs/processes.md, in both hosts."""
    launch = ("torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--master-port", PORT)
    return [
        start(
            workspace,
            *host.command(*launch, "--master-addr", pair[0].address, "--node-rank", str(rank)),
            *("-m", f"stages.{stage}", *arguments),
            GLOO_SOCKET_IFNAME=host.name,
            SPARSELINE_TIMEOUT=str(TIMEOUT),
        )
        for rank, host in enumerate(pair)
    ]


def end(both: list[subprocess.Popen[str]], code: int = 0) -> list[str]:
    """What they said."""
    said = [one.communicate(timeout=120)[0] for one in both]
    assert [one.returncode for one in both] == [code, code], said
    return said


@pytest.mark.campaign
def test_two_hosts_write_the_bytes_of_one(tmp_path: Path, pair: tuple[hosts.Host, hosts.Host]) -> None:
    """And go on where the network was cut: then each process ends by itself, with a sentence."""
    alone = make_workspace(
        tmp_path / "alone",
        model={"layers": LAYERS},
        variants={"fast": VARIANTS["fast"]},
        report={"baseline": "fast"},
    )
    with chdir(alone):
        build("keys", "prepare", "text calibration", "sensitivity", "allocate fast", "induce fast")
    there = Path(shutil.copytree(alone, tmp_path / "there"))
    for stage in ("calibrate", "prune fast"):
        run(alone, "python", "-m", *f"stages.{stage}".split())
    end(begin(there, pair, "calibrate"))
    both = begin(there, pair, "prune", "fast")
    while not list(scratch(there).glob("prune/*/finished-000.json")):
        assert all(one.poll() is None for one in both), end(both)
        time.sleep(0.01)
    pair[1].link("down")
    cut = time.monotonic()
    said = end(both, code=1)  # torchrun's own
    assert time.monotonic() - cut < TIMEOUT + 10
    for rank, text in enumerate(said):
        (sentence,) = spoken(text)
        assert re.match(
            rf"error: Process {rank} of 2 lost (another process|process {1 - rank}|the others): ", sentence
        )
        assert sentence.endswith("run the same command again: finished work is kept.")
        assert re.search(rf"exitcode *: {runtime.LOST} ", text), text
    pair[1].link("up")
    said = end(begin(there, pair, "prune", "fast"))
    assert f"of {LAYERS} blocks" in said[0] and "resuming after" in said[0]
    found, expected = (
        {path: digest for path, digest in tree(one / "build").items() if not path.startswith("costs/")}
        for one in (there, alone)
    )
    assert found == expected, [path for path in expected if expected[path] != found.get(path)]
