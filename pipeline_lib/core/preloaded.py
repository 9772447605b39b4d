"""A faster start of stages: a process that has imported torch runs a command such as `dvc repro`, and
each stage is a fork of it.

Only installed packages are imported beforehand, and none of their functions has run. A fork imports
the project's own code itself, in the directory and environment of the process that requested it
(the client). So it computes what the client would have computed.
"""

import atexit
import ctypes
import json
import os
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pipeline_lib.core.code import OWN

PLACE = "SPARSELINE_PRELOADED"  # environment variable: the socket of the process that forks
CLIENT = "SPARSELINE_CLIENT"  # environment variable of a fork: the client's number; the fork ends with it
MODULES = (
    "click",
    "numpy",
    "psutil",
    "pydantic",
    "torch",
    "safetensors.torch",
    "transformers.modeling_utils",
    "transformers.models.auto",
)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # signals that ask a process to end
LOOK = 0.1  # seconds between two looks whether the command has ended
_NUMBER = struct.Struct("!q")


@dataclass(frozen=True)
class _Client:
    """A process whose command a fork is to run."""

    pid: int
    interpreter: str
    command: list[str]  # python -m stages.prune wanda
    directory: str
    environ: dict[str, str]
    ignored: list[int]  # signals

    def alike(self, environ: dict[str, str]) -> bool:
        """Whether the client has this process's interpreter, and the environment in which the
        modules were imported. Variables that no library reads may differ.
        """
        return self.interpreter == sys.executable and _fixed(self.environ) == _fixed(environ)


def _fixed(environ: dict[str, str]) -> dict[str, str]:
    # What the shell sets or drops in which DVC runs a command, and DVC's queue. An active virtual
    # environment exports PS1.
    free = ("PWD", "OLDPWD", "SHLVL", "_", "PS1", "PS2")
    prefixes = ("DVC_", "SPARSELINE_", "CELERY_LOG_", "_MP_FORK_")
    return {
        name: value for name, value in environ.items() if name not in free and not name.startswith(prefixes)
    }


def hand_over() -> None:
    """Let a fork run this process's command, `python -m …`, and end like it; return if no process
    forks for it.
    """
    ignored = [int(number) for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    with socket.socket(socket.AF_UNIX) as server:
        # until it is known which process should receive them
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        fork = None
        with suppress(OSError):
            client = _Client(
                os.getpid(), sys.executable, sys.orig_argv, str(Path.cwd()), dict(os.environ), ignored
            )
            server.connect(os.environ[PLACE])
            text = json.dumps(asdict(client)).encode()
            socket.send_fds(server, [_NUMBER.pack(len(text))], [0, 1, 2])
            server.sendall(text)
            fork = _receive(server)
        if fork is not None:
            _forward(fork, ignored)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if fork is not None:
            _end(_receive(server))


def _forward(fork: int, ignored: list[int]) -> None:
    """Forward signals from this process to the fork."""

    def forward(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(fork, number)

    for number in SIGNALS:
        if number not in ignored:
            signal.signal(number, forward)


def _end(status: int | None) -> NoReturn:
    """End as another process ended: with its exit status or, if that is negative, by the signal
    with that number.
    """
    if status is None:
        print(
            "error: The process of this stage has ended unexpectedly; run the same command again:"
            " finished work is kept.",
            file=sys.stderr,
        )
        os._exit(4)
    if status < 0:
        with suppress(OSError):  # SIGKILL has no other handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(command: list[str]) -> NoReturn:
    """Run a command whose stages are forks of this process, and end like it."""
    listener = _listener()
    if listener is None:
        os.execvp(command[0], command)
    environ = dict(os.environ)  # before modules change it
    started: list[subprocess.Popen[bytes]] = []
    came: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        """Forward a signal to the command, which decides what ends. A terminal sends SIGINT to the
        command itself.
        """
        if number != signal.SIGINT:
            came.append(number)
            for process in started:
                process.send_signal(number)

    def end(_number: int = 0, _frame: FrameType | None = None) -> None:
        """End this process once the command has ended, even in the midst of imports."""
        if started and started[0].poll() is not None:
            shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)
            _end(started[0].returncode)

    for number in SIGNALS:
        signal.signal(number, forward)
    signal.signal(signal.SIGCHLD, end)
    with listener:
        started.append(
            subprocess.Popen(
                command, env=environ | {PLACE: listener.getsockname()}, preexec_fn=_ending_with(os.getpid())
            )
        )
        for early in came:  # while the command was being started
            started[0].send_signal(early)
        end()  # if it has ended already
        for module in MODULES:
            import_module(module)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        client, keepers = None, set[int]()
        while client is None:
            end()
            client = _next(listener, environ, keepers)
    _become(client)
    _run(client.command[2])


def _ending_with(parent: int) -> Callable[[], None]:
    """A function that a child calls before it runs a command. Where the system can (Linux), it then
    sends the child SIGTERM when the parent is killed.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)

    def ask() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM.value)
            if os.getppid() != parent:
                os._exit(128 + signal.SIGTERM)

    return ask


def _listener() -> socket.socket | None:
    """The socket on which clients are awaited; None if this process should not fork, or cannot."""
    if os.environ.get("SPARSELINE_DEVICE", "cpu") != "cpu":  # CUDA does not survive a fork
        return None
    try:
        place = Path(tempfile.mkdtemp(prefix="sparseline-"))
    except OSError:
        return None
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(place / "socket"))
    except OSError:  # such as a path that is longer than a socket's may be
        listener.close()
        place.rmdir()
        return None
    listener.listen()
    listener.settimeout(LOOK)
    return listener


def _next(listener: socket.socket, environ: dict[str, str], keepers: set[int]) -> _Client | None:
    """Wait a moment for a client. Returns the client in a fork that is to run its command, and None
    in this process.
    """
    keepers -= {keeper for keeper in keepers if os.waitpid(keeper, os.WNOHANG) != (0, 0)}
    with suppress(TimeoutError, ConnectionError):
        connection, _ = listener.accept()
        with connection:
            if keeper := os.fork():
                keepers.add(keeper)
            else:
                # otherwise clients could still connect here when this process's parent is gone
                listener.close()
                client = _keep(connection, environ)
                if client is None:
                    os._exit(0)
                return client
    return None


def _keep(connection: socket.socket, environ: dict[str, str]) -> _Client | None:
    """Fork for a client, and tell it the fork's number and exit status. Returns the client in the
    fork, and None in this process.
    """
    connection.settimeout(None)
    head, files, _, _ = socket.recv_fds(connection, _NUMBER.size, 3)
    client = _Client(**json.loads(_exactly(connection, _NUMBER.unpack(head)[0])))
    if not client.alike(environ):
        return None
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # in the fork, until it has its own handlers
    fork = os.fork()
    if not fork:
        for standard, file in enumerate(files):
            os.dup2(file, standard)
            os.close(file)
        return client
    connection.sendall(_NUMBER.pack(fork))
    for file in files:
        os.close(file)  # a pipe's reader waits for its last writer
    connection.sendall(_NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])))
    return None


def _become(client: _Client) -> None:
    """Give this process the state that the client has before it imports the project's own code."""
    os.chdir(client.directory)
    os.environ.update(client.environ | {CLIENT: str(client.pid)})
    del os.environ[PLACE]
    sys.orig_argv, sys.argv, sys.path[0] = client.command, client.command[2:], client.directory
    # the server's streams may be files where the client's are pipes
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        shown = open(descriptor, "w", encoding=getattr(sys, name).encoding, closefd=False)  # noqa: SIM115 - a descriptor, for good
        shown.reconfigure(line_buffering=descriptor == 2 or shown.isatty())
        setattr(sys, name, shown)
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN if number in client.ignored else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _run(module: str) -> NoReturn:
    """Run the module as `python -m` does, then end the process. Python's own shutdown takes a
    second with torch, so only the necessary steps are done.
    """
    status: Any = None
    try:
        if find_spec(module) is None:
            sys.exit(f"{sys.executable}: No module named {module}")
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status or 0)


def _receive(connection: socket.socket) -> int | None:
    data = _exactly(connection, _NUMBER.size)
    return _NUMBER.unpack(data)[0] if data else None


def _exactly(connection: socket.socket, size: int) -> bytes:
    """Receive ``size`` bytes; none if the other side is gone."""
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            return b""
        data += part
    return data
