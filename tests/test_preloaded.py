"""A stage that is a fork of a process with torch imported. Oracle: the same stage in a process of its own."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from project import (
    ROOT,
    WANDA,
    change_params,
    environment,
    holder,
    make_workspace,
    preloaded,
    run,
    scratch,
    start,
    tree,
)

# a block takes most of a second
LONG = {"finetune_channels": {"epochs": 40, "patience": 40}, "steps": ["obs", "finetune_channels"]}
PRUNE = ("python", "-m", "stages.prune", "slow")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with all that prune needs. Read only."""
    workspace = make_workspace(
        tmp_path_factory.mktemp("ready") / "project",
        model={"layers": 4},
        variants={"slow": {"reconstruction": LONG}, "wanda": WANDA},
        report={"baseline": "slow"},
    )
    for stage in (
        "keys",
        "prepare",
        "text calibration",
        "allocate slow",
        "allocate wanda",
        "induce slow",
        "induce wanda",
    ):
        run(workspace, "python", "-m", f"stages.{stage.split()[0]}", *stage.split()[1:])
    return workspace


@pytest.fixture
def workspace(ready: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ready, tmp_path / "project"))


def results(workspace: Path) -> dict[str, str]:
    return {
        path: digest for path, digest in tree(workspace / "build").items() if not path.startswith("costs/")
    }


def forked(pid: int, client: int) -> bool:
    """Whether a stage's process is a fork, and not the one that was started."""
    return pid != client and "stages.preload" in psutil.Process(pid).cmdline()


def test_it_computes_the_same(workspace: Path, tmp_path: Path) -> None:
    """Output, and what is said but for the seconds."""
    alone = Path(shutil.copytree(workspace, tmp_path / "alone" / "project"))
    said = []
    for place, settings in ((workspace, preloaded()), (alone, {})):
        process = start(place, *PRUNE, **settings)
        pid = holder(place, process)
        assert forked(pid, process.pid) if settings else pid == process.pid
        said.append(re.sub(r"; [^;\n]* s\n", "\n", process.communicate()[0]))
    assert said[0] == said[1] != ""
    assert results(workspace) == results(alone)
    assert set(tree(workspace / "build")) == set(tree(alone / "build"))


def test_the_project_is_the_clients(workspace: Path) -> None:
    """Its code, its parameters and its environment, as they are at that moment. Oracle: a line that
    the changed code says.
    """
    stage = workspace / "stages" / "prune.py"
    text = stage.read_text(encoding="utf-8")
    stage.write_text(
        text.replace(
            'click.echo(f"', "import os; click.echo(f\"{os.environ['SPARSELINE_THREADS']} {os.getcwd()} "
        ),
        encoding="utf-8",
    )
    change_params(workspace, "variants.wanda.selection.sparsity", 0.75)
    said = run(workspace, "python", "-m", "stages.prune", "wanda")
    assert said.startswith(f"1 {workspace} prune wanda: sparsity 0.75")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("stages.prune", "nobody"), 2, "error: params.yaml has no section 'variants.nobody'"),
        (("stages.prune",), 2, "Missing argument 'VARIANT'"),
        (("stages.prune", "--help"), 0, "Usage: python -m stages.prune"),
        (("stages.gone",), 1, "No module named stages.gone"),
    ],
)
def test_it_ends_as_the_stage_ends(workspace: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    assert said in run(workspace, "python", "-m", *arguments, code=code)


def test_a_bug_is_told(workspace: Path) -> None:
    """Oracle: the file that the sentence names."""
    stage = workspace / "stages" / "prune.py"
    stage.write_text(
        stage.read_text(encoding="utf-8").replace("        recipe =", "        1 / 0\n        recipe ="),
        encoding="utf-8",
    )
    said = run(workspace, "python", "-m", "stages.prune", "wanda", code=3)
    (named,) = re.findall(
        r"^error: .*ZeroDivisionError: division by zero.* Attach (\S+) ", said, re.MULTILINE
    )
    assert "Traceback" not in said and "Traceback" in (workspace / named).read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_reaches_it(workspace: Path, number: signal.Signals) -> None:
    process = start(workspace, *PRUNE, **preloaded())
    pid = holder(workspace, process)
    assert forked(pid, process.pid)
    while not list(scratch(workspace).glob("prune/*/facts/*")):
        time.sleep(0.01)
    process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == 128 + number
    assert (
        said.splitlines()[-1]
        == f"error: {number.name} came; run the same command again: finished work is kept."
    )
    assert not psutil.pid_exists(pid)


def test_a_signal_that_the_client_ignores_is_ignored(workspace: Path) -> None:
    process = start(workspace, "sh", "-c", f"trap '' HUP; exec {' '.join(PRUNE)}", **preloaded())
    pid = holder(workspace, process)
    assert forked(pid, process.pid)
    os.kill(process.pid, signal.SIGHUP)
    os.kill(pid, signal.SIGHUP)
    assert process.wait() == 0


@pytest.mark.parametrize("who", ["client", "fork"])
def test_one_of_the_two_is_killed(workspace: Path, who: str) -> None:
    """The fork ends with its client, the client as the fork did. Oracle: no process, no lock and no
    output is left.
    """
    before = tree(workspace / "build")
    process = start(workspace, *PRUNE, **preloaded())
    pid = holder(workspace, process)
    assert forked(pid, process.pid)
    os.kill(process.pid if who == "client" else pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    while psutil.pid_exists(pid):
        time.sleep(0.05)
    assert tree(workspace / "build") == before
    assert run(workspace, *PRUNE)


def test_the_server_is_killed(tmp_path: Path) -> None:
    """The command must not continue alone, because it would disturb the next run. Oracle: the
    process of the command, which would sleep for minutes.
    """
    command = ["python", "-m", "stages.preload", "sh", "-c", "echo $$; exec sleep 300"]
    server = subprocess.Popen(
        command, cwd=ROOT, env=environment(ROOT), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert server.stdout
    sleeping = psutil.Process(int(server.stdout.readline()))
    server.kill()
    server.wait()
    assert sleeping.wait(20) in (None, -signal.SIGTERM)


def test_the_keeper_is_killed(workspace: Path) -> None:
    """The process that waits for the fork: the client cannot know how it ends."""
    process = start(workspace, *PRUNE, **preloaded())
    pid = holder(workspace, process)
    assert forked(pid, process.pid)
    psutil.Process(psutil.Process(pid).ppid()).kill()
    said, _ = process.communicate()
    assert process.returncode == 4
    assert (
        "error: The process of this stage has ended unexpectedly; run the same command again: finished"
        " work is kept.\n" in said
    )
    while psutil.pid_exists(pid):
        time.sleep(0.05)


@pytest.mark.parametrize(
    "changed",
    [{"OMP_NUM_THREADS": "2"}, {"HF_HOME": "elsewhere"}, {"SPARSELINE_PRELOADED": "/nowhere/socket"}],
)
def test_another_environment_gets_a_process_of_its_own(workspace: Path, changed: dict[str, str]) -> None:
    process = start(workspace, *PRUNE, **(preloaded() | changed))
    assert holder(workspace, process) == process.pid
    assert process.wait() == 0


def test_a_shell_between_them_changes_nothing(workspace: Path) -> None:
    """An active virtual environment exports PS1. A bash that runs a command, as DVC's does, drops it."""
    active = {"PS1": "(.venv) "}
    process = start(workspace, "bash", "-c", f"exec {shlex.join(PRUNE)}", **(preloaded(**active) | active))
    assert forked(holder(workspace, process), process.pid)
    assert process.wait() == 0


@pytest.fixture
def served(workspace: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a command under a server of its own."""
    return lambda *command, **settings: start(
        workspace, "python", "-m", "stages.preload", *command, **settings
    )


@pytest.mark.parametrize(
    ("command", "code"), [(("true",), 0), (("sh", "-c", "exit 7"), 7), ((), 2), (("gone",), 2)]
)
def test_a_server_ends_with_its_command(
    served: Callable[..., subprocess.Popen[str]], tmp_path: Path, command: tuple[str, ...], code: int
) -> None:
    process = served(*command, TMPDIR=str(tmp_path))
    assert process.wait() == code
    assert not list(tmp_path.rglob("sparseline-*"))


def test_a_server_on_a_gpu_is_none(served: Callable[..., subprocess.Popen[str]]) -> None:
    """CUDA does not survive a fork."""
    said, _ = served("sh", "-c", "echo place: $SPARSELINE_PRELOADED", SPARSELINE_DEVICE="cuda").communicate()
    assert said == "place:\n"


def test_a_server_ends_in_the_midst_of_its_imports(workspace: Path) -> None:
    """Oracle: a module that is never done."""
    (workspace / "endless.py").write_text("while True: pass", encoding="utf-8")
    code = (
        "from pipeline_lib.core import preloaded; preloaded.MODULES = ('endless',); preloaded.serve(['sh',"
        " '-c', 'exit 7'])"
    )
    assert start(workspace, "python", "-c", code).wait() == 7


@pytest.mark.parametrize("long", ["/nowhere", "l" * 100])
def test_a_server_without_a_place_is_none(
    served: Callable[..., subprocess.Popen[str]], tmp_path: Path, long: str
) -> None:
    """Python takes the next directory for one that does not exist, and a socket's path may have
    about a hundred characters.
    """
    if not long.startswith("/"):
        (tmp_path / long).mkdir()
    said, _ = served(
        "sh", "-c", "echo place: $SPARSELINE_PRELOADED", TMPDIR=str(tmp_path / long)
    ).communicate()
    assert said.startswith("place:")
    assert not list(tmp_path.rglob("sparseline-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_server_hands_signals_on(
    served: Callable[..., subprocess.Popen[str]], tmp_path: Path, number: signal.Signals
) -> None:
    process = served("sh", "-c", "echo ready; exec sleep 1000", TMPDIR=str(tmp_path))
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait() == -number
    assert not list(tmp_path.rglob("sparseline-*"))
