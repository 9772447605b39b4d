"""The versions of the software: env.lock.json, which is a dependency of every numeric stage and so a
part of its key.
"""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline_lib.core import code, files
from pipeline_lib.core.errors import SparselineError

FILE = Path("env.lock.json")
PACKAGES = ("numpy", "torch", "transformers")


def command(target: str) -> str:
    """The command for a target of the Makefile, in backquotes: with make, or in a project with the
    installed command.
    """
    return f"`sparseline {target}`" if code.is_project() else f"`make {target}`"


def running() -> dict[str, str]:
    """The versions of Python and of the packages that influence results, without builds (``+cpu``).

    Raises:
        SparselineError: a package is not installed.
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError as error:
            raise SparselineError(f"The package {name} is not installed; run `make environment`.") from error
    return found


def check(path: Path = FILE) -> None:
    """Refuse to run with other versions than those of the stages' keys.

    Raises:
        SparselineError: the file cannot be read, or a version differs.
    """
    try:
        locked = json.loads(files.text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise SparselineError(
            f"{path} cannot be read as JSON ({error}); run {command('environment')}, which writes it."
        ) from error
    here = running()
    if locked == here:
        return
    known = locked if isinstance(locked, dict) else {}
    name = next((name for name in (*known, *here) if known.get(name) != here.get(name)), "versions")
    raise SparselineError(
        f"{path} names {name} {known.get(name, 'not at all')}, but {here.get(name, 'no such package')} runs"
        f" here; run {command('environment')}, which writes the versions that run into it (results of other"
        " versions stay in the cache)."
    )


def write(path: Path = FILE) -> bool:
    """Write the installed versions into the file, and return whether that changed it. Equal
    versions give equal bytes.
    """
    text = json.dumps(running(), sort_keys=True) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.write_text(text, encoding="utf-8")
    return True
