"""Storage for the finished blocks of an interrupted stage: a directory per key, outside the graph and
outside any experiment's copy.

Only one process at a time holds a key. The lock is the operating system's (flock), which is
released when its owner ends, for any reason. On a network file system that may fail (a partition, a
lost lease). So each process has its own directory for files that it overwrites, and finished files
appear atomically, with the same bytes from every process.
"""

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import click

from pipeline_lib.core import ranks
from pipeline_lib.core.artifacts import ABANDONED, newest, remove, temporary_name
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import duration

LOOK = 0.5  # seconds between two looks at a lock that another process has


@dataclass(frozen=True)
class Scratch:
    """The directories of the holder of a key: ``kept`` survives a kill, ``own`` belongs to this
    process and is removed at its end.
    """

    kept: Path
    own: Path


@contextmanager
def hold(name: str, key: str, what: str) -> Iterator[Scratch]:
    """Hold the scratch directories of this key for this process alone. If another process holds the
    key, print a message once and wait.

    Finished blocks are removed when the body succeeds, unless other processes wait; the next of
    them finds all blocks finished. They are kept if the body fails. Keys that have not been used
    for two weeks are removed.

    Of a stage's processes, the first holds the key. The others get the same place, each with a
    directory of its own.

    Args:
        name: the stage's name.
        key: 32 hexadecimal digits, see ``runtime.resume_key``.
        what: the beginning of messages, "prune wanda".

    Raises:
        SparselineError: no directory can be written.
    """
    if not ranks.first():
        kept = ranks.broadcast(Path(), 0)
        kept.mkdir(parents=True, exist_ok=True)  # it may be missing on another machine
        with _own(kept) as own:
            yield Scratch(kept, own)
        return
    place = _root(what) / name
    place.mkdir(exist_ok=True)
    _sweep(place)
    lock = _acquire(place, key, what)
    kept = place / key
    try:
        _sign(lock)
        if kept.is_symlink() or not kept.is_dir():
            remove(kept)
        kept.mkdir(exist_ok=True)
        for left in kept.rglob(".*.partial"):  # of dead processes, since the lock is ours
            remove(left)
        try:
            ranks.broadcast(kept.absolute(), 0)
            with _own(kept) as own:
                yield Scratch(kept, own)
        finally:
            with suppress(OSError):  # succeeds only if no block was finished
                kept.rmdir()
        if not _waited_for(place, key):
            _drop(kept)
    finally:
        _lock(place, key).unlink(missing_ok=True)
        lock.close()


@contextmanager
def _own(kept: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(
        prefix=".own.", suffix=".partial", dir=kept, ignore_cleanup_errors=True
    ) as own:
        yield Path(own)


def _lock(place: Path, key: str) -> Path:
    return place / f"{key}.lock"


def _waiting(place: Path, key: str) -> Path:
    """A waiting process holds a shared lock on this file."""
    return place / f"{key}.waiting"


def _acquire(place: Path, key: str, what: str) -> IO[str]:
    waiting = None
    try:
        while (lock := _try(_lock(place, key))) is None:
            if waiting is None:
                click.echo(f"{what}: {_owner(_lock(place, key))} has these blocks; waiting until it ends")
                waiting = _waiting(place, key).open("a+")
                # the owner may be checking for waiting processes just now; then it drops the blocks
                with suppress(BlockingIOError):
                    fcntl.flock(waiting, fcntl.LOCK_SH | fcntl.LOCK_NB)
            time.sleep(LOOK)
    finally:
        if waiting is not None:
            waiting.close()
    return lock


def _sign(lock: IO[str]) -> None:
    """Note the owner, for processes that wait."""
    command = " ".join(shlex.join(sys.orig_argv).split())[:200]
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": command,
        "directory": str(Path.cwd()),
    }
    lock.truncate(0)
    lock.write(json.dumps(owner | {"since": time.time()}))
    lock.flush()


def _try(path: Path) -> IO[str] | None:
    """The locked file, or None if another process has the lock. The path must still name this file,
    because its previous owner may have removed it.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        remove(path)
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours, named = os.fstat(file.fileno()), path.stat()
        if ours.st_nlink and (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino):
            return file
    except BlockingIOError:
        pass
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            file.close()
            raise
    file.close()
    return None


def _owner(lock: Path) -> str:
    try:
        found: dict[str, Any] = json.loads(lock.read_text(encoding="utf-8"))
        run = duration(max(0.0, time.time() - found["since"]))
        return (
            f"process {found['pid']} on {found['host']} (`{found['command']}` in {found['directory']}, for"
            f" {run})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # which has only just begun, or ended


def _waited_for(place: Path, key: str) -> bool:
    path = _waiting(place, key)
    if not path.exists():
        return False
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        path.unlink(missing_ok=True)
    return False


def _drop(kept: Path) -> None:
    """Rename, then remove, so that a kill leaves no partial directory under the key."""
    if kept.exists():
        away = temporary_name(kept)
        kept.rename(away)
        shutil.rmtree(away, ignore_errors=True)


def _sweep(place: Path) -> None:
    """Remove keys that nobody has used for two weeks and nobody holds, and the remains of
    interrupted removals.
    """
    for path in place.iterdir():
        if re.fullmatch(r"\.[0-9a-f]{32}\..*\.partial", path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif (found := re.fullmatch(r"([0-9a-f]{32})(\.lock|\.waiting)?", path.name)) and _old(path):
            key = found[1]
            with suppress(OSError):
                if (lock := _try(_lock(place, key))) is not None:
                    if _old(place / key):
                        _drop(place / key)
                    _waiting(place, key).unlink(missing_ok=True)
                    _lock(place, key).unlink(missing_ok=True)
                    lock.close()


def _old(path: Path) -> bool:
    return time.time() - newest(path) > ABANDONED


def _root(what: str) -> Path:
    """SPARSELINE_SCRATCH, or the user's cache directory. If the latter cannot be written, it is a
    directory of the project, or else one of the system's temporary directory.
    """
    if chosen := os.environ.get("SPARSELINE_SCRATCH"):
        if reason := _unusable(Path(chosen)):
            raise SparselineError(
                f"SPARSELINE_SCRATCH={chosen} cannot be used ({reason}); give a directory that can be"
                " written, on a file system with locks."
            )
        return Path(chosen)
    reasons: list[str] = []
    for place in (_cache, _project, _temporary):
        try:
            root = place()
            reason = _unusable(root)
        except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if not reason:
            if reasons:
                click.echo(
                    f"{what}: no cache directory in this user's home ({reasons[0]}); finished blocks are kept"
                    f" in {root}"
                )
            return root
        reasons.append(reason.rstrip("."))
    raise SparselineError(
        f"There is no directory for finished blocks ({reasons[0]}); set SPARSELINE_SCRATCH to one that can be"
        " written, on a file system with locks."
    )


def _cache() -> Path:
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "sparseline" / "resume"
    if not (home := Path.home()).is_dir():
        raise NotADirectoryError(errno.ENOENT, f"{home} does not exist")
    return home / ".cache" / "sparseline" / "resume"


def _project() -> Path:
    """A directory below DVC_ROOT, because the copy in which an experiment runs is deleted when it
    ends.
    """
    own = Path(os.environ.get("DVC_ROOT") or ".").absolute() / ".dvc"
    if not own.is_dir():
        raise NotADirectoryError(errno.ENOENT, "no .dvc here")
    return own / "tmp" / "sparseline"


def _temporary() -> Path:
    """A private directory in the system's temporary directory. Another user may have created one of
    this name, so owner and permissions are checked.
    """
    path = Path(tempfile.gettempdir()) / f"sparseline-{os.getuid()}"
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(errno.EPERM, f"{path} is not this user's alone")
    return path


def _unusable(root: Path) -> str | None:
    """Why this directory cannot be used, or None. It is tried, because permissions alone do not show it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.strerror or str(error)
    return None
