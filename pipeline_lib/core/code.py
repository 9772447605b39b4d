"""The code that a stage runs: the import closure of its module, by its import statements, including
those inside functions.
"""

import ast
import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

OWN = ("pipeline_lib", "stages")
# prose may begin like an import; it does not parse
IMPORT = re.compile(r"^[ \t]*((?:from|import) (?:[^\n(]|\([^)]*\))*)", re.MULTILINE)


def closure(stage: str, root: Path = Path()) -> list[Path]:
    """Every file of the project that ``python -m stages.<stage>`` may read as code, including
    templates.

    Returns:
        Names: paths from the directory that contains the file's package. In a checkout this is the
            root for all of them.
    """
    return sorted(_sources(stage, root))


def digest(stage: str, root: Path = Path()) -> str:
    """SHA-256 over names and bytes of a stage's closure. A project and a checkout with equal files
    have equal digests.
    """
    found = hashlib.sha256()
    for name, path in sorted(_sources(stage, root).items()):
        found.update(f"{name}\n".encode() + path.read_bytes())
    return found.hexdigest()


def is_project(root: Path = Path()) -> bool:
    """Whether a directory was created by `sparseline init`: it has the stages, and uses the installed
    library.
    """
    return (root / "stages").is_dir() and not (root / "pipeline_lib").is_dir()


def _home(package: str, root: Path) -> Path:
    """The directory that contains one of our packages: the project, or where the library is
    installed if the project has no copy of it.
    """
    return Path(__file__).parents[2] if package == "pipeline_lib" and is_project(root) else root


def _sources(stage: str, root: Path) -> dict[Path, Path]:
    """The files of a stage's closure: name -> path."""
    root = root.absolute()
    todo, seen = {root / "stages" / f"{stage}.py", root / "stages" / "__init__.py"}, set[Path]()
    while todo:
        path = todo.pop()
        seen.add(path)
        todo |= _imports(path, root) - seen
    folders = {path.parent for path in seen if "import jinja2" in path.read_text(encoding="utf-8")}
    seen |= {template for folder in folders for template in folder.glob("*.jinja")}
    stages = root / "stages"
    return {
        path.relative_to(root if path.is_relative_to(stages) else _home("pipeline_lib", root)): path
        for path in seen
    }


@cache
def _imports(path: Path, root: Path) -> set[Path]:
    """Modules of ours that a module imports, with their packages' __init__ files."""
    found: set[Path] = set()
    for name in _names(path.read_text(encoding="utf-8")):
        parts = name.split(".")
        if parts[0] in OWN:
            home = _home(parts[0], root)
            module = home.joinpath(*parts)
            packages = [home.joinpath(*parts[:count], "__init__.py") for count in range(1, len(parts) + 1)]
            found |= {candidate for candidate in (module.with_suffix(".py"), *packages) if candidate.exists()}
    return found


def _names(text: str) -> Iterator[str]:
    """Dotted names that may be modules. Only the import statements are parsed: a whole file takes
    twenty times as long.
    """
    for statement in IMPORT.findall(text):
        with suppress(SyntaxError):
            for node in ast.parse(statement).body:
                if isinstance(node, ast.Import):
                    yield from (alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
