"""What must be so before any module of a stage, torch above all, is imported."""

import io
import os
import sys
from types import TracebackType

# OpenMP's threads sleep while they wait, unless told otherwise: spinning, they take the cores from whatever else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What the imports raise, which take seconds. Ctrl-C in the midst of them is no bug."""
    if kind is KeyboardInterrupt:
        print("error: SIGINT came; run the same command again.", file=sys.stderr)
        return
    from pipeline_lib.core import bugs

    print(f"error: {bugs.tell(error)}", file=sys.stderr, flush=True)
    os._exit(bugs.CODE)  # Python would end with 1


if sys.orig_argv[1:2] == ["-m"] and sys.orig_argv[2].startswith("stages."):  # else another program's
    sys.excepthook = _uncaught
for _stream in (sys.stdout, sys.stderr):  # a terminal may know few characters
    if isinstance(_stream, io.TextIOWrapper):
        _stream.reconfigure(errors="backslashreplace")


def _hand_over() -> None:
    """To a process that has torch imported already, if `python -m stages.preload` runs one."""
    from pipeline_lib.core import preloaded

    preloaded.hand_over()


if "SPARSELINE_PRELOADED" in os.environ and sys.argv[0] == "-m" == sys.orig_argv[1]:  # `python -m stages.…` imports this package first
    _hand_over()
