"""The import closure of every stage, and its declared deps in dvc.yaml: ``python -m tests.graph`` rewrites the latter.

A dep is a package of the library as a directory: DVC reads its lock file before and after every stage, and a list of modules made it long.
"""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
OWN = ("pipeline_lib", "stages")
COMMAND = re.compile(r"cmd: python -m stages\.(\w+)")


@cache
def _imports(path: Path) -> frozenset[Path]:
    """Modules of ours that a module imports, with the packages' __init__ files."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in OWN:
                module = ROOT / Path(*name.split("."))
                found |= {candidate for candidate in (module.with_suffix(".py"), module / "__init__.py") if candidate.exists()}
                found |= {
                    parent / "__init__.py" for parent in module.parents if ROOT in parent.parents and (parent / "__init__.py").exists()
                }
    return frozenset(found)


@cache
def closure(stage: str) -> list[str]:
    """Every file of ours that running ``python -m stages.<stage>`` reads as code, relative to the root; templates included."""
    todo, seen = {ROOT / "stages" / f"{stage}.py", ROOT / "stages" / "__init__.py"}, set()
    while todo:
        path = todo.pop()
        seen.add(path)
        todo |= _imports(path) - seen
    files = {path for path in seen if path.stat().st_size}  # empty __init__ files cannot change anything
    files |= {
        template
        for folder in {path.parent for path in seen if "import jinja2" in path.read_text(encoding="utf-8")}
        for template in folder.glob("*.jinja")
    }
    return sorted(str(path.relative_to(ROOT)) for path in files)


def deps(stage: str) -> list[str]:
    """What dvc.yaml lists of the closure: the packages that it touches, and the stage's own file."""
    files = [Path(path) for path in closure(stage)]
    return sorted({str(path.parent if path.parts[0] == "pipeline_lib" else path) for path in files})


def rewrite(text: str) -> str:
    """dvc.yaml with every stage's code deps replaced by ``deps``, first in ``deps``."""
    out = []
    for block in re.split(r"\n(?=  \w)", text):
        if module := COMMAND.search(block):
            lines = [line for line in block.split("\n") if not re.match(r"\s*- (pipeline_lib|stages)/", line)]
            at = next(i for i, line in enumerate(lines) if line.strip() == "deps:")
            indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
            lines[at + 1 : at + 1] = [f"{indent}- {path}" for path in deps(module[1])]
            block = "\n".join(lines)
        out.append(block)
    return "\n".join(out)


if __name__ == "__main__":
    path = ROOT / "dvc.yaml"
    path.write_text(rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
