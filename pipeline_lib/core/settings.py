"""Environment variables. They change no result and are part of no stage's key (docs/settings.md)."""

import os
import re

from pipeline_lib.core.errors import SparselineError

BYTES = 4_000_000_000
TIMEOUT = 60
GPU_SHARE = 0.25  # share of a GPU's free memory for hidden states


def device_name() -> str:
    """SPARSELINE_DEVICE: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``, the first GPU that is free.

    Raises:
        SparselineError: another value.
    """
    name = os.environ.get("SPARSELINE_DEVICE", "cpu")
    if not re.fullmatch(r"cpu|auto|cuda(:[0-9]{1,3})?", name):
        raise SparselineError(
            f"SPARSELINE_DEVICE={name} is not a usable device; use cpu, auto, cuda, or cuda:1 and so on."
        )
    return name


def threads() -> int | None:
    """SPARSELINE_THREADS; None: torch's default.

    Raises:
        SparselineError: it is not a positive integer, or far more than there are processors.
    """
    found, most = _whole("SPARSELINE_THREADS", 1), 4 * (os.cpu_count() or 1)
    if found is not None and found > most:
        raise SparselineError(
            f"SPARSELINE_THREADS={found} is more than this machine can use; give at most {most}, four for"
            " each processor."
        )
    return found


def processes() -> int:
    """SPARSELINE_PROCESSES: how many processes share the work of one stage on this machine.

    Raises:
        SparselineError: it is no positive whole number, or far more than there are processors.
    """
    found, most = _whole("SPARSELINE_PROCESSES", 1), 4 * (os.cpu_count() or 1)
    if found is not None and found > most:
        raise SparselineError(
            f"SPARSELINE_PROCESSES={found} is more than this machine can use; give at most {most}, four for"
            " each processor."
        )
    return 1 if found is None else found


def timeout() -> int:
    """SPARSELINE_TIMEOUT: seconds without a sign of life after which another process of the stage
    counts as lost.

    Raises:
        SparselineError: it is no positive whole number.
    """
    found = _whole("SPARSELINE_TIMEOUT", 1)
    return TIMEOUT if found is None else found


def activation_bytes() -> int:
    """SPARSELINE_ACTIVATION_BYTES: streams of hidden states stay in memory up to this size, otherwise
    in files (same results).

    Raises:
        SparselineError: it is not an integer.
    """
    found = _whole("SPARSELINE_ACTIVATION_BYTES", 0)
    return BYTES if found is None else found


def gpu_activation_bytes() -> int | None:
    """SPARSELINE_GPU_ACTIVATION_BYTES: hidden states stay on the GPU up to this size, the rest in host
    memory (same results).

    None: the share ``GPU_SHARE`` of the free memory when the stage begins.

    Raises:
        SparselineError: it is not an integer.
    """
    return _whole("SPARSELINE_GPU_ACTIVATION_BYTES", 0)


def gram_bytes() -> int:
    """SPARSELINE_GRAM_BYTES: Gram matrices are stored up to this size, otherwise collected again when
    they are needed (same results).

    Raises:
        SparselineError: it is not an integer.
    """
    found = _whole("SPARSELINE_GRAM_BYTES", 0)
    return BYTES if found is None else found


def _whole(name: str, least: int) -> int | None:
    text = os.environ.get(name, "")
    if not text:
        return None
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) < least:
        kind = "a positive whole number" if least else "a whole number of bytes"
        raise SparselineError(f"{name}={text} is not {kind}.")
    return int(text)
