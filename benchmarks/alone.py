"""Run work in a process of its own, measure its cost, and stop it after a limit."""

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]
# otherwise a check for GPUs would keep forks from using them
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# the server has imported torch, and has used neither threads nor a GPU
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["benchmarks.lab", "transformers.models.llama.modeling_llama"])


def resident(name: str) -> int:
    """VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def warm(device: torch.device) -> None:
    """Let the device's libraries load what they load at first use, so that later measurements
    exclude it.
    """
    square = torch.eye(64, device=device)
    torch.cholesky_inverse(torch.linalg.cholesky_ex(square @ square).L)
    wait(device)


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Meter:
    """Measures wall and CPU seconds of this process from now on, and the peaks of memory above the
    level of now; on a CPU there is no GPU memory.
    """

    def __init__(self, device: torch.device) -> None:
        warm(device)
        self.device, gpu = device, device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        self.held, self.before = torch.cuda.memory_allocated(device) if gpu else 0, resident("VmRSS")
        # the high-water mark starts anew
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self.cpu, self.started = time.process_time(), time.perf_counter()

    def read(self) -> Record:
        """The cost so far."""
        wait(self.device)
        gpu = self.device.type == "cuda"
        return {
            "wall_s": round(time.perf_counter() - self.started, 3),
            "cpu_s": round(time.process_time() - self.cpu, 3),
            "peak_bytes": resident("VmHWM") - self.before,
            "peak_gpu_bytes": torch.cuda.max_memory_allocated(self.device) - self.held if gpu else None,
        }


def cost(work: Callable[[], object], device: torch.device) -> Record:
    """Run work in this process, and return its cost (``Meter``)."""
    meter = Meter(device)
    work()
    return meter.read()


def summed(first: Record, second: Record) -> Record:
    """The cost of two pieces of work, one after the other."""
    found = {part: round(first[part] + second[part], 3) for part in ("wall_s", "cpu_s")}
    return found | {
        part: max((one[part] for one in (first, second) if one[part] is not None), default=None)
        for part in ("peak_bytes", "peak_gpu_bytes")
    }


def alone(work: Callable[..., Record], *given: Any, limit: float | None = None) -> Record:
    """The result of ``work(*given)``, from a new process.

    Args:
        work: a function of a module.
        limit: seconds until the process is stopped.

    Raises:
        TimeoutError: it was stopped.
        RuntimeError: the work failed, or its process was ended from outside.
    """
    reads, writes = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_tell, args=(writes, work, given))
    process.start()
    writes.close()
    try:
        if not reads.poll(limit):
            raise TimeoutError(f"stopped after {limit:g} s")
        told = reads.recv()
        process.join(10)
    except EOFError as error:
        raise RuntimeError("its process was ended from outside") from error
    finally:
        process.kill()
        process.join()
    if isinstance(told, str):
        raise RuntimeError(told)
    found: Record = told
    return found


def _tell(writes: Connection, work: Callable[..., Record], given: tuple[Any, ...]) -> None:
    """Send the work's record, or a sentence that says why there is none."""
    try:
        writes.send(work(*given))
    except BaseException as error:
        writes.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        raise
