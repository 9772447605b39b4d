"""What a stage computes with is its key in DVC, and nothing else is: code, parameters and the
artifacts of other stages.

Oracles: the modules that Python loads, syntax trees, a table of what each parameter is for, and
stages that run with their deps alone.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import Result
from project import (
    REMOVED,
    ROOT,
    build,
    change_params,
    invoke,
    make_project,
    make_workspace,
    read_params,
    run,
    tree,
    write_params,
)
from ruamel.yaml import YAML

from pipeline_lib.core import artifacts, code, files, params
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.jobs import keys as jobs
from pipeline_lib.jobs.keys import STAGES
from pipeline_lib.recipe import names
from pipeline_lib.recipe.variants import read_all

CODE = sorted(path for folder in ("pipeline_lib", "stages") for path in (ROOT / folder).rglob("*.py"))
MODULES = sorted(path.stem for path in (ROOT / "stages").glob("*.py") if path.stem != "__init__")
# commands outside the graph
NOT_STAGES = {"convert", "costs", "environment", "plan", "preload", "submit", "unpack", "verdict"}
# the stages that depend on params.yaml as a file: every change runs them, in about a second each
ALWAYS = {"keys", "report"}


@cache
def graph() -> dict[str, Any]:
    return dict(YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"])


class Instance(NamedTuple):
    """A stage with its item put in for ``${key}`` and its like."""

    module: str
    arguments: tuple[str, ...]
    deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]


def instances(values: Mapping[str, Any]) -> dict[str, Instance]:
    """By the names that DVC gives them: ``prune@wanda``."""
    found = {}
    for stage, definition in graph().items():
        items = (
            look_up(values, definition["foreach"].strip("${}")) if "foreach" in definition else {None: None}
        )
        for key, item in items.items():
            scope = {**values, "key": key, "item": item}

            def filled(text: str, scope: Mapping[str, Any] = scope) -> str:
                return re.sub(r"\$\{([\w.]+)\}", lambda found: str(look_up(scope, found[1])), text)

            body = definition.get("do", definition)
            words = filled(body["cmd"]).replace('"', "").split()
            assert words[:2] == ["python", "-m"] and words[2].startswith("stages."), (
                "experiments run their own code only by `python -m`"
            )
            outs = [
                next(iter(out)) if isinstance(out, dict) else out
                for kind in ("outs", "plots", "metrics")
                for out in body.get(kind, [])
            ]
            found[stage if key is None else f"{stage}@{key}"] = Instance(
                words[2].removeprefix("stages."),
                tuple(words[3:]),
                tuple(map(filled, body["deps"])),
                tuple(map(filled, body.get("params", []))),
                tuple(map(filled, outs)),
            )
    return found


def look_up(values: Any, path: str) -> Any:
    for part in filter(None, path.split(".")):
        values = values[part]
    return values


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Code


@pytest.mark.parametrize("stage", sorted(graph()))
def test_a_stage_depends_on_its_code(stage: str) -> None:
    """The file that ``keys`` writes for its module holds its code and the packages; ``keys`` itself
    depends on all the code.
    """
    body = graph()[stage].get("do", graph()[stage])
    module = body["cmd"].split()[2].removeprefix("stages.")
    listed = [
        dep
        for dep in body["deps"]
        if dep.startswith(("build/keys/code", "pipeline_lib", "stages", "env.lock"))
    ]
    assert listed == (
        ["pipeline_lib", "stages", "env.lock.json"] if stage == "keys" else [f"build/keys/code/{module}.json"]
    )


def test_keys_are_written_for_the_modules_of_the_stages() -> None:
    assert sorted(STAGES) == sorted({one.module for one in instances(read_params(ROOT)).values()} - {"keys"})


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code of this checkout, to change."""
    root = tmp_path_factory.mktemp("code")
    for folder in ("pipeline_lib", "stages"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_a_digest_changes_with_the_closure_and_with_nothing_else(copied: Path, stage: str) -> None:
    """A line is added to a file that the stage may load, and to one that it may not. The digest
    does not depend on the files' directory.
    """
    inside = code.closure(stage, copied)
    outside = [path for path in sorted(copied.rglob("*.py")) if path.relative_to(copied) not in inside]
    before = code.digest(stage, copied)
    assert before == code.digest(stage, ROOT)
    for path, changes in (
        (copied / inside[len(inside) // 2], True),
        (copied / inside[-1], True),
        (outside[-1], False),
    ):
        text = path.read_text(encoding="utf-8")
        path.write_text(f"{text}\n# another line\n", encoding="utf-8")
        assert (code.digest(stage, copied) != before) == changes, path
        path.write_text(text, encoding="utf-8")
    assert code.digest(stage, copied) == before


def test_a_moved_file_changes_the_digest(tmp_path: Path) -> None:
    """Two files that swap their contents are other code. Oracle: the digest over names and bytes."""
    for root, contents in (
        (tmp_path / "a", ("x = 1\n", "x = 2\n")),
        (tmp_path / "b", ("x = 2\n", "x = 1\n")),
    ):
        for module, text in zip(("one", "two"), contents, strict=True):
            (root / "pipeline_lib").mkdir(parents=True, exist_ok=True)
            (root / "pipeline_lib" / f"{module}.py").write_text(text, encoding="utf-8")
        (root / "stages").mkdir()
        (root / "stages/__init__.py").touch()
        (root / "stages/some.py").write_text("from pipeline_lib import one, two\n", encoding="utf-8")
    assert len(code.closure("some", tmp_path / "a")) == 4
    assert code.digest("some", tmp_path / "a") != code.digest("some", tmp_path / "b")


@pytest.mark.parametrize("stage", MODULES)
def test_the_closure_is_that_of_the_syntax_trees(stage: str) -> None:
    """``code`` finds import statements in the text. Oracle: the import nodes of whole syntax trees,
    wherever they stand.
    """
    todo, seen = {ROOT / "stages" / f"{stage}.py", ROOT / "stages/__init__.py"}, set[Path]()
    while todo:
        path = todo.pop()
        seen.add(path)
        todo |= imports(path) - seen
    templates = {
        template
        for path in seen
        if "import jinja2" in path.read_text(encoding="utf-8")
        for template in path.parent.glob("*.jinja")
    }
    assert {ROOT / path for path in code.closure(stage)} == seen | templates


@cache
def imports(path: Path) -> frozenset[Path]:
    """Files of ours that a file imports by any of its nodes, with those of the packages around them."""
    found: set[Path] = set()
    for node in ast.walk(parsed(path)):
        full = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            full = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for parts in (one.split(".") for one in full if one.split(".")[0] in ("pipeline_lib", "stages")):
            around = [ROOT.joinpath(*parts[:count], "__init__.py") for count in range(1, len(parts) + 1)]
            found |= {file for file in (*around, ROOT.joinpath(*parts).with_suffix(".py")) if file.exists()}
    return frozenset(found)


# One process loads the packages once, then a fork per stage tells what of ours the stage loads.
LOAD = """
import importlib, json, os, sys
import accelerate, click, huggingface_hub, jinja2, pydantic, ruamel.yaml, safetensors.torch, torch, tqdm
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
sys.path.insert(0, os.getcwd())
for stage in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(f"stages.{stage}")
        own = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] in ("stages", "pipeline_lib")]
        print(json.dumps([stage, own]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_the_closure_is_what_python_loads() -> None:
    """Oracle: sys.modules after importing each stage. Only imports inside functions may add to the
    closure.
    """
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *MODULES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded_by_stage = dict(json.loads(line) for line in done.stdout.splitlines())
    assert sorted(loaded_by_stage) == MODULES
    for stage, paths in loaded_by_stage.items():
        files = {Path(path).relative_to(ROOT) for path in paths}
        closure = {
            path
            for path in code.closure(stage, ROOT)
            if path.suffix == ".py" and (ROOT / path).stat().st_size
        }
        assert {path for path in files if (ROOT / path).stat().st_size} <= closure
        assert closure - files <= {late for path in closure for late in late_imports(ROOT / path)}


def late_imports(path: Path) -> set[Path]:
    """Files of ours that functions of a module import, and theirs in turn."""
    todo = {
        late
        for function in ast.walk(parsed(path))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and node.module
        for late in files_of(node)
    }
    seen: set[Path] = set()
    while todo:
        late = todo.pop()
        seen.add(late)
        todo |= imports(late) - seen
    return {late.relative_to(ROOT) for late in seen}


def files_of(node: ast.ImportFrom) -> set[Path]:
    full = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return {file for one in full if (file := ROOT.joinpath(*one.split(".")).with_suffix(".py")).exists()}


def test_every_module_is_a_stage_or_a_command() -> None:
    """Oracle: the files in stages/."""
    assert {one.module for one in instances(read_params(ROOT)).values()} == set(MODULES) - NOT_STAGES


def test_no_module_is_dead() -> None:
    """Oracle: the files in pipeline_lib/."""
    reached = {str(path) for stage in MODULES for path in code.closure(stage, ROOT)}
    todo = {
        ROOT / "pipeline_lib" / path for path in ("command/main.py", "export/finetuning.py")
    }  # the wheel's entry point, and what users import
    while todo:
        path = todo.pop()
        reached.add(name(path))
        todo |= {found for found in imports(path) if name(found) not in reached}
    assert {name(path) for path in CODE if path.stat().st_size} <= reached


def test_only_code_and_templates() -> None:
    """The closure contains Python and Jinja files. Other files that the code reads from its own
    directory would not be deps.
    """
    files = [
        path for folder in ("pipeline_lib", "stages") for path in (ROOT / folder).rglob("*") if path.is_file()
    ]
    assert {path.suffix for path in files if "__pycache__" not in path.parts} <= {".py", ".jinja"}


def test_packages_are_empty() -> None:
    """An ``__init__`` with content would tie every module of its package together. That of the
    stages runs before any module of theirs, and imports nothing of ours but what tells of a
    failure.
    """
    packages = {path.parent for path in CODE} - {ROOT / "stages"}
    assert all((package / "__init__.py").read_bytes() == b"" for package in packages)
    nodes = ast.walk(parsed(ROOT / "stages" / "__init__.py"))
    assert [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names] == [
        "io",
        "os",
        "signal",
        "sys",
    ]


# Tells the policy at the moment when torch is first asked for, or after the import where it is not,
# and stops there.
WAITING = """
import importlib, os, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("torch", os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

sys.path.insert(0, os.getcwd())
sys.meta_path.insert(0, Finder)
for module in sys.argv[1:]:
    print(module, end=" ", flush=True)
    if os.fork() == 0:
        importlib.import_module(module)
        print("later", os.environ.get("OMP_WAIT_POLICY"), flush=True)
        os._exit(0)
    os.wait()
"""


def test_openmp_waits_passively() -> None:
    """libgomp reads OMP_WAIT_POLICY when torch loads it. Oracle: its value when a stage, a
    benchmark or the tests ask for torch.

    Stages ask for it only where they have something to do, so that their value counts as soon as
    they are imported.
    """
    files = (path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    others = ("__init__", "llm_compressor", "llama_continue")  # which run in other environments
    benchmarks = [f"benchmarks.{module}" for module in files if module not in others]
    stages = [f"stages.{stage}" for stage in MODULES]
    cases = (
        (None, [*stages, "tests.conftest", *benchmarks], "PASSIVE"),
        ("ACTIVE", ["stages.prune", "tests.conftest"], "ACTIVE"),
    )
    for asked, modules, policy in cases:
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        environment |= {"OMP_WAIT_POLICY": asked} if asked else {}
        command = [sys.executable, "-c", WAITING, *modules]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        told = {
            module: (when, found)
            for module, when, found in (line.split() for line in done.stdout.splitlines())
        }
        assert told.keys() == set(modules)
        assert {found for module, (when, found) in told.items() if module in stages or when == "torch"} == {
            policy
        }
        assert told["tests.conftest"][0] == "torch"


@pytest.mark.parametrize("path", [path for path in CODE if path.stat().st_size], ids=name)
def test_imports_are_static_and_absolute(path: Path) -> None:
    """All imports are absolute statements that name what they import. Oracle: the syntax tree."""
    # runs a stage's module, and imports installed ones
    starts = path == ROOT / "pipeline_lib" / "core" / "preloaded.py"
    own: set[str] = set()  # names under which whole modules of ours are known
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert all(alias.name != "*" for alias in node.names), "star import"
            taken = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            own |= {
                alias
                for alias, full in taken.items()
                if (ROOT / Path(*full.split("."))).with_suffix(".py").exists()
            }
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
            ours = [full for full in imported if full.split(".")[0] in ("pipeline_lib", "stages")]
            assert not ours, "import pipeline_lib.x: use from … import"
        else:
            continue
        dynamic = [
            full
            for full in imported
            if full.split(".")[0] in ("importlib", "runpy", "pkgutil", "imp", "zipimport")
        ]
        assert starts or [full for full in dynamic if not full.startswith("importlib.metadata")] == []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Name):
            assert node.id not in {
                "__import__",
                "exec",
                "eval",
                "compile",
                "globals",
                "vars",
                "__builtins__",
                "__loader__",
            }, node.id
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "setattr", "delattr")
        ):
            assert not (isinstance(node.args[0], ast.Name) and node.args[0].id in own), (
                f"{node.func.id} on a module of ours"
            )
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "modules"
            and isinstance(node.value, ast.Name)
            and node.value.id == "sys"
        ):
            assert starts, "sys.modules"


# Parameters


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ``keys`` alone can run, as the current directory; params.yaml is written and read as
    JSON, which is YAML, and code is not read.
    """
    directory = tmp_path / "quick"
    directory.mkdir()
    shutil.copyfile(ROOT / "env.lock.json", directory / "env.lock.json")
    monkeypatch.chdir(directory)
    monkeypatch.setattr(code, "digest", lambda stage: stage)
    monkeypatch.setattr(params, "_loaded", json.loads)
    return directory


def keys_of(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Stage -> its key but for code and other stages' artifacts: the command, the paths, declared
    params, and what ``keys`` wrote of them.

    Of the current directory with these parameters; None if they are refused.
    """
    Path("params.yaml").write_text(json.dumps(values), encoding="utf-8")
    try:
        names.check()
        parts = {f"build/keys/{place}.json": part for place, part in jobs.parts(read_all()).items()}
    except SparselineError:
        return None
    found = {}
    for stage, one in instances(values).items():
        own = {dep: parts[dep] for dep in one.deps if re.match(r"build/keys/(?!code/|prune$)", dep)}
        found[stage] = (one, {key: look_up(values, key) for key in one.params}, own)
    return {stage: key for stage, key in found.items() if stage not in ALWAYS}


def valid_keys_of(values: Mapping[str, Any]) -> dict[str, Any]:
    found = keys_of(values)
    assert found is not None
    return found


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    return {stage for stage in before.keys() | after.keys() if before.get(stage) != after.get(stage)}


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of all that is no mapping, or an empty one."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, values


def with_value(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The same with one dotted key set."""
    first, _, rest = key.partition(".")
    return {**values, first: with_value(values[first], rest, value) if rest else value}


SHIPPED = read_params(ROOT)
SHIPPED["variants"]["best"]["tasks"] = ["embedded"]  # params.yaml has this line as a comment
LEAVES = dict(leaves(SHIPPED))
# Other values that can be used, where adding one to a number, or turning a bool over, does not give one.
OTHER: dict[str, Any] = {
    "model.path": "data",
    "model.id": "org/name",
    "model.revision": "0" * 40,
    "model.include": ["*.mlp.*"],
    "model.exclude": ["*.mlp.*"],
    "*.compute_dtype": "float16",
    "model.products": "tf32",
    "prune.*.compute_dtype": "float32",
    "distil.compute_dtype": "float32",
    "distil.state_dtype": "bfloat16",
    "distil.warmup": 0.2,
    "distil.beta*": 0.5,
    "prune.reconstruction.lsq.mask_dtype": "float32",
    "texts.*.use": "neither",
    "texts.*.kind": "files",
    "texts.*.path": "data/tasks",
    "texts.*.start": "none",
    "texts.*.packing": "document",
    "texts.*.seed": 1,
    "texts.*.held_out": 0.5,
    "*.training": 4,
    "texts.*.hub": {"id": "org/name"},
    "scale.start": "eq5",
    "scale.monotone": "tanh",
    "scale.pairs": "inputs",
    "scale.shift": "mean",
    "sensitivity.estimator": "hutchinson",
    "sensitivity.distribution": "gaussian",
    "sensitivity.output_moments": "diagonal",
    "*.agreement": 0.8,
    "curves.densities": [0.5],
    "*.spectral.order": "nuclear",
    "prune.export": ["dense"],
    "prune.tasks": ["embedded"],
    "prune.quantization.bits": 4,
    "prune.quantization.group": "row",
    "prune.quantization.scales": "gguf",
    "prune.quantization.refit": [],
    "*.tolerance": 0.01,
    "*.sparsity": 0.6,
    "*.pattern": "2:4",
    "*.score": "obd",
    "*.group": "matrix",
    "variants.magnitude.selection.group": "row",
    "*.damping": 0.02,
    "*.damping_of": "diagonal",
    "*.allocation.method": "depth",
    "*.layer_sensitivity": "mean",
    "*.weighting": "trace",
    "*.temper": 0.5,
    "*.density_bounds": [0.1, 0.9],
    "*.reconstruction.steps": ["obs", "lsq"],
    "variants.fast.reconstruction.steps": ["obs", "lsq", "finetune_channels"],
    "*.statistics": "per_site",
    "variants.best.reconstruction.statistics": "per_block",
    "variants.distilled.reconstruction.statistics": "per_block",
    "variants.fast.reconstruction.statistics": "per_block",
    "*.dense_target": 0.25,
    "*.reorder": 0.5,
    "*.parts": ["biases"],
    "variants.*.induce": {"seed": 7},
    "variants.*.distil": {"seed": 7},
    "variants.*.export": ["bitmask"],
    "variants.*.tasks": ["induction"],
    "evaluate.completions.text": "validation",
    "choose.text": "test",
    "tasks.path": "data",
    "presets.*.names": ["next_line"],
    "verdict.kl": 0.5,
    "report.baseline": "wanda",
}


def other(key: str, value: Any) -> Any:
    """A value for a key that is not the one it has."""
    fitting = [pattern for pattern in OTHER if fnmatchcase(key, pattern)]
    if fitting:
        return OTHER[max(fitting, key=lambda pattern: len(pattern.replace("*", "")))]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else f"{value}x"


LOADS = (
    "prepare generate@* text@* calibrate scale sensitivity curves@* induce@* prune@* distil@* evaluate-dense"
    " evaluate@* tasks-dense export@*"
)
REFUSED = "refused"
# Which stages a key of params.yaml is for; the pattern with the most letters decides. ``best``,
# ``distilled`` and ``fast`` alone read curves, ``best`` alone is exported and has tasks, ``papers`` alone is
# induced, ``distilled`` alone is distilled.
FOR = {
    "model.path": LOADS,
    "model.id": LOADS,
    "model.revision": LOADS,
    "model.include": "prepare",
    "model.remote_code": "prepare",
    "model.dequantize": "prepare",
    "model.exclude": "prepare",
    "model.compute_dtype": "prepare generate@* calibrate curves@* induce@* prune@* distil@*",
    "model.products": "prepare calibrate curves@* induce@* prune@* distil@*",
    "texts.calibration.*": "generate@calibration text@calibration",
    "texts.validation.*": "generate@validation text@validation",
    "texts.test.*": "generate@test text@test",
    "texts.calibration.use": REFUSED,  # one text calibrates
    "texts.validation.use": REFUSED,  # `choose` names it
    "texts.test.use": REFUSED,  # `evaluate` names it
    "calibrate.*": "calibrate curves@* induce@*",
    "scale.*": "scale",
    "sensitivity.*": "sensitivity",
    "curves.*": "curves@[bdf]*",
    "induce.*": "induce@papers prune@papers",
    "distil.*": "distil@distilled",
    "prune.batch_rows": "prune@[!sf]*",
    "prune.training": "prune@*",
    "prune.export": "export@[!b]*",
    "prune.tasks": "tasks@[!b]*",
    "prune.candidate": "choose",
    "prune.quantization.*": "prune@*",
    "prune.quantization.bits": "prune@* distil@distilled",  # which trains a quantised model's scales
    "prune.selection.sparsity": "allocate@* prune@*",
    "prune.selection.pattern": "curves@[bdf]* allocate@* induce@papers prune@*",
    "prune.selection.score": "curves@[bdf]* prune@sparsegpt prune@fast prune@best prune@distilled",
    "prune.selection.group": "curves@[bdf]* induce@papers prune@[!mw]*",
    "prune.selection.*": "curves@[bdf]* induce@papers prune@*",
    "prune.allocation.*": "allocate@* prune@*",
    "prune.allocation.method": "allocate@[mws]* prune@[mws]*",
    # whose output moments only `kronecker` reads
    "prune.allocation.weighting": "sensitivity allocate@* prune@*",
    "prune.allocation.alpha": "allocate@[!bdf]* prune@[!bdf]*",
    "prune.reconstruction.*": "prune@*",
    "prune.reconstruction.steps": "prune@sparsegpt",
    "prune.reconstruction.statistics": "prune@[!bdf]*",
    "prune.reconstruction.dense_target": REFUSED,  # alone: it needs `statistics: per_site`
    "prune.reconstruction.lsq.mask_iterations": "prune@[!fbd]*",
    "prune.reconstruction.finetune.rate": "prune@[!bd]*",
    "prune.reconstruction.finetune.bias_rate": "prune@[!bd]*",
    "prune.reconstruction.finetune.epochs": "prune@[!bd]*",
    "prune.reconstruction.finetune.refresh_epochs": "prune@[!bd]*",
    "variants.*.batch_rows": "prune@*",
    "variants.*.export": "export@*",
    "variants.*.tasks": "tasks@* tasks-dense",
    "variants.*.candidate": "choose",
    "variants.*.induce": "induce@* prune@*",
    "variants.*.distil": "distil@*",
    "variants.*.selection.*": "prune@*",
    "variants.papers.selection.score": "induce@* prune@*",
    "variants.*.allocation.*": "allocate@* prune@*",
    "variants.[bdf]*.allocation.method": "curves@* allocate@* prune@*",
    "variants.*.reconstruction.*": "prune@*",
    "variants.[bdf]*.reconstruction.statistics": REFUSED,  # `dense_target` needs it
    "evaluate.*": "evaluate-dense evaluate@*",
    "tasks.*": "tasks-dense tasks@best",
    "tasks.path": "tasks-dense tasks@*",
    "presets.embedded.*": "tasks-dense tasks@best",
    "presets.*": "",
    "choose.text": "choose",
    "verdict.*": "export@best",  # whose model cards tell it
    "report.*": "",
}


def purpose(key: str) -> str:
    """What the table says of a key; below ``variants.<name>`` it speaks of that variant."""
    fitting = [pattern for pattern in FOR if fnmatchcase(key, pattern)]
    assert fitting, f"no row of the table is for {key}"
    said = FOR[max(fitting, key=lambda pattern: len(pattern.replace("*", "")))]
    return said.replace("@*", f"@{key.split('.')[1]}") if key.startswith("variants.") else said


def affected(values: Mapping[str, Any]) -> dict[str, set[str]]:
    """Leaf -> the stages whose key changes with it; ``REFUSED`` where the other value cannot be used."""
    before, found = valid_keys_of(values), {}
    for key, value in leaves(values):
        after = keys_of(with_value(values, key, other(key, value)))
        found[key] = {REFUSED} if after is None else changed(before, after)
    return found


@pytest.mark.usefixtures("quick")
def test_each_parameter_reruns_what_it_is_for() -> None:
    """Oracle: the table. Every leaf of params.yaml is changed in turn; no row of the table is
    without a key.
    """
    stages = valid_keys_of(SHIPPED)
    wanted = {}
    for key in LEAVES:
        said = purpose(key).split()
        wanted[key] = (
            {REFUSED}
            if said == [REFUSED]
            else {stage for stage in stages if any(fnmatchcase(stage, one) for one in said)}
        )
    found = affected(SHIPPED)
    assert {key: (found[key], wanted[key]) for key in LEAVES if found[key] != wanted[key]} == {}
    assert {pattern for pattern in FOR if not any(fnmatchcase(key, pattern) for key in LEAVES)} == set()


@pytest.mark.usefixtures("quick")
def test_the_order_of_sparsities_by_hand_counts() -> None:
    """The first pattern that matches wins, so that another order is another budget, and no other
    selection. Oracle: the keys.
    """
    pairs = {"*.v_proj": 0.3, "layers.0.*": 0.4}
    first, second = ({"overall": 0.5, **dict(order)} for order in (pairs.items(), reversed(pairs.items())))
    before, after = (
        valid_keys_of(with_value(SHIPPED, "variants.best.selection", {"sparsity": one}))
        for one in (first, second)
    )
    assert (
        changed(before, after) == {"allocate@best", "prune@best"} == changed(valid_keys_of(SHIPPED), before)
    )


# A variant is one edit

PER_VARIANT = ("curves", "allocate", "induce", "prune", "distil", "evaluate", "tasks", "export")
# names that DVC might read as something of its own
HAND = '{overall: 0.5, "*.v_proj": 0.3, "re:layers.0.*q_proj$": 0}'
ONE_LINE = (
    f"  extra: {{selection: {{sparsity: {HAND}, score: wanda, group: row}}, reconstruction: {{steps: []}}}}\n"
)


def stages_of_dvc(project: Path) -> set[str]:
    """The names of all stages, once DVC has found that no two write the same file and that there is
    no circle.
    """
    from dvc.repo import Repo

    with Repo(str(project)) as repo:
        repo.check_graph(stages=repo.index.stages)
        return {stage.addressing for stage in repo.index.stages}


@pytest.fixture
def tracked(quick: Path) -> Path:
    """``quick`` with git, DVC and the graph."""
    shutil.copyfile(ROOT / "dvc.yaml", quick / "dvc.yaml")
    shutil.copytree(ROOT / "data/errors", quick / "data/errors")
    run(quick, "git", "init", "--quiet")
    run(quick, "dvc", "init", "--quiet")
    return quick


@pytest.mark.parametrize("variant", SHIPPED["variants"])
def test_a_variant_is_deleted_by_one_edit(tracked: Path, variant: str) -> None:
    """Each of the shipped ones in turn, the report's baseline moved where it was that. Oracle:
    DVC's stages, and what ``keys`` writes.
    """
    left = {name: recipe for name, recipe in SHIPPED["variants"].items() if name != variant}
    baseline = SHIPPED["report"]["baseline"] if SHIPPED["report"]["baseline"] in left else next(iter(left))
    rest = instances(SHIPPED).keys() - {f"{stage}@{variant}" for stage in PER_VARIANT}
    assert (
        valid_keys_of(with_value({**SHIPPED, "variants": left}, "report.baseline", baseline)).keys()
        == rest - ALWAYS
    )
    assert stages_of_dvc(tracked) == rest
    build("keys")
    assert not list((tracked / "build/keys").glob(f"*/{variant}.json"))


def test_a_variant_is_added_by_one_line(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line in the shipped file. Oracle: DVC's stages; no other variant's key changes."""
    before = valid_keys_of(read_params(ROOT))
    written = (ROOT / "params.yaml").read_text(encoding="utf-8")
    added = re.sub(r"(?m)^(variants:.*\n)", lambda line: line[1] + ONE_LINE, written)
    assert len(added.splitlines()) == len(written.splitlines()) + 1
    after = valid_keys_of(YAML(typ="safe").load(added))
    assert changed(before, after) == {f"{stage}@extra" for stage in PER_VARIANT}
    (tracked / "params.yaml").write_text(added, encoding="utf-8")
    assert stages_of_dvc(tracked) == instances(SHIPPED).keys() | {f"{stage}@extra" for stage in PER_VARIANT}
    monkeypatch.undo()
    monkeypatch.chdir(tracked)
    shutil.copytree(ROOT / "pipeline_lib", tracked / "pipeline_lib")
    shutil.copytree(ROOT / "stages", tracked / "stages")
    build("keys")


def test_what_is_gone_from_params_is_gone_from_build(tmp_path: Path) -> None:
    """Stages read whole directories, and DVC leaves outputs of stages that are gone. A state that
    DVC's run cache knows is no exception.

    Oracle: the files, after a text and a variant came and went twice.
    """
    project = make_project(tmp_path / "project")
    values = read_params(project)
    texts, variants = values["texts"], values["variants"]
    more = values | {
        "texts": texts | {"more": texts["test"]},
        "variants": variants | {"extra": variants["wanda"]},
    }
    made = [
        project / path
        for path in (
            "build/texts/evaluate/more.safetensors",
            "build/evaluate/extra.json",
            "build/prune/extra",
        )
    ]
    for _ in range(2):
        write_params(project, more)
        run(project, "dvc", "repro", "keys")
        for path in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        write_params(project, values)
        run(project, "dvc", "repro", "keys")
        assert not [path for path in made if path.exists()]


# Version 1

RETIRED = {  # key of version 1 -> what the sentence must name instead
    "variants.*.factors": "`induce: {}` in the variant",
    "variants.*.sensitivity": "allocation",
    "variants.*.activation_budget_bytes": "SPARSELINE_ACTIVATION_BYTES",
    "induced": "`induce: {}`",
    "curved": "`curves: {…}` in the variant",
    "exported": "`export: [dense, bitmask]`",
    "export": "`prune.export`",
    "tasks.presets": "`tasks: [<preset>]`",
    "tasks.variants": "`tasks: [<preset>]`",
    "choose.candidates": "`candidate: true`",
    "prune.activation_budget_bytes": "SPARSELINE_ACTIVATION_BYTES",
    "calibrate.gram_budget_bytes": "SPARSELINE_GRAM_BYTES",
}


def refusal(values: Mapping[str, Any]) -> Result:
    """What ``keys`` says of these parameters."""
    Path("params.yaml").write_text(json.dumps(values), encoding="utf-8")
    return invoke("keys")


@pytest.mark.usefixtures("quick")
def test_keys_of_version_1_are_named_one_by_one() -> None:
    """Version 1's own params.yaml. Every key that an error names is removed or renamed in turn, as
    the error says. Oracle: the list of keys.
    """
    values = read_params(Path(__file__).parent / "data" / "version-1")
    values["variants"]["fast"]["activation_budget_bytes"] = 0  # version 1 took it there too
    told: list[str] = []
    while found := re.fullmatch(
        r"error: params\.yaml: (\S+) is no longer a key: (.*); remove it\.\n",
        (result := refusal(values)).output,
    ):
        key, instead = found.groups()
        (row,) = [row for row in RETIRED if fnmatchcase(key, row)]
        assert result.exit_code == 2 and key not in told and RETIRED[row] in instead, result.output
        told.append(key)
        *above, last = key.split(".")
        del look_up(values, ".".join(above))[last]
    assert {row for row in RETIRED if any(fnmatchcase(key, row) for key in told)} == RETIRED.keys()
    assert len(told) == 2 * len(values["variants"]) + 1 + 9
    renamed = Counter[str]()
    while found := re.fullmatch(
        r"error: params\.yaml: (\S+) has (?:the step '(\w+)', which has )?another name now: `(\w+)`.*;"
        r" rename it\.\n",
        (result := refusal(values)).output,
    ):
        key, step, now = found.groups()
        *above, last = key.split(".")
        section = look_up(values, ".".join(above))
        if step:
            section["steps"][section["steps"].index(step)] = now
        else:
            value = section.pop(last)
            section[now] = f"per_{value}" if last == "collect" else value
        renamed[step or last] += 1
    assert result.exit_code == 2
    assert renamed == {"collect": 2, "towards_dense": 2, "channel": 2, "block": 3}  # sections, then steps
    assert re.fullmatch(r"error: params\.yaml: variants\.\S+ is missing; add it\.\n", result.output), (
        result.output
    )
    values["prune"] |= {"training": 0, "export": [], "tasks": [], "candidate": False}
    values["prune"]["reconstruction"]["lsq"]["mask_dtype"] = "float32"
    values["evaluate"]["reverse_kl"] = False
    values["verdict"] = {"perplexity_ratio": None, "kl": None, "accuracy_drop": None}
    values["prune"]["quantization"]["scales"] = "checkpoint"
    result = refusal(values)
    assert result.exit_code == 0, result.output


def test_every_retired_key_has_a_row() -> None:
    assert {key.removeprefix("variants.*.") for key in RETIRED} == {*names.RENAMED, *names.PATHS}


# Stages as they run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which every stage has run: one variant needs nothing that it can do without,
    the other everything. Read only.
    """
    home = tmp_path_factory.mktemp("finished")
    workspace = make_workspace(home / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSELINE_SCRATCH", str(home / "scratch"))
        patch.chdir(workspace)
        build(
            *(" ".join((one.module, *one.arguments)) for one in in_order(instances(read_params(workspace))))
        )
    return workspace


def in_order(stages: Mapping[str, Instance]) -> Iterator[Instance]:
    """As DVC runs them: a stage after those that write below or around its deps."""
    todo = dict(stages)
    while todo:
        waiting = {out for one in todo.values() for out in one.outs}
        ready = [
            stage
            for stage, one in todo.items()
            if not any(overlap(dep, out) for dep in one.deps for out in waiting)
        ]
        assert ready, f"a circle of {', '.join(todo)}"
        yield from [todo.pop(stage) for stage in ready]


def overlap(dep: str, out: str) -> bool:
    return dep == out or dep.startswith(f"{out}/") or out.startswith(f"{dep}/")


@pytest.fixture(scope="module")
def unrelated(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Stage -> parameters in which everything is different that is not part of its key."""
    values, found = read_params(finished), {}
    directory = tmp_path_factory.mktemp("unrelated")
    shutil.copyfile(ROOT / "env.lock.json", directory / "env.lock.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(code, "digest", lambda stage: stage)
        patch.setattr(params, "_loaded", json.loads)
        before, by_leaf = valid_keys_of(values), affected(values)
        for stage in before:
            found[stage] = values
            for key, stages in by_leaf.items():
                if not {stage, REFUSED} & stages and not any(fnmatchcase(key, pattern) for pattern in ALONE):
                    found[stage] = with_value(found[stage], key, other(key, look_up(values, key)))
            assert valid_keys_of(found[stage])[stage] == before[stage]
    return found


SMALL = instances({**SHIPPED, "variants": {"wanda": {}, "sparseline": {}}})
# values that do not go with each other
ALONE = ("model.revision", "*.pattern", "prune.quantization.scales", "variants.*")


@pytest.mark.parametrize("stage", [stage for stage in SMALL if stage != "keys"])
def test_a_stage_reads_nothing_but_its_key(
    finished: Path,
    unrelated: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    """It runs again with its deps alone, and with another value of every parameter that its key
    does not hold. Oracle: its outputs' bytes.
    """
    one, project = SMALL[stage], tmp_path / "project"
    shutil.copytree(
        finished, project, ignore=lambda folder, _: ["build", "report"] if Path(folder) == finished else []
    )
    monkeypatch.chdir(project)
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(tmp_path / "scratch"))
    write_params(project, unrelated.get(stage, read_params(finished)))  # report reads all of them
    for dep in one.deps:
        if dep.startswith("build/"):
            (project / dep).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (finished / dep).is_dir() else shutil.copyfile
            copy(finished / dep, project / dep)
    build(" ".join((one.module, *one.arguments)))
    for out in one.outs:
        assert digests(project / out) == digests(finished / out), out


def digests(path: Path) -> Any:
    return tree(path) if path.is_dir() else files.sha256(path)


# What a stage that is not needed may load: what reads the command line, params.yaml and the process table.
LIGHT = {
    "click",
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_inspection",
    "typing_extensions",
    "ruamel",
    "_ruamel_yaml",
    "psutil",
}
NOT_NEEDED = {
    **{f"{stage} wanda": LIGHT for stage in ("curves", "induce", "distil", "tasks", "export")},
    "generate test": LIGHT,
    **{"keys": LIGHT, "choose": LIGHT},
    **{"allocate wanda": LIGHT | {"numpy"}, "allocate sparseline": LIGHT | {"numpy"}},
}
# Runs a stage in a fork that has loaded nothing, and tells the packages that are not Python's own.
PACKAGES = """
import contextlib, importlib, json, os, sys
sys.path.insert(0, os.getcwd())
before = set(sys.modules)
for step in sys.argv[1:]:
    if os.fork() == 0:
        stage, *arguments = step.split()
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(f"stages.{stage}").main.main(arguments, standalone_mode=False)
        files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
        new = {name for name, file in files.items() if "site-packages" in file and name not in before}
        loaded = {name.split(".")[0] for name in new}
        print(json.dumps([step, sorted(loaded)]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_a_stage_that_is_not_needed_loads_next_to_nothing(finished: Path, tmp_path: Path) -> None:
    """Above all no torch, which takes seconds. Oracle: sys.modules after the stage, against what
    reading parameters takes.
    """
    project = Path(shutil.copytree(finished, tmp_path / "project"))
    output = run(project, "python", "-c", PACKAGES, *NOT_NEEDED)
    found = {
        step: set(packages)
        for step, packages in (json.loads(line) for line in output.splitlines() if line.startswith("["))
    }
    assert found.keys() == NOT_NEEDED.keys()
    needless = {step: packages - NOT_NEEDED[step] for step, packages in found.items()}
    assert not any(needless.values()), needless


@pytest.mark.parametrize("stage", ["calibrate", "scale", "sensitivity"])
def test_what_no_variant_needs_is_not_measured(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """With the other variant gone. Oracle: every output that dvc.yaml lists, none of them a
    measurement; no record of a cost.
    """
    project = Path(shutil.copytree(finished, tmp_path / "project"))
    monkeypatch.chdir(project)
    change_params(project, "variants.sparseline", REMOVED)
    for out in (*SMALL[stage].outs, f"build/costs/{stage}.json"):
        path = project / out
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    build("keys", stage)
    assert artifacts.read_json(project / f"build/keys/{stage}.json") is None
    assert all((project / out).exists() for out in SMALL[stage].outs)
    assert not list((project / "build" / stage).rglob("*.safetensors"))
    build("curves wanda", "allocate wanda", "induce wanda", "prune wanda")
    assert tree(project / "build/prune/wanda") == tree(finished / "build/prune/wanda")


# The file


def test_the_graph_is_short() -> None:
    assert len((ROOT / "dvc.yaml").read_text(encoding="utf-8").splitlines()) < 250


@pytest.mark.parametrize("stage", sorted(graph()))
def test_stages_are_described(stage: str) -> None:
    """`dvc stage list` is the table of contents: a sentence of its own for each stage."""
    bodies = [body.get("do", body) for body in graph().values()]
    desc = graph()[stage].get("do", graph()[stage]).get("desc", "")
    assert 10 <= len(desc) <= 100
    assert [body.get("desc") for body in bodies].count(desc) == 1


def test_results_depend_on_the_packages(finished: Path) -> None:
    """Packages are no deps of their own: their versions stand beside the code's digest. Oracle:
    env.lock.json.
    """
    versions = artifacts.read_json(finished / "env.lock.json")
    for stage in STAGES:
        assert artifacts.read_json(finished / f"build/keys/code/{stage}.json") == {
            "sha256": code.digest(stage, finished),
            "versions": versions,
        }


def test_outputs_are_apart() -> None:
    """No stage writes below another's output, nothing persists, and only what git holds is outside
    the cache. Oracle: the paths.

    ``build/keys`` is outside too, since the run cache must not take the place of its stage; it is
    small and quickly made again.
    """
    paths: list[str] = []
    for body in (stage.get("do", stage) for stage in graph().values()):
        for kind in ("outs", "plots", "metrics"):
            for out in body.get(kind, []):
                path, options = next(iter(out.items())) if isinstance(out, dict) else (out, {})
                # outs without the cache, or persistent ones, switch the run cache off; metrics do
                # not, but are not pushed
                kept = kind == "plots" and set(options) == {"template", "x", "y", "title"}
                assert (
                    options == {}
                    or kept
                    or (path in ("report/summary.json", "build/keys") and options == {"cache": False})
                ), path
                paths.append(path)
    assert len(set(paths)) == len(paths)
    assert not [(a, b) for a in paths for b in paths if b.startswith(f"{a}/")]
