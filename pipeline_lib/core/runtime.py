"""How a stage runs: device and threads (settings, outside the cache key), keyed randomness, one-sentence errors, costs."""

import errno
import hashlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
import torch

from pipeline_lib.core import environment, process, products
from pipeline_lib.core.artifacts import sha256, write_json
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import duration

COSTS = Path("build/costs")


def device() -> torch.device:
    """SPARSELINE_DEVICE (``cpu``, ``cuda``, ``cuda:1``); the CPU without it.

    Raises:
        SparselineError: no such device here.
    """
    name = os.environ.get("SPARSELINE_DEVICE", "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise SparselineError(f"SPARSELINE_DEVICE={name} is not a device of this machine; use cpu, or cuda where one is.") from error


def generator(seed: int, name: str) -> torch.Generator:
    """Randomness that depends on the seed and on what it is for, never on the order of calls."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def told() -> Iterator[None]:
    """What ends the body early is told in one sentence: a SparselineError or the system's refusal of a file (code 2), a signal (128 + its number)."""
    code = 2
    try:
        with process.stoppable():
            yield
        return
    except SparselineError as error:
        message = str(error)
    except KeyboardInterrupt:
        message, code = str(process.Stopped(signal.SIGINT)), 128 + signal.SIGINT
    except process.Stopped as stopped:
        message, code = str(stopped), stopped.code
    except OSError as error:
        if error.errno in (None, errno.EPIPE):  # none: a library's own; a closed pipe is click's matter
            raise
        mend = "make room, `make plan` says what a run takes" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that place"
        where = error.filename2 or error.filename or "A file of this run"  # the second: where something was to go
        message = f"{where}: {os.strerror(error.errno)}; {mend}, then run the same command again: what is finished is kept."
    with suppress(OSError):  # as above where nobody reads on
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def stage(name: str = "", output: Path | None = None) -> Iterator[Callable[[str], None]]:
    """The body of a stage: threads set, environment checked, what goes wrong told in one sentence (``told``), cost written.

    Yields what tells the stage's last line: a sentence on what was done, to which the seconds are added.
    A stage that `dvc` started ends with it.

    Args:
        name: of the cost record ``build/costs/<name>.json``: wall seconds, CPU seconds and peak memory. DVC does not track it, since
            equal runs must write equal outputs.
        output: one of the stage's outputs. The record holds its SHA-256, so that a reader can tell whether the output still is this run's.
    """
    started = time.monotonic()

    def tell(text: str) -> None:
        with suppress(OSError):  # the terminal may be gone, the results are there
            click.echo(f"{text}; {duration(time.monotonic() - started)}")

    with told(), process.following_dvc():
        threads = os.environ.get("SPARSELINE_THREADS", "")
        if threads:
            if not threads.isdigit() or int(threads) < 1:
                raise SparselineError(f"SPARSELINE_THREADS={threads} is not a positive whole number.")
            torch.set_num_threads(int(threads))
        products.choose()
        environment.check()
        yield tell
        usage = resource.getrusage(resource.RUSAGE_SELF)
        if output is not None:
            peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            figures = {"wall_s": round(time.monotonic() - started, 2), "cpu_s": round(usage.ru_utime + usage.ru_stime, 2)}
            made = {"path": str(output), "sha256": sha256(output)}
            write_json(COSTS / f"{name}.json", figures | {"peak_rss_bytes": peak, "output": made})


def resume_key(facts: str, inputs: list[Path]) -> str:
    """A key over parameters, the inputs' bytes, the library's code that is loaded, and torch's version."""
    digest = hashlib.sha256(facts.encode())
    code = sorted(module.__file__ for name, module in sys.modules.items() if name.startswith("pipeline_lib") and module.__file__)
    for path in [*inputs, *map(Path, code)]:
        digest.update(path.read_bytes())
    digest.update(f"{torch.__version__} {device().type} {torch.get_num_threads()} {products.choose()}".encode())
    return digest.hexdigest()[:32]
