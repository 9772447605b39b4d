"""Which code a stage runs: the import closure of its module, by its import statements, those inside functions included."""

import ast
import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

OWN = ("pipeline_lib", "stages")
IMPORT = re.compile(r"^[ \t]*((?:from|import) (?:[^\n(]|\([^)]*\))*)", re.MULTILINE)  # prose may begin like that; it does not parse


def closure(stage: str, root: Path = Path()) -> list[Path]:
    """Every file of ours that ``python -m stages.<stage>`` may read as code, relative to the root; templates included."""
    todo, seen = {root / "stages" / f"{stage}.py", root / "stages" / "__init__.py"}, set[Path]()
    while todo:
        path = todo.pop()
        seen.add(path)
        todo |= _imports(path, root) - seen
    folders = {path.parent for path in seen if "import jinja2" in path.read_text(encoding="utf-8")}
    return sorted(path.relative_to(root) for path in seen | {template for folder in folders for template in folder.glob("*.jinja")})


def digest(stage: str, root: Path = Path()) -> str:
    """SHA-256 over names and bytes of a stage's closure."""
    found = hashlib.sha256()
    for path in closure(stage, root):
        found.update(f"{path}\n".encode() + (root / path).read_bytes())
    return found.hexdigest()


@cache
def _imports(path: Path, root: Path) -> set[Path]:
    """Modules of ours that a module imports, with their packages' __init__ files."""
    found: set[Path] = set()
    for name in _names(path.read_text(encoding="utf-8")):
        parts = name.split(".")
        if parts[0] in OWN:
            module = root.joinpath(*parts)
            packages = [root.joinpath(*parts[:count], "__init__.py") for count in range(1, len(parts) + 1)]
            found |= {candidate for candidate in (module.with_suffix(".py"), *packages) if candidate.exists()}
    return found


def _names(text: str) -> Iterator[str]:
    """Dotted names that may be modules. Only the import statements are parsed: a whole file takes twenty times as long."""
    for statement in IMPORT.findall(text):
        with suppress(SyntaxError):
            for node in ast.parse(statement).body:
                if isinstance(node, ast.Import):
                    yield from (alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
