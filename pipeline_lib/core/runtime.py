"""How a stage runs: one-sentence errors, cost records, and torch with the settings, imported only if
needed.
"""

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
from typing import TYPE_CHECKING

import click

from pipeline_lib.core import bugs, code, environment, process, ranks, settings
from pipeline_lib.core.artifacts import write_json
from pipeline_lib.core.errors import LostError, SparselineError
from pipeline_lib.core.files import sha256
from pipeline_lib.core.progress import duration

if TYPE_CHECKING:
    import torch

COSTS = Path("build/costs")
LOST = 4  # exit code if another process of the same stage is gone
_used: "set[torch.device]" = set()  # by this process, which is one stage
_peaks: list[int] = []  # bytes on the GPUs of its workers


def compute() -> "torch.device":
    """Prepare torch by the settings (threads, library of its products, exact products on a GPU),
    and return the device.

    Raises:
        SparselineError: the device does not exist, or a setting cannot be used.
    """
    import torch

    from pipeline_lib.core import gpus, products

    if threads := settings.threads():
        torch.set_num_threads(threads)
    products.enable_onednn()
    products.exact_on_gpu()
    name = settings.device_name()
    if name == "auto":
        name = f"cuda:{gpus.take()[0]}"
    if name == "cuda" and ranks.count() > 1:  # each process has its own
        name = f"cuda:{ranks.local()}"
        torch.cuda.set_device(ranks.local())
    try:
        _used.add(device := torch.empty(0, device=name).device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise SparselineError(
            f"SPARSELINE_DEVICE={name} is not a device of this machine; use cpu, or cuda on a machine with"
            " a GPU."
        ) from error


class Fault(Exception):
    """The error of one of a stage's processes, with its exit code."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def told() -> Iterator[None]:
    """Report an exception of the body in one sentence (``explained``)."""
    try:
        with process.stoppable():
            yield
        return
    except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):  # click handles them
        raise
    except (Exception, KeyboardInterrupt) as error:
        message, status = explained(error)
    with suppress(OSError):  # the reader may be gone
        print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def explained(error: BaseException) -> tuple[str, int]:
    """The sentence that explains the end of a stage, and its exit code.

    The code is 2 for a SparselineError, a file operation that the system refused, and too little
    memory. It is 128 + its number for a signal, 4 if another process of the stage is gone, and 3
    for anything else, which is a bug.
    """
    if isinstance(error, SparselineError):
        return str(error), 2
    if isinstance(error, Fault):
        return str(error), error.status
    if isinstance(error, LostError):
        return str(error), LOST
    if isinstance(error, KeyboardInterrupt):
        stopped = error if isinstance(error, process.Stopped) else process.Stopped(signal.SIGINT)
        return str(stopped), stopped.code
    if isinstance(error, OSError) and error.errno is not None:  # without a number, it is a library's own
        return _refused(error), 2
    if isinstance(error, Exception) and _is_gpu_memory(error):
        return (
            f"Out of GPU memory; {environment.command('plan')} predicts what each stage needs,"
            " SPARSELINE_GPU_ACTIVATION_BYTES=0 keeps hidden states off the GPU, and docs/cluster.md lists"
            " the keys that save more."
        ), 2
    if isinstance(error, Exception) and _is_memory(error):
        return (
            f"Out of memory; {environment.command('plan')} predicts what each stage needs, and"
            " docs/cluster.md lists the keys that save memory."
        ), 2
    return bugs.tell(error), bugs.CODE


def _refused(error: OSError) -> str:
    """The sentence about a file operation that the system refused."""
    room = f"make room, {environment.command('plan')} says what a run takes"
    remedy = room if error.errno in (errno.ENOSPC, errno.EDQUOT) else "correct the cause"
    # the second one is the target of the operation
    where = error.filename2 or error.filename or "A file of this run"
    return (
        f"{where}: {os.strerror(error.errno or 0)}; {remedy}, then run the same command again: finished"
        " work is kept."
    )


def _is_memory(error: Exception) -> bool:
    """Whether it is Python's own error, or the one that torch raises on a CPU."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def _is_gpu_memory(error: Exception) -> bool:
    """Whether it is the allocator's error, the driver's, or that of a library that got no memory."""
    said = str(error)
    return (
        type(error).__name__ == "OutOfMemoryError"
        or "CUDA error: out of memory" in said
        or "STATUS_ALLOC_FAILED" in said
    )


def used(peaks: list[int]) -> None:
    """Record the peak GPU memory of the workers."""
    _peaks.extend(peaks)


def peak_gpu() -> int | None:
    """Peak bytes of tensors on one of the stage's GPUs; None if it used none. It does not import torch."""
    gpus = [device for device in _used if device.type == "cuda"]
    if not gpus:
        return max(_peaks, default=None)
    import torch

    return max(map(torch.cuda.max_memory_allocated, gpus))


@contextmanager
def stage(name: str = "", output: Path | None = None) -> Iterator[Callable[[str], None]]:
    """Run the body of a stage: check the environment, report errors in one sentence (``told``), and
    write the cost record.

    Yields a function that prints the stage's last line: a summary, to which it adds the duration. A
    stage that `dvc` started ends when that `dvc` ends.

    Args:
        name: name of the cost record ``build/costs/<name>.json``: wall seconds, CPU seconds, peak
            memory, and peak GPU memory (null on a CPU). DVC does not track the record, because
            equal runs must write equal outputs.
        output: one of the stage's outputs. The record has its SHA-256, so that a reader can tell
            whether the output is still this run's.
    """
    started = time.monotonic()

    def tell(text: str) -> None:
        with suppress(OSError):  # the terminal may be gone, the results are there
            if ranks.outer():  # the first process tells
                return
            click.echo(f"{text}; {duration(time.monotonic() - started)}")

    with told(), process.following_dvc():
        environment.check()
        yield tell
        usages = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        if output is not None and output.exists() and not ranks.outer():
            peak = max(one.ru_maxrss for one in usages) * (1 if sys.platform == "darwin" else 1024)
            figures = {
                "wall_s": round(time.monotonic() - started, 2),
                "cpu_s": round(sum(one.ru_utime + one.ru_stime for one in usages), 2),
            }
            made = {"path": str(output), "sha256": sha256(output)}
            write_json(
                COSTS / f"{name}.json",
                figures | {"peak_rss_bytes": peak, "peak_gpu_bytes": peak_gpu(), "output": made},
            )


def resume_key(name: str, facts: str, inputs: list[Path]) -> str:
    """A key over parameters, the inputs' bytes, the code of the stage of this name, torch's
    version, and the device with its threads, library of products and use of bfloat16.
    """
    import torch

    from pipeline_lib.core import products

    digest = hashlib.sha256(facts.encode())
    for path in inputs:
        digest.update(path.read_bytes())
    root = Path() if code.is_project() else Path(__file__).parents[2]
    digest.update(code.digest(name, root).encode())
    device = compute()  # first: it sets the threads and the library for products
    library = products.onednn_is_enabled(), products.bfloat16_is_faster()
    digest.update(f"{torch.__version__} {device.type} {torch.get_num_threads()} {library}".encode())
    return digest.hexdigest()[:32]
