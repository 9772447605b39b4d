"""The end of a process: cleanly after a signal, and together with the `dvc` that started it."""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from pipeline_lib.core.preloaded import CLIENT, SIGNALS

LOOK = 0.5  # seconds between two looks at the parent
AGAIN = 0.02  # seconds until a signal's exception that was dropped is raised once more
GRACE = 1.0  # seconds for a clean end once `dvc` is gone
PATIENCE = 5.0  # the same for one of a stage's processes after a signal: it may wait in torch for another
_orphaned = threading.Event()
_came: list["Stopped"] = []  # the signal that arrived; at most one


class Stopped(KeyboardInterrupt):
    """A signal requested the process to end. It is raised in the main thread, so that temporary files
    are removed.
    """

    def __init__(self, number: int, cause: str | None = None) -> None:
        cause = cause or f"{signal.Signals(number).name} came"
        super().__init__(f"{cause}; run the same command again: finished work is kept.")
        self.number, self.code = number, 128 + number


def _stopped(number: int) -> Stopped:
    """The exception that a signal raises."""
    return Stopped(number, "The `dvc` that started this stage has ended" if _orphaned.is_set() else None)


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM, SIGHUP and SIGINT raise ``Stopped`` in the body, once; the next one kills.
    Signals that are ignored (nohup) or have another handler are left alone.

    The signal may arrive during a library's call. Some libraries convert the exception to their own
    error: after a signal, the body always raises ``Stopped``. Some libraries swallow it: see
    ``heed``. If Python itself cannot let an exception pass (while an object is removed), it is
    raised again a moment later.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        _came.append(_stopped(number))
        raise _came[0]

    def again(_number: int, _frame: FrameType | None) -> None:
        raise _came[0]

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        if not isinstance(what.exc_value, Stopped):
            hook(what)
        elif _came:
            alarms.append(signal.signal(signal.SIGALRM, again))
            signal.setitimer(signal.ITIMER_REAL, AGAIN)

    main = threading.current_thread() is threading.main_thread()  # Python lets no other thread set handlers
    before = {number: signal.getsignal(number) for number in SIGNALS if main}
    taken = {number: handler for number, handler in before.items() if _is_usual(handler)}
    for number in taken:
        signal.signal(number, stop)
    hook = sys.unraisablehook
    alarms: list[Any] = []  # SIGALRM's handler before ``again``
    sys.unraisablehook = dropped
    try:
        yield
    except BaseException as error:
        if _came and error is not _came[0]:
            raise _came[0] from error
        raise
    finally:
        if alarms:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarms[0])
        sys.unraisablehook = hook
        for number, handler in taken.items():
            signal.signal(number, handler)
        _came.clear()


def _is_usual(handler: Any) -> bool:
    """Whether the handler is Python's own, or that of the `stages` package before a stage's body."""
    return (
        handler in (signal.SIG_DFL, signal.default_int_handler)
        or getattr(handler, "__module__", None) == "stages"
    )


def heed() -> None:
    """Raise the exception of a signal again if a library swallowed it. Later results may be wrong,
    so they must not be written.
    """
    if _came:
        raise _came[0]


@contextmanager
def following_dvc() -> Iterator[None]:
    """End this process as soon as the `dvc` that started it has ended. A process that was started
    by hand is not affected.
    """
    chain = _chain()
    if chain is None:
        yield
        return
    with _following(lambda: _unbroken(chain)):
        yield


@contextmanager
def following(parent: int) -> Iterator[None]:
    """End this process when its parent is gone, or if it does not end cleanly in time after a
    signal.
    """
    came: list[float] = []

    def goes_on() -> bool:
        if _came and not came:
            came.append(time.monotonic())
        return os.getppid() == parent and not (came and time.monotonic() - came[0] > PATIENCE)

    with _following(goes_on):
        yield


@contextmanager
def _following(goes_on: Callable[[], bool]) -> Iterator[None]:
    over = threading.Event()

    def look() -> None:
        while goes_on():
            if over.wait(LOOK):
                return
        _orphaned.set()
        with suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                child.kill()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)  # a call into torch may take longer, and all outputs appear in one step
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=look, name="following", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _chain() -> list[int] | None:
    """Process numbers from the parent (of a fork: its client) up to the `dvc` that started this
    process. Empty if that `dvc` is gone; None if there was none.

    DVC_STAGE alone is not enough, because a shell may have inherited it. DVC's lock file names the
    `dvc` that runs a stage. It is the parent of this process, or of the shells through which it
    started this process.
    """
    client = os.environ.get(CLIENT, "")
    # a fork has a number here; anything else is ignored
    chain = [int(client)] if re.fullmatch("[0-9]{1,9}", client) else []
    by_hand = chain or None
    with suppress(psutil.Error):
        chain = [*chain, psutil.Process(chain[0]).ppid() if chain else os.getppid()]
    if "DVC_STAGE" not in os.environ:
        return by_hand
    runners = _runners()
    with suppress(psutil.Error):
        while (
            chain[-1] > 1
            and chain[-1] not in runners
            and "-c" in (shell := psutil.Process(chain[-1])).cmdline()
        ):
            chain.append(shell.ppid())
    if chain[-1] in runners:
        return chain
    # An orphan has a new parent. If DVC started it, the lock file still names the dead `dvc`.
    return [] if _adopted(chain[-1]) and any(not _runs(pid) for pid in runners) else by_hand


def _runners() -> set[int]:
    """Numbers of the processes that run stages of this project, from DVC's lock file. Some may have ended."""
    here = Path.cwd()
    root = next((directory for directory in (here, *here.parents) if (directory / ".dvc").is_dir()), here)
    for _ in range(5):
        try:
            locked = json.loads((root / ".dvc" / "tmp" / "rwlock").read_text(encoding="utf-8"))
            return {int(owner["pid"]) for owner in locked.get("write", {}).values()}
        except ValueError:  # it is being written
            time.sleep(0.05)
        except (OSError, KeyError, TypeError, AttributeError):
            break
    return set()


def _unbroken(chain: list[int]) -> bool:
    """Whether each process is still the parent of the one before it. A process whose parent ends
    gets another parent.
    """
    if not chain or not (_runs(chain[0]) if CLIENT in os.environ else os.getppid() == chain[0]):
        return False
    try:
        return all(psutil.Process(child).ppid() == parent for child, parent in pairwise(chain))
    except psutil.Error:
        return False


def _adopted(parent: int) -> bool:
    """Whether this parent adopts orphans: init, or a process of another session."""
    try:
        return parent == 1 or os.getsid(parent) != os.getsid(0)
    except OSError:
        return True


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
