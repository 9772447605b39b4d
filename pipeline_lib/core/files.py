"""Reading of files: regular files only, so that no pipe or device blocks; untrusted files only inside
their directory.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BufferedReader
from pathlib import Path, PurePosixPath

from pipeline_lib.core.errors import SparselineError

LARGE = 2**29  # maximum bytes of a file of settings, an index or a tokenizer
KINDS = {
    stat.S_ISDIR: "a directory",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Open a file to read.

    Raises:
        OSError: it cannot be opened.
        SparselineError: it is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
        _check_kind(path, os.fstat(descriptor).st_mode)
        yield file


def _check_kind(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        found = next((kind for test, kind in KINDS.items() if test(mode)), "something else")
        raise SparselineError(f"{path} is not a regular file ({found}); put a file there, or remove it.")


def read(path: Path, most: int | None = None) -> bytes:
    """A file's bytes.

    Args:
        most: maximal number of bytes; None: no limit.

    Raises:
        OSError: it cannot be read.
        SparselineError: it is not a regular file, or too large.
    """
    with opened(path) as file:
        if most is not None and os.fstat(file.fileno()).st_size > most:
            raise SparselineError(
                f"{path} has more than {most:,} bytes, which is too much for such a file; remove it or"
                " fetch it again."
            )
        return file.read()


def text(path: Path, encoding: str = "utf-8") -> str:
    """A short file's text.

    Raises:
        OSError: it cannot be read.
        ValueError: it is in another encoding.
        SparselineError: as ``read``.
    """
    return read(path, LARGE).decode(encoding)


def sha256(path: Path) -> str:
    """A file's SHA-256 as hexadecimal digits.

    Raises:
        OSError: it cannot be read.
        SparselineError: it is not a regular file.
    """
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_plain(name: str) -> bool:
    """Whether a name from a file stays inside its directory."""
    path = PurePosixPath(name)
    return (
        path.as_posix() == name
        and name != "."
        and not path.is_absolute()
        and ".." not in path.parts
        and "\0" not in name
    )


def check_inside(directory: Path, path: Path) -> None:
    """Refuse files that are not regular, and links that leave the directory. Links into the hub's and
    DVC's caches are allowed.

    Raises:
        SparselineError: such a file or link, or a broken link.
    """
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a circle of links; ValueError: a NUL
        mend = (
            "is a link to a file that is not there; fetch that file, or remove the link"
            if path.is_symlink()
            else "is missing; copy it again"
        )
        raise SparselineError(f"{path} {mend}.") from error
    _check_kind(path, mode)
    home = directory.resolve()
    if real.is_relative_to(home):
        return
    stores = [home.parent.parent / "blobs"] if home.parent.name == "snapshots" else []
    if not any(real.is_relative_to(store) for store in (*stores, *_dvc_cache(Path.cwd()))):
        raise SparselineError(
            f"{path} is a link to {real}, which is outside {directory}; put the file itself there."
        )


@cache
def _dvc_cache(here: Path) -> list[Path]:
    """The directories in which DVC stores files, if ``here`` lies in a DVC project."""
    root = next((directory for directory in (here, *here.parents) if (directory / ".dvc").is_dir()), None)
    if root is None:
        return []
    from dvc.config import Config, ConfigError  # imported here: only links that lead out need it

    try:
        place = Config(str(root / ".dvc"), validate=False)["cache"].get("dir")
    except ConfigError:
        return []
    return [(root / ".dvc" / (place or "cache")).resolve() / "files" / "md5"]
