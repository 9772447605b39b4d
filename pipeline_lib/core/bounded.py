"""Run an untrusted program, such as a chat template, in a separate process with limits of time and
memory.
"""

import os
import pickle
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pipeline_lib.core.preloaded import SIGNALS

SECONDS = 10.0  # for one item
BYTES = 2**32  # of memory beyond what this process has
_NUMBER = 8  # bytes that hold a length

In = TypeVar("In")


class BoundError(Exception):
    """The reason why the program has no result, as a few words."""


def each(function: Callable[[In], Any], items: Iterable[In], seconds: float = SECONDS) -> Iterator[Any]:
    """The result of ``function`` for each item, in order.

    Args:
        seconds: time limit per item.

    Raises:
        BoundError: an item took longer, or the process ended, for example because it needed more
            than 4 GB of memory.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings(action="ignore"):  # about threads, which the fork does not use
        child = os.fork()
    if not child:
        os.close(reading)
        _serve(function, items, writing)
    os.close(writing)
    try:
        with open(reading, "rb", buffering=0) as pipe:  # noqa: PTH123 - a descriptor
            for _ in items:
                deadline = time.monotonic() + seconds
                size = int.from_bytes(_exactly(pipe.fileno(), _NUMBER, deadline), "little")
                yield pickle.loads(_exactly(pipe.fileno(), size, deadline))
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _serve(function: Callable[[In], Any], items: Iterable[In], writing: int) -> NoReturn:
    """Compute and send the results in the fork. Whatever happens, the fork ends here."""
    with suppress(BaseException):
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        pages = (
            int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            if Path("/proc/self/statm").exists()
            else None
        )
        if pages is not None:
            most = pages * resource.getpagesize() + BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        with open(writing, "wb") as pipe:
            for item in items:
                data = pickle.dumps(function(item))
                pipe.write(len(data).to_bytes(_NUMBER, "little") + data)
                pipe.flush()
    os._exit(0)


def _exactly(descriptor: int, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise BoundError("it took too long")
        part = os.read(descriptor, min(2**20, size - len(data)))
        if not part:
            raise BoundError("it ended, probably because it needs too much memory")
        data += part
    return bytes(data)
