"""dvc.yaml declares all that the code reads: changing a line or a knob reruns what depends on it, and nothing else.

Oracles: the code's own syntax trees against the declarations in dvc.yaml and params.yaml.
"""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from graph import ROOT, closure, deps, rewrite
from ruamel.yaml import YAML

CODE = sorted(path for folder in ("pipeline_lib", "stages") for path in (ROOT / folder).rglob("*.py"))
MODULES = sorted(path.stem for path in (ROOT / "stages").glob("*.py") if path.stem != "__init__")
NOT_STAGES = {"convert", "costs", "environment", "plan", "unpack"}  # commands outside the graph
# (stage, section): loaded by the module, but not on the way that this stage takes through it
OTHER_WAY = {("evaluate", "model"), ("tasks", "model")}  # the source is read for `dense` only


@cache
def read(name: str) -> Any:
    return YAML(typ="safe").load(ROOT / name)


@cache
def stages() -> dict[str, dict[str, Any]]:
    """Stage name -> its definition; of a foreach stage, the definition under ``do``."""
    return {name: stage.get("do", stage) for name, stage in read("dvc.yaml")["stages"].items()}


def module(stage: dict[str, Any]) -> str:
    match = re.fullmatch(r"python -m stages\.(\w+)( \S+)*", stage["cmd"])
    assert match, f"a stage runs `python -m stages.<module> [variant]`, so that experiments run their own code, not {stage['cmd']!r}"
    return match[1]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("stage", sorted(stages()))
def test_code_deps_are_the_import_closure(stage: str) -> None:
    """Oracle: the packages of the closure over import statements. Mend with `make deps`."""
    declared = [dep for dep in stages()[stage]["deps"] if dep.startswith(("pipeline_lib", "stages"))]
    assert declared == deps(module(stages()[stage]))


def test_rewriting_changes_nothing_else() -> None:
    """Oracle: dvc.yaml itself, whose code deps are in order, and every other value in it after they were taken away."""
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    assert rewrite(text) == text
    bare = "\n".join(line for line in text.split("\n") if not re.match(r"\s*- (pipeline_lib|stages)/", line))
    assert rewrite(bare) == text


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
    """Oracle: sys.modules after importing each stage. Only imports inside functions may add to the closure."""
    done = subprocess.run([sys.executable, "-c", LOAD, *MODULES], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded_by_stage = dict(json.loads(line) for line in done.stdout.splitlines())
    assert sorted(loaded_by_stage) == MODULES
    for stage, paths in loaded_by_stage.items():
        files = {name(Path(path)) for path in paths if Path(path).stat().st_size}
        code = {path for path in closure(stage) if path.endswith(".py")}
        assert files <= code
        assert code - files <= {late for path in code for late in late_imports(ROOT / path)}


def late_imports(path: Path) -> Iterator[str]:
    """Files of ours that functions of a module import, and theirs in turn."""
    for function in ast.walk(tree(path)):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pipeline_lib"):
                    late = ROOT / Path(*node.module.split(".")).with_suffix(".py")
                    yield name(late)
                    yield from late_imports(late)


def test_every_stage_module_is_a_stage() -> None:
    """Oracle: the files in stages/."""
    assert {module(stage) for stage in stages().values()} == set(MODULES) - NOT_STAGES


def test_no_module_is_dead() -> None:
    """Oracle: the files in pipeline_lib/."""
    reached = {path for stage in MODULES for path in closure(stage)}
    assert {name(path) for path in CODE if path.stat().st_size} <= reached


def test_only_code_and_templates() -> None:
    """The closure knows of Python and Jinja files; whatever else the code read from beside itself would be no dep."""
    files = [path for folder in ("pipeline_lib", "stages") for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert {path.suffix for path in files if "__pycache__" not in path.parts} <= {".py", ".jinja"}


def test_packages_are_empty() -> None:
    """An ``__init__`` with content would tie every module of its package together. That of the stages runs before any module of theirs,
    and imports nothing of ours.
    """
    packages = {path.parent for path in CODE} - {ROOT / "stages"}
    assert all((package / "__init__.py").read_bytes() == b"" for package in packages)
    imported = [
        alias.name for node in ast.walk(tree(ROOT / "stages" / "__init__.py")) if isinstance(node, ast.Import) for alias in node.names
    ]
    assert imported == ["os", "sys"]


# Tells the policy at the moment when torch is first asked for, and stops there.
WAITING = """
import importlib, os, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

sys.path.insert(0, os.getcwd())
sys.meta_path.insert(0, Finder)
for module in sys.argv[1:]:
    print(module, end=" ", flush=True)
    if os.fork() == 0:
        importlib.import_module(module)
        print("no torch", flush=True)
        os._exit(0)
    os.wait()
"""


def test_openmp_waits_passively() -> None:
    """libgomp reads OMP_WAIT_POLICY when torch loads it. Oracle: its value when a module of a stage, a benchmark or the tests asks for torch."""
    benchmarks = [
        f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in ("__init__", "llm_compressor")
    ]
    modules = [*(f"stages.{stage}" for stage in MODULES), *benchmarks, "tests.conftest"]
    for own, policy in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | (
            {"OMP_WAIT_POLICY": own} if own else {}
        )
        done = subprocess.run(
            [sys.executable, "-c", WAITING, *modules], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
        assert told.keys() == set(modules)
        assert {module for module, said in told.items() if said == "no torch"} <= {"stages.environment"}
        assert set(told.values()) - {"no torch"} == {policy}


@pytest.mark.parametrize("path", [path for path in CODE if path.stat().st_size], ids=name)
def test_imports_are_static_and_absolute(path: Path) -> None:
    """Nothing is imported but by an absolute import statement that names what it takes. Oracle: the syntax tree."""
    own: set[str] = set()  # names under which whole modules of ours are known
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert all(alias.name != "*" for alias in node.names), "star import"
            taken = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            own |= {alias for alias, full in taken.items() if (ROOT / Path(*full.split("."))).with_suffix(".py").exists()}
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
            assert not any(full.split(".")[0] in ("pipeline_lib", "stages") for full in imported), (
                "import pipeline_lib.x: use from … import"
            )
        else:
            continue
        dynamic = [full for full in imported if full.split(".")[0] in ("importlib", "runpy", "pkgutil", "imp", "zipimport")]
        assert [full for full in dynamic if not full.startswith("importlib.metadata")] == []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Name):
            assert node.id not in {"__import__", "exec", "eval", "compile", "globals", "vars", "__builtins__", "__loader__"}, node.id
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "delattr"):
            assert not (isinstance(node.args[0], ast.Name) and node.args[0].id in own), f"{node.func.id} on a module of ours"
        if isinstance(node, ast.Attribute) and node.attr == "modules" and isinstance(node.value, ast.Name) and node.value.id == "sys":
            assert path == ROOT / "pipeline_lib" / "core" / "runtime.py", "sys.modules (runtime.resume_key hashes the loaded code)"


SECTIONS = {"load": (1,), "section": (0,), "merged": (0, 1)}  # functions of pipeline_lib.core.params: which arguments name sections


@cache
def loaded(path: Path) -> set[str]:
    """Sections of params.yaml that a module asks for: ``params.load(Model, "name")``, ``params.section(f"texts.{name}")``, ``*`` for parts."""
    nodes = list(ast.walk(tree(path)))
    constants = {n.targets[0].id: n.value for n in nodes if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}
    found = set()
    for node in nodes:
        function = node.func if isinstance(node, ast.Call) else None
        if not (isinstance(node, ast.Call) and isinstance(function, ast.Attribute) and ast.unparse(function.value) == "params"):
            continue
        for position in SECTIONS.get(function.attr, ()):
            argument = node.args[position]
            argument = constants.get(argument.id, argument) if isinstance(argument, ast.Name) else argument
            if isinstance(argument, ast.Constant):
                found.add(str(argument.value))
            else:
                assert isinstance(argument, ast.JoinedStr), f"{name(path)}: sections are named by literals, not {ast.unparse(argument)}"
                found.add("".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in argument.values))
    return found


def wanted(stage: str) -> set[str]:
    files = [ROOT / path for path in closure(module(stages()[stage])) if path.endswith(".py") and path != "pipeline_lib/core/params.py"]
    return {section for path in files for section in loaded(path)} - {section for other, section in OTHER_WAY if other == stage}


def declared(stage: str) -> set[str]:
    return {re.sub(r"\$\{[\w.]+\}", "*", key) for key in stages()[stage]["params"]}


@pytest.mark.parametrize("stage", sorted(stages()))
def test_loaded_sections_are_declared(stage: str) -> None:
    """A section that the stage's code loads is in its params: itself, what holds it, or the keys of it that matter here."""
    for section in wanted(stage):
        fits = [key for key in declared(stage) if key == section or section.startswith(f"{key}.") or key.startswith(f"{section}.")]
        assert fits, f"{stage} loads {section}, but declares only {sorted(declared(stage))}"


@pytest.mark.parametrize("stage", sorted(stages()))
def test_declared_params_are_loaded(stage: str) -> None:
    """A declared key that no code of the stage loads would rerun it for nothing."""
    for key in declared(stage):
        assert any(key == section or key.startswith(f"{section}.") or section.startswith(f"{key}.") for section in wanted(stage)), key


@pytest.mark.parametrize("stage", sorted(stages()))
def test_keys_of_the_model(stage: str) -> None:
    """Every stage that opens the source declares where it is; the dtype of forward passes belongs to those that stream it.

    ``include`` and ``exclude`` reach the later stages through build/prepare/matrices.json. Oracle: who calls ``open_model``.
    """
    keys = {key for key in stages()[stage]["params"] if key.split(".")[0] == "model"}
    if "model" not in wanted(stage):
        assert not keys
    elif stage == "prepare":
        assert keys == {"model"}
    else:
        own = tree(ROOT / "stages" / f"{module(stages()[stage])}.py")
        streams = any(isinstance(node, ast.Name) and node.id == "open_model" for node in ast.walk(own))
        assert keys == {"model.path", "model.id", "model.revision"} | ({"model.compute_dtype"} if streams else set())


@pytest.mark.parametrize("stage", sorted(stages()))
def test_declared_params_exist(stage: str) -> None:
    """Oracle: params.yaml, with every item of the foreach or matrix put in for ``${key}`` and its like."""
    values, definition = read("params.yaml"), read("dvc.yaml")["stages"][stage]

    def value(path: str) -> Any:
        found = values
        for part in path.strip("${}").split("."):
            assert part in found, path
            found = found[part]
        return found

    axes = {f"item.{name}": items for name, items in definition.get("matrix", {}).items()}
    axes |= {name: definition["foreach"] for name in ("key", "item") if "foreach" in definition}
    for key in definition.get("do", definition)["params"]:
        used = [name for name in axes if f"${{{name}}}" in key]
        assert len(used) < 2
        for item in value(axes[used[0]]) if used else [""]:
            value(key.replace(f"${{{used[0]}}}", item) if used else key)


@pytest.mark.parametrize("stage", sorted(stages()))
def test_stages_are_described(stage: str) -> None:
    """`dvc stage list` is the table of contents: a sentence of its own for each stage."""
    desc = stages()[stage].get("desc", "")
    assert 10 <= len(desc) <= 100
    assert [other.get("desc") for other in stages().values()].count(desc) == 1


@pytest.mark.parametrize("stage", sorted(stages()))
def test_numeric_stages_depend_on_the_packages(stage: str) -> None:
    """Packages are no deps of their own: env.lock.json stands for them wherever torch computes."""
    assert ("env.lock.json" in stages()[stage]["deps"]) == (stage not in ("check", "choose", "report"))


def test_outputs_are_apart() -> None:
    """No stage writes below another's output, nothing persists, and only what git holds is outside the cache. Oracle: the paths."""
    paths: list[str] = []
    for stage in stages().values():
        for kind in ("outs", "plots", "metrics"):
            for out in stage.get(kind, []):
                path, options = next(iter(out.items())) if isinstance(out, dict) else (out, {})
                # outs without the cache, or persistent ones, would switch the run cache off; metrics do not, but are not pushed
                kept = kind == "plots" and set(options) == {"template", "x", "y", "title"}
                assert options == {} or kept or (path == "report/summary.json" and options == {"cache": False}), path
                paths.append(path)
    assert len(set(paths)) == len(paths)
    assert not [(a, b) for a in paths for b in paths if b.startswith(f"{a}/")]
