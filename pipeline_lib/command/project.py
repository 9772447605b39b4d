"""How `sparseline` works in a project: it runs the stages and DVC as one would by hand, with this
Python.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from dvc.config import Config, ConfigError

from pipeline_lib.command.layout import GRAPH
from pipeline_lib.core import environment
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.preloaded import SIGNALS

# As in the Makefile: threads that wait sleep; glibc keeps freed blocks of up to 32 MiB, in one heap.
DEFAULTS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_ARENA_MAX": "1",
}
DVC = ("python", "-m", "dvc")
FAILED = 255  # DVC's exit code where a stage fails


def opened(directory: Path) -> Path:
    """The directory, if it is a project.

    Raises:
        SparselineError: it is not.
    """
    if not (directory / GRAPH).is_file() or not (directory / "stages").is_dir():
        raise SparselineError(
            f"{directory} is not a project, because it has no {GRAPH} or no stages/; `sparseline init"
            f" {directory}` creates one."
        )
    return directory


def settle(directory: Path) -> None:
    """Prepare a run of DVC: write the installed versions, and tell DVC whether there is git.

    Raises:
        SparselineError: a package is not installed, or DVC's configuration cannot be read.
    """
    environment.write(directory / environment.FILE)
    alone = not tracked(directory)
    try:
        config = Config(str(directory / ".dvc"))
        if config["core"].get("no_scm", False) != alone:
            with config.edit("local") as local:
                local.setdefault("core", {})["no_scm"] = alone
    except ConfigError as error:
        raise SparselineError(
            f"{directory}/.dvc: DVC's configuration cannot be read ({error}); correct it."
        ) from error


def tracked(directory: Path) -> bool:
    """Whether the directory is in a git repository that does not ignore it."""
    # 0: ignored; 128: no repository; None: no git
    return _git(directory, "check-ignore", "--quiet", GRAPH) == 1


def can_begin(directory: Path) -> bool:
    """Whether `git init` is possible, and would create a repository that does not exist yet."""
    return _git(directory, "rev-parse", "--git-dir") == 128


def begin(directory: Path) -> None:
    """Run `git init`, and add every file.

    Raises:
        SparselineError: git is missing or fails.
    """
    for arguments in (("init", "--quiet"), ("add", "--all")):
        if _git(directory, *arguments) != 0:
            raise SparselineError(
                f"`git {' '.join(arguments)}` does not work in {directory}; run it there to see why."
            )


def _git(directory: Path, *arguments: str) -> int | None:
    try:
        return subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, check=False
        ).returncode
    except FileNotFoundError:
        return None


def run(directory: Path, *targets: str) -> int:
    """Run `dvc repro` with a faster start of its stages, and return the exit code.

    The stage `keys` runs once before, so that an error in the parameters is one sentence, without
    DVC's own lines.
    """
    if code := call(directory, "python", "-m", "stages.keys", quiet=True):
        return code
    code = call(directory, "python", "-m", "stages.preload", *DVC, "repro", *targets)
    return 2 if code == FAILED else code


def call(directory: Path, *command: str, quiet: bool = False) -> int:
    """Run a command in a project, and return its exit code, or 128 + the number of a signal.

    Signals are forwarded to the command, except SIGINT, which a terminal sends to it directly.

    Args:
        quiet: print only its errors.

    Raises:
        SparselineError: the stages cannot run with this Python.
    """
    shown = subprocess.DEVNULL if quiet else None
    with subprocess.Popen(command, cwd=directory, env=_environ(os.environ), stdout=shown) as process:

        def forward(number: int, _frame: FrameType | None) -> None:
            if number != signal.SIGINT:
                process.send_signal(number)

        before = {
            number: signal.signal(number, forward)
            for number in SIGNALS
            if signal.getsignal(number) != signal.SIG_IGN
        }
        try:
            code = process.wait()
        except BaseException:  # raised by a handler that is not ours: the command must not go on without us
            process.terminate()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _environ(given: Mapping[str, str]) -> dict[str, str]:
    """The environment with this Python first on PATH, since the stages' commands begin with
    `python`.
    """
    place = Path(sys.executable).parent
    if not (place / "python").exists():
        raise SparselineError(
            f"There is no `python` beside {sys.executable}, and stages run as `python -m`; install sparseline"
            " into a virtual environment."
        )
    return {**DEFAULTS, **given, "PATH": os.pathsep.join([str(place), given.get("PATH", os.defpath)])}
