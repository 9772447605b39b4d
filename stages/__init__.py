"""Settings that must be made before any module of a stage is imported, above all torch."""

import io
import os
import signal
import sys
from types import FrameType, TracebackType

# OpenMP's threads sleep while they wait, unless told otherwise: spinning threads take cores from
# other programs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an error that the imports raise."""
    from pipeline_lib.core import bugs

    print(f"error: {bugs.tell(error)}", file=sys.stderr, flush=True)
    os._exit(bugs.CODE)  # Python would end with 1


def _interrupted(number: int, _frame: FrameType | None) -> None:
    """Handle Ctrl-C before a stage's body (the imports take seconds) or after it. An exception
    might be swallowed where it is raised.
    """
    os.write(2, b"error: SIGINT came; run the same command again.\n")
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


# otherwise another program imports this package
if sys.orig_argv[1:2] == ["-m"] and sys.orig_argv[2].startswith("stages."):
    sys.excepthook = _uncaught
    if signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler):
        signal.signal(signal.SIGINT, _interrupted)
for _stream in (sys.stdout, sys.stderr):  # a terminal may know few characters
    if isinstance(_stream, io.TextIOWrapper):
        _stream.reconfigure(errors="backslashreplace")


def _hand_over() -> None:
    """Hand over to a process that has already imported torch, if `python -m stages.preload` runs
    one.
    """
    from pipeline_lib.core import preloaded

    preloaded.hand_over()


# `python -m stages.…` imports this package first
if "SPARSELINE_PRELOADED" in os.environ and sys.argv[0] == "-m" == sys.orig_argv[1]:
    _hand_over()
