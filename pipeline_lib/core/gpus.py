"""Find free GPUs for SPARSELINE_DEVICE=auto, so that stages that run at the same time use different
ones.

A GPU is free if no other stage uses it and other programs use little of its memory. A stage marks
its GPU by a socket whose address is the GPU's name. The system removes the socket when the process
ends, in any way.
"""

import functools
import shutil
import socket
import subprocess
import time
from contextlib import suppress

from pipeline_lib.core.errors import SparselineError

LITTLE = 0.1  # share of the memory that a desktop or a driver may hold
PATIENCE = 10.0  # seconds to wait for a free GPU: another stage may be ending
LOOK = 0.5
_taken: list[socket.socket] = []  # the locks of this process, kept until it ends


@functools.cache
def take(count: int = 1) -> tuple[int, ...]:
    """The numbers of the first free GPUs. This process keeps them; later calls return the same
    ones.

    Raises:
        SparselineError: fewer GPUs are free.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        found, busy = _free(count)
        if len(found) == count:
            _taken.extend(found.values())
            return tuple(found)
        for lock in found.values():
            lock.close()
        if not busy:
            raise SparselineError(
                f"SPARSELINE_DEVICE=auto needs {_gpus(count)}, and this machine has {len(found) or 'none'};"
                " use cpu, or a machine that has more."
            )
        if time.monotonic() > deadline:
            raise SparselineError(
                f"SPARSELINE_DEVICE=auto needs {_gpus(count)} and finds {len(found) or 'none'} free:"
                f" {'; '.join(busy)}. Start fewer stages at once, or name a device, such as"
                " SPARSELINE_DEVICE=cuda:0."
            )
        time.sleep(LOOK)


def _gpus(count: int) -> str:
    return "a GPU" if count == 1 else f"{count} GPUs"


def _free(count: int) -> tuple[dict[int, socket.socket], list[str]]:
    """The numbers of up to ``count`` free GPUs, with their locks, and the reasons why the others
    are not free.
    """
    import torch

    held, found, busy = _held(), dict[int, socket.socket](), list[str]()
    for number in range(torch.cuda.device_count()):
        if len(found) == count:
            break
        name = str(torch.cuda.get_device_properties(number).uuid)
        if held.get(name, 0.0) > LITTLE:
            busy.append(f"{held[name]:.0%} of cuda:{number}'s memory is in use")
        elif (lock := _lock(name)) is None:
            busy.append(f"another stage uses cuda:{number}")
        else:
            found[number] = lock
    return found, busy


def _lock(name: str) -> socket.socket | None:
    """Lock a GPU; None if another process has the lock. The socket's address is no file, because it
    begins with a zero byte.
    """
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(f"\0sparseline-gpu-{name}")
    except OSError:
        lock.close()
        return None
    return lock


def _held() -> dict[str, float]:
    """GPU -> share of its memory that is in use; empty if `nvidia-smi` is not installed. torch is
    not asked, because it would use memory of each GPU.
    """
    held: dict[str, float] = {}
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return held
    query = (tool, "--query-gpu=uuid,memory.used,memory.total", "--format=csv,noheader,nounits")
    with suppress(OSError, subprocess.TimeoutExpired):
        told = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
        for line in told.stdout.splitlines():
            with suppress(ValueError, ZeroDivisionError):  # "[N/A]"
                name, used, total = line.split(", ")
                held[name.removeprefix("GPU-")] = float(used) / float(total)
    return held
