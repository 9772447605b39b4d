"""Files and directories that appear atomically, with equal bytes for equal contents: text, JSON,
safetensors.
"""

import errno
import glob
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pipeline_lib.core import files, process
from pipeline_lib.core.errors import SparselineError

if TYPE_CHECKING:
    import torch

# seconds after which files of an unknown process on a shared disk count as abandoned
ABANDONED = 14 * 24 * 3600


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` to write (file or directory). It replaces ``path`` only
    if the body succeeds.

    Its name is unique to the process. Temporary files of killed processes are removed.

    Raises:
        OSError: something cannot be written; ``filename`` says what.
        Stopped: a signal arrived, see ``process.heed``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*partial"):
        if _abandoned(left):
            remove(left)
    temporary, old = temporary_name(path), temporary_name(path)
    try:
        yield temporary
        process.heed()
        while True:
            try:
                temporary.replace(path)
                break
            except OSError as error:  # a file is replaced in one step; a directory cannot be
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR):
                    raise
            remove(old)
            with suppress(FileNotFoundError):  # another process was faster
                path.replace(old)
    except OSError as error:
        if error.filename is None:  # as after a write to an open file
            error.filename = str(path)
        raise
    finally:
        if old.exists() and not path.exists():  # stopped between the two steps
            old.replace(path)
        remove(old)
        remove(temporary)


def temporary_name(path: Path) -> Path:
    """A sibling name that no other process has, on this host or another; it identifies its owner
    (``_abandoned``).
    """
    return path.with_name(f".{path.name}.{_here()}-{os.getpid()}-{secrets.token_hex(4)}.partial")


@cache
def _here() -> str:
    """A hash of the host, its boot and the container. Within them, the number of this process is unique."""
    parts = [platform.node()]
    with suppress(OSError):  # Linux
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:8]


def final_name(name: str) -> str:
    """The final name of a temporary name."""
    found = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}-\d+-[0-9a-f]{8}\.partial", name)
    return found[1] if found else name


def _abandoned(temporary: Path) -> bool:
    """Whether the process that wrote the file is gone. If it ran here, its number shows this;
    otherwise the file's age does.
    """
    found = re.search(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.partial$", temporary.name)
    if found and found[1] == _here():
        return not psutil.pid_exists(int(found[2]))
    return found is None or time.time() - newest(temporary) > ABANDONED


def newest(path: Path) -> float:
    """Modification time of the newest file of a tree, in seconds since the epoch; 0 if there is none."""
    found = [str(path)]
    # unlike rglob, os.walk skips what another process removes meanwhile
    for folder, below, names in os.walk(path):
        found += [os.path.join(folder, name) for name in (*below, *names)]  # noqa: PTH118
    times = [0.0]
    for one in found:
        with suppress(OSError):
            times.append(os.lstat(one).st_mtime)
    return max(times)


def remove(path: Path) -> None:
    """Remove a file, a link (not its target), or a directory with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def save_tensors(
    path: Path, tensors: Mapping[str, "torch.Tensor"], metadata: dict[str, str] | None = None
) -> None:
    """Call ``save_file``, and raise the system's errors as OSError.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


def write_bytes(path: Path, raw: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(raw)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values give equal bytes.

    Raises:
        SparselineError: the values contain NaN or infinity.
    """
    write_text(path, dumps(value, path))


def dumps(value: Any, path: Path) -> str:
    """The text of a JSON file, see ``write_json``."""
    try:
        return json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise SparselineError(
            f"{path} would contain NaN or infinity, because the computation overflows; check the model, the"
            " stage's parameters (such as rates), or compute in float32."
        ) from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(files.text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise SparselineError(
            f"{path} cannot be read ({error}); run `dvc repro` to make it again."
        ) from error


def write_tensors(
    path: Path, tensors: Mapping[str, "torch.Tensor"], facts: Mapping[str, Any] | None = None
) -> None:
    """Write one safetensors file. Facts go into a single metadata key, because several keys have a
    random order.
    """
    metadata = {"sparseline": json.dumps(dict(facts or {}), sort_keys=True)}
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with replacing(path) as temporary:
        save_tensors(temporary, ordered, metadata)


def read_tensors(path: Path) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
    """Tensors and facts of one of our safetensors files.

    Raises:
        SparselineError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with files.opened(path), safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["sparseline"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts
    except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise SparselineError(
            f"{path} cannot be read ({error}); run `dvc repro` to make it again."
        ) from error


def block_file(directory: Path, block: int) -> Path:
    """The path of a block's tensors in an artifact with one file per block."""
    return directory / f"block-{block:03d}.safetensors"
