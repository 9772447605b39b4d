"""Settings that change no result, so that they are part of no stage's key: environment variables, see README."""

import os

from pipeline_lib.core.errors import SparselineError

BYTES = 4_000_000_000


def device_name() -> str:
    """SPARSELINE_DEVICE: ``cpu``, ``cuda``, ``cuda:1``."""
    return os.environ.get("SPARSELINE_DEVICE", "cpu")


def threads() -> int | None:
    """SPARSELINE_THREADS; None: as many as torch takes.

    Raises:
        SparselineError: it is no positive whole number.
    """
    return _whole("SPARSELINE_THREADS", 1)


def activation_bytes() -> int:
    """SPARSELINE_ACTIVATION_BYTES: streams of hidden states stay in memory up to this size, else they are files (same results).

    Raises:
        SparselineError: it is no whole number.
    """
    found = _whole("SPARSELINE_ACTIVATION_BYTES", 0)
    return BYTES if found is None else found


def gram_bytes() -> int:
    """SPARSELINE_GRAM_BYTES: Gram matrices are stored up to this size, else taken again where they are needed (same results).

    Raises:
        SparselineError: it is no whole number.
    """
    found = _whole("SPARSELINE_GRAM_BYTES", 0)
    return BYTES if found is None else found


def _whole(name: str, least: int) -> int | None:
    text = os.environ.get(name, "")
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < least:
        kind = "a positive whole number" if least else "a whole number of bytes"
        raise SparselineError(f"{name}={text} is not {kind}.")
    return int(text)
