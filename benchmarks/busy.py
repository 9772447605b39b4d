"""What a busy neighbour costs: ``dvc repro`` from nothing, idle and beside a process that keeps one
core busy: ``python -m benchmarks.busy``.

Both runs are of the checked-out commit, in fresh clones with caches of their own. The machine
should have nothing else to do.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from benchmarks.harness import RESULTS, commit
from pipeline_lib.core.artifacts import write_json

ROOT = Path(__file__).parent.parent
LIMIT = 2.5  # times the idle run


def repro(directory: Path) -> float:
    """Wall seconds of `dvc repro` in a fresh clone that shares nothing with another."""
    subprocess.run(("git", "clone", "--quiet", str(ROOT), str(directory)), check=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "SPARSELINE_SCRATCH": str(directory / "scratch")}
    subprocess.run((sys.executable, "-m", "stages.environment"), cwd=directory, env=environment, check=True)
    started = time.perf_counter()
    subprocess.run(
        ("dvc", "repro", "--quiet"), cwd=directory, env=environment, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - started


@click.command(help=__doc__)
def main() -> None:
    measured = commit()
    with tempfile.TemporaryDirectory() as clones:
        idle = repro(Path(clones) / "idle")
        neighbour = subprocess.Popen((sys.executable, "-c", "while True: pass"))
        try:
            busy = repro(Path(clones) / "busy")
        finally:
            neighbour.kill()
            neighbour.wait()
    record = {
        "idle_s": round(idle, 1),
        "busy_s": round(busy, 1),
        "ratio": round(busy / idle, 3),
        "cores": os.cpu_count(),
        "commit": measured,
    }
    write_json(RESULTS / "busy.json", record)
    click.echo(
        f"idle {idle:.0f} s, beside a busy process {busy:.0f} s: {busy / idle:.2f} times (at most {LIMIT})"
    )


if __name__ == "__main__":
    main()
