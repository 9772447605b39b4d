"""The shape of the house. Oracles: the syntax trees of its files; and small made-up houses that
break each rule.
"""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import ROOT

from pipeline_lib.prune.window import Window

LIBRARY = "pipeline_lib"
# Each may import those to the left of it; what is not ours is another matter.
ORDER = ("core", "masks", "solve", "models", "stats", "fit", "allocate", "measure", "recipe")
ORDER += ("prune", "induce", "texts", "evaluation", "export", "planning", "reporting", "jobs", "command")
ABOVE = ("stages", "tests", "benchmarks")  # they import the library, never the other way
PARAMETERS = 6
STAGE_LINES = 60


def packages(root: Path) -> list[str]:
    return sorted(
        path.name for path in (root / LIBRARY).iterdir() if path.is_dir() and any(path.glob("*.py"))
    )


def imported(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, inside functions too."""
    here = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def upward(root: Path) -> list[str]:
    """Imports that point up, and packages that have no place in the order."""
    found = [f"{name} has no place in the order" for name in packages(root) if name not in ORDER]
    for path in sorted((root / LIBRARY).rglob("*.py")):
        own = path.relative_to(root / LIBRARY).parts[0]
        for line, name in imported(path, root):
            first, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            ours = first == LIBRARY and own in ORDER
            if first in ABOVE or (ours and (other not in ORDER or ORDER.index(other) > ORDER.index(own))):
                found.append(f"{path.relative_to(root)}:{line} imports {name}")
    return found


def long_functions(directory: Path) -> list[str]:
    """Functions and methods with too many parameters, lambdas among them; ``self`` and ``cls`` do
    not count. Kernels take pointers and sizes only.
    """
    found = []

    def visit(node: ast.AST, path: Path, method: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                given = child.args
                named = [*given.posonlyargs, *given.args]
                bound = method and bool(named) and named[0].arg in ("self", "cls")
                count = (
                    len(named)
                    - bound
                    + len(given.kwonlyargs)
                    + (given.vararg is not None)
                    + (given.kwarg is not None)
                )
                kernel = any("triton.jit" in ast.unparse(one) for one in getattr(child, "decorator_list", ()))
                if count > PARAMETERS and not kernel:
                    name = "lambda" if isinstance(child, ast.Lambda) else child.name
                    found.append(f"{path.relative_to(directory)}:{child.lineno} {name} takes {count}")
            visit(child, path, isinstance(child, ast.ClassDef))

    for path in sorted(directory.rglob("*.py")):
        visit(ast.parse(path.read_text(encoding="utf-8")), path, False)
    return found


def long_stages(root: Path) -> list[str]:
    lines = {
        path.name: len(path.read_text(encoding="utf-8").splitlines())
        for path in sorted((root / "stages").glob("*.py"))
    }
    return [f"{name} has {count} lines" for name, count in lines.items() if count > STAGE_LINES]


def test_no_import_points_up() -> None:
    assert packages(ROOT) == sorted(ORDER)
    assert upward(ROOT) == []


@pytest.mark.parametrize("package", ORDER)
def test_no_function_takes_more_than_six_parameters(package: str) -> None:
    """``*args`` and ``**kwargs`` are one each; what a dataclass generates is no function of ours."""
    assert long_functions(ROOT / LIBRARY / package) == []


def test_a_window_is_frozen_and_small() -> None:
    """It stands in the place of what would be long lists of arguments, and must not become one."""
    assert len(dataclasses.fields(Window)) <= 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        Window(None, {}, None).model = None  # type: ignore[arg-type, misc, assignment]


def test_stages_are_thin() -> None:
    assert long_stages(ROOT) == []


# The rules themselves


def house(root: Path, **files: str) -> Path:
    """Files by path, ``__`` for a slash."""
    for name, text in files.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("from pipeline_lib.prune.window import Window\n", "pipeline_lib.prune.window.Window"),
        ("import pipeline_lib.prune.window\n", "pipeline_lib.prune.window"),
        ("from pipeline_lib import prune\n", "pipeline_lib.prune"),
        ("def late():\n    from pipeline_lib.prune import window\n", "pipeline_lib.prune.window"),
        ("class A:\n    def late(self):\n        import pipeline_lib.jobs as j\n", "pipeline_lib.jobs"),
        ("from ..prune.window import Window\n", "pipeline_lib.prune.window.Window"),
        ("from .. import prune\n", "pipeline_lib.prune"),
        ("from stages.prune import main\n", "stages.prune.main"),
        ("if True:\n    import tests.tiny\n", "tests.tiny"),
        ("from pipeline_lib.attic import old\n", "pipeline_lib.attic.old"),
    ],
)
def test_an_import_that_points_up_is_found(tmp_path: Path, text: str, name: str) -> None:
    root = house(
        tmp_path,
        pipeline_lib__solve__bad=text,
        pipeline_lib__solve__good="from pipeline_lib.masks import rule\n",
        stages__prune="",
    )
    line = next(number for number, one in enumerate(text.splitlines(), 1) if "import" in one)
    assert upward(root) == [f"pipeline_lib/solve/bad.py:{line} imports {name}"]


def test_the_core_imports_nothing_of_ours(tmp_path: Path) -> None:
    root = house(
        tmp_path,
        pipeline_lib__core__bad="import torch\nfrom pipeline_lib.masks import rule\n",
        pipeline_lib__core__good=(
            "import json\nfrom pipeline_lib.core.errors import SparselineError\nfrom .params import Params\n"
        ),
    )
    assert upward(root) == ["pipeline_lib/core/bad.py:2 imports pipeline_lib.masks.rule"]


def test_what_is_below_may_be_imported(tmp_path: Path) -> None:
    files = {
        f"pipeline_lib__{name}__a": "".join(f"import pipeline_lib.{one}.a\n" for one in ORDER[: i + 1])
        for i, name in enumerate(ORDER)
    }
    assert upward(house(tmp_path, **files)) == []


def test_a_package_without_a_place_is_found(tmp_path: Path) -> None:
    assert upward(house(tmp_path, pipeline_lib__core__a="", pipeline_lib__utils__a="")) == [
        "utils has no place in the order"
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def f(a, b, c, d, e, f, g): ...\n", "1 f takes 7"),
        ("async def f(a, b, c, /, d, e, *, f, g): ...\n", "1 f takes 7"),
        ("def f(a, b, c, d, e, *args, **kwargs): ...\n", "1 f takes 7"),
        ("def f(a, b, c, d, e, f, *, g=1, h=2): ...\n", "1 f takes 8"),
        ("class A:\n    def f(self, a, b, c, d, e, f, g): ...\n", "2 f takes 7"),
        ("class A:\n    @staticmethod\n    def f(a, b, c, d, e, f, g): ...\n", "3 f takes 7"),
        ("class A:\n    @classmethod\n    def f(cls, a, b, c, d, e, f, **g): ...\n", "3 f takes 7"),
        ("def f():\n    def g(self, a, b, c, d, e, f): ...\n", "2 g takes 7"),
        ("class A:\n    def f(self):\n        return lambda a, b, c, d, e, f, g: 0\n", "3 lambda takes 7"),
    ],
)
def test_a_function_with_seven_parameters_is_found(tmp_path: Path, text: str, told: str) -> None:
    good = "import dataclasses\n\n@dataclasses.dataclass\nclass A:\n" + "".join(
        f"    {name}: int\n" for name in "abcdefgh"
    )
    good += "    def f(self, a, b, c, d, e, *, f): ...\ndef g(a, b, c, d, *e, **f): ...\n"
    assert long_functions(house(tmp_path, bad=text, deep__good=good)) == [f"bad.py:{told}"]


def test_a_stage_of_61_lines_is_found(tmp_path: Path) -> None:
    root = house(
        tmp_path,
        stages__good="pass\n" * 60,
        stages__bad="pass\n" * 61,
        pipeline_lib__core__long="pass\n" * 500,
    )
    assert long_stages(root) == ["bad.py has 61 lines"]


# Reading

READS = {"read_text", "read_bytes", "open", "safe_open", "load_file", "fdopen"}
# Modules that open files without `core/files.py`, which opens regular ones only -> what they open
OPENED = {
    "core/artifacts.py": "files under temporary names, /proc, and safetensors behind `files.opened`",
    "core/bounded.py": "pipes and /proc",
    "core/code.py": "this code",
    "core/environment.py": "env.lock.json, when it is written",
    "core/files.py": "",
    "core/launch.py": "what a worker has written",
    "core/preloaded.py": "standard output",
    "core/process.py": "DVC's lock",
    "core/ranks.py": "/dev/null",
    "core/runtime.py": "this code, and inputs that were checked",
    "core/scratch.py": "locks",
    "export/tensorfile.py": "the file that is written",
    "models/checkpoint.py": "files that `list_files` or `Kept` has checked",
    "models/places.py": "a stage's own streams",
}


def test_files_are_opened_in_one_place() -> None:
    """A pipe or a device would be waited for otherwise. Oracle: the calls in the syntax trees."""
    found = set()
    for path in (ROOT / "pipeline_lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                method = (
                    isinstance(node.func, ast.Attribute)
                    and isinstance(node.func.value, ast.Attribute)
                    and node.func.value.attr == "moments"
                )
                if name in READS and not method:  # OutputMoments.open opens no file
                    found.add(path.relative_to(ROOT / "pipeline_lib").as_posix())
    assert found == OPENED.keys()
