"""The files of a project. The wheel has them beside the library; pyproject.toml lists them."""

import tomllib
from collections.abc import Mapping
from pathlib import Path

from pipeline_lib.core import artifacts, files
from pipeline_lib.core.errors import SparselineError

INSTALLED = Path(__file__).parents[1] / "project"  # only in an installed package
MODEL, GRAPH, PARAMS = "data/tiny-llama", "dvc.yaml", "params.yaml"
# what belongs to the library's version, not to the user
RENEWED = (GRAPH, "stages/", "data/errors/", ".dvc/plots/")
JOINED = (".gitignore", ".dvcignore")  # an existing file of this name gets the lines that it lacks
# the line of the stage `keys` in a checkout's graph
WATCHED = "    deps: [params.yaml, pipeline_lib, stages, env.lock.json]\n"
INSTEAD = """    deps: [params.yaml, stages, env.lock.json]
    # The library is installed, where DVC does not watch it: this stage hashes its files whenever DVC runs.
    always_changed: true
"""


def shipped() -> dict[str, bytes]:
    """Every file of a new project, by its path in the project.

    Raises:
        OSError: a file of the installed package is missing.
    """
    found = {name: files.read(path) for name, path in sorted(_sources().items())}
    return found | {GRAPH: graph(found[GRAPH].decode()).encode()}


def graph(checkout: str) -> str:
    """The text of a project's dvc.yaml, made from a checkout's: the library is not a directory of the
    project.
    """
    return checkout.replace(WATCHED, INSTEAD)


def lay_out(directory: Path, wanted: Mapping[str, bytes]) -> None:
    """Write the files of a project; existing files with the same bytes stay.

    Raises:
        SparselineError: a file exists with other contents. Then nothing is written.
        OSError: a file cannot be written.
    """
    found = {name: _joined(directory, name, raw) for name, raw in wanted.items()}
    for name, raw in found.items():
        path = directory / name
        if (
            name not in JOINED
            and (path.is_symlink() or path.exists())
            and (not path.is_file() or files.read(path) != raw)
        ):
            raise SparselineError(
                f"{path} already exists with other contents; choose another directory, or move that file"
                " away."
            )
    write(directory, found)


def unused(directory: Path, wanted: Mapping[str, bytes]) -> None:
    """Check that a directory is missing or empty, or has a project, perhaps one not yet complete.

    Raises:
        SparselineError: it has other files.
        OSError: it cannot be read.
    """
    own = {".git"} | {Path(name).parts[0] for name in wanted}
    if not directory.is_dir() or (directory / GRAPH).exists():
        return
    if others := sorted(path.name for path in directory.iterdir() if path.name not in own):
        raise SparselineError(
            f"{directory} is not empty (it has {others[0]}) and is not a project; give a new directory."
        )


def write(directory: Path, found: Mapping[str, bytes]) -> None:
    """Write files, dvc.yaml last: a directory with dvc.yaml has all of them."""
    for name in sorted(found, key=lambda name: (name == GRAPH, name)):
        artifacts.write_bytes(directory / name, found[name])


def renewed() -> dict[str, bytes]:
    """The files that belong to the version of the library, by their paths in a project."""
    return {name: raw for name, raw in shipped().items() if name.startswith(RENEWED)}


def _joined(directory: Path, name: str, raw: bytes) -> bytes:
    path = directory / name
    if name not in JOINED or not path.is_file():
        return raw
    old = files.text(path)
    lines = [line for line in raw.decode().splitlines() if line not in old.splitlines()]
    return "\n".join([*old.splitlines(), *lines, ""]).encode()


def _sources() -> dict[str, Path]:
    if INSTALLED.is_dir():
        return _below(INSTALLED, "")
    checkout = INSTALLED.parents[1]
    build = tomllib.loads(files.text(checkout / "pyproject.toml"))["tool"]["hatch"]["build"]
    listed = build["targets"]["wheel"]["force-include"]
    inside = f"{INSTALLED.relative_to(checkout).as_posix()}/"
    found: dict[str, Path] = {}
    for source, target in listed.items():
        found |= _below(checkout / source, target.removeprefix(inside))
    return found


def _below(source: Path, target: str) -> dict[str, Path]:
    """A file, or all files below a directory except Python's own, by their paths in a project."""
    if source.is_file():
        return {target: source}
    paths = [path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {(Path(target) / path.relative_to(source)).as_posix(): path for path in paths}
