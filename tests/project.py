"""A small copy of the project to run: this checkout's code and graph, a tiny random model, three
short texts, small numbers.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from ruamel.yaml import YAML
from tiny import make_model

from pipeline_lib.core import seals
from pipeline_lib.core.params import merge
from pipeline_lib.core.preloaded import PLACE
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.recipe.settings import Recipe

ROOT = Path(__file__).parent.parent
COPIED = (
    "pipeline_lib",
    "stages",
    "dvc.yaml",
    "env.lock.json",
    ".dvcignore",
    ".gitignore",
    "data/tasks",
    "data/stdlib.json",
    "data/errors",
)
FIT = {"epochs": 2, "batch_rows": 4, "patience": 2}
WANDA = {
    "selection": {"score": "wanda", "group": "row"},
    "reconstruction": {"steps": []},
}
SPARSELINE = {  # every stage has something to do
    "induce": {},
    "selection": {"score": "obs", "group": "block"},
    "allocation": {"method": "predicted", "alpha": 0.15},
    "reconstruction": {"steps": ["obs", "finetune_channels"]},
    "export": ["dense", "bitmask"],
    "distil": {},
    "tasks": ["embedded"],
    "candidate": True,
}
SMALL: dict[str, Any] = {
    "model": {"path": "data/model", "id": None, "revision": None},
    "calibrate": {"batch_rows": 4, "median_tokens": 64},
    "sensitivity": {"probes": 2, "rows_per_probe": 2, "probes_per_pass": 2},
    "curves": {"densities": [0.3, 0.6]},
    "induce": {"steps": 4, "check_every": 2},
    "prune": {
        "batch_rows": 4,
        "selection": {"block": 16},
        "reconstruction": {"finetune_channels": FIT, "finetune": FIT},
    },
    "distil": {"epochs": 2, "rate": 0.01},
    "evaluate": {
        "batch_rows": 4,
        "completions": {"text": "test", "count": 1, "prompt_tokens": 8, "new_tokens": 4},
    },
    "tasks": {"batch_rows": 4},
    "presets": {"embedded": {"names": ["corrupted"], "limit": 4}},
    "report": {"baseline": "wanda"},
}
REMOVED = object()  # in the place of a value: take the key away
VARIANTS: dict[str, Any] = {"wanda": WANDA | {"candidate": True}, "sparseline": SPARSELINE}


def text(seed: int, words: int = 400) -> str:
    """Sentences of made-up words; no two seeds share a sentence."""
    draw = random.Random(seed)
    vocabulary = [
        "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(60)
    ]
    return " ".join(draw.choice(vocabulary) + draw.choice(["", "", "", ".\n"]) for _ in range(words))


def texts(shipped: Mapping[str, Any], rows: int = 8, length: int = 32) -> dict[str, Any]:
    """The shipped three texts, read from ``data/texts/<name>.txt``."""
    small = {"kind": "files", "name": None, "glob": None, "rows": rows, "length": length, "training": 0}
    return {name: {**one, **small, "path": f"data/texts/{name}.txt"} for name, one in shipped.items()}


@cache
def shipped_params() -> Any:
    return YAML(typ="safe").load(ROOT / "params.yaml")


def recipe(steps: Sequence[str] = (), **changes: Any) -> Recipe:
    """What section ``prune`` says with these steps, and with ``changes`` laid over it; nothing is induced."""
    values = merge(
        merge(shipped_params()["prune"], {"reconstruction": {"steps": list(steps)}}),
        {"induce": None} | changes,
    )
    return Recipe.model_validate({name: values[name] for name in Recipe.model_fields})


def make_workspace(directory: Path, *, model: Mapping[str, Any] | None = None, **overrides: Any) -> Path:
    """What the stages need, without git and DVC.

    Args:
        model: arguments of ``make_model`` (``family``, ``layers``, config overrides).
        overrides: sections of params.yaml, laid over the small ones; ``variants`` replaces theirs.
            Those of version 1 are understood.
    """
    for name in COPIED:
        source, copy = ROOT / name, directory / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, copy)
    make_model(
        directory / "data" / "model",
        **{"family": "llama", "layers": 2, "max_position_embeddings": 4096, **(model or {})},
    )
    shipped = shipped_params()
    (directory / "data" / "texts").mkdir()
    for seed, name in enumerate(shipped["texts"]):
        (directory / "data" / "texts" / f"{name}.txt").write_text(text(seed), encoding="utf-8")
    values = merge(merge(shipped, SMALL), {"texts": texts(shipped["texts"])})
    overrides = {"variants": VARIANTS} | of_version_1(overrides)
    write_params(directory, merge(values, overrides) | {"variants": overrides["variants"]})
    return directory


def of_version_1(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides in which variants name artifacts, and lists name variants, as this version writes
    them: reproducers of old reports do that.
    """
    lists = {name: overrides[name] for name in ("induced", "curved", "exported") if name in overrides}
    found = {name: value for name, value in overrides.items() if name not in lists}
    if "activation_budget_bytes" in found.get("prune", {}):  # a setting now
        found["prune"] = dict(found["prune"])
        os.environ["SPARSELINE_ACTIVATION_BYTES"] = str(found["prune"].pop("activation_budget_bytes"))
    if not lists:
        return found
    found["tasks"] = {
        key: value for key, value in found.get("tasks", {}).items() if key not in ("variants", "presets")
    }
    found["choose"] = {key: value for key, value in found.get("choose", {}).items() if key != "candidates"}
    measured, candidates = (
        overrides.get("tasks", {}).get("variants", []),
        overrides.get("choose", {}).get("candidates", []),
    )
    found["variants"] = {}
    for name, variant in overrides["variants"].items():
        own = {key: value for key, value in variant.items() if key not in ("factors", "sensitivity")}
        own |= {"induce": lists["induced"][name]} if name in lists.get("induced", {}) else {}
        own |= {"export": ["dense", "bitmask"]} if name in lists.get("exported", {}) else {}
        own |= {"tasks": ["embedded"]} if name in measured else {}
        found["variants"][name] = own | ({"candidate": True} if name in candidates else {})
    return found


def make_project(directory: Path, *, model: Mapping[str, Any] | None = None, **overrides: Any) -> Path:
    """A workspace with everything committed and DVC set up; the cache and DVC's own files are
    beside it, so that copies share them.
    """
    make_workspace(directory, model=model, **overrides)
    run(directory, "git", "init", "--quiet", "--initial-branch", "main")
    for key, value in {
        "user.name": "test",
        "user.email": "test@localhost",
        "commit.gpgsign": "false",
    }.items():
        run(directory, "git", "config", key, value)
    run(directory, "dvc", "init", "--quiet")
    beside = directory.parent / f"{directory.name}.dvc"
    config = f"""[core]
    analytics = false
    check_update = false
    site_cache_dir = {beside / "site"}
[cache]
    dir = {beside / "cache"}
"""
    (directory / ".dvc" / "config").write_text(config, encoding="utf-8")
    shutil.copytree(ROOT / ".dvc" / "plots", directory / ".dvc" / "plots")
    commit(directory)
    return directory


def commit(project: Path) -> None:
    run(project, "git", "add", "--all")
    run(project, "git", "commit", "--quiet", "--message", "state")


def environment(project: Path) -> dict[str, str]:
    """One thread, this Python first on PATH, modules from the project itself, scratch beside it."""
    own = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "SPARSELINE_THREADS": "1",
        "SPARSELINE_SCRATCH": str(project.parent / "scratch"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "DVC_NO_ANALYTICS": "1",
    }
    dropped = {"PYTHONPATH", "SPARSELINE_DEVICE", "DVC_ROOT", "DVC_STAGE"}
    dropped |= {
        "PYTEST_CURRENT_TEST",
        "TORCHINDUCTOR_CACHE_DIR",
        "HF_XET_HIGH_PERFORMANCE",
    }  # which pytest, torch and lm-eval set on the way
    return {key: value for key, value in os.environ.items() if key not in dropped} | own


@contextmanager
def moved(directory: Path, environ: Mapping[str, str]) -> Iterator[None]:
    """Another current directory and environment."""
    here, before = Path.cwd(), dict(os.environ)
    os.chdir(directory)
    os.environ |= environ
    try:
        yield
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ |= before


_servers: list[subprocess.Popen[str]] = []  # as long as it is here, its standard input is open


def preloaded(**more: str) -> dict[str, str]:
    """What a stage's process needs in its environment to be run by a fork of one that has torch
    imported: seconds less for each. ``more`` is in the environment of that one.
    """
    return _preloaded(frozenset((environment(ROOT) | more).items()))


@cache
def _preloaded(environ: frozenset[tuple[str, str]]) -> dict[str, str]:
    """A server per environment: libraries set variables on the way, and forks are for equal ones only."""
    # which ends when these tests' process does
    command = ("python", "-m", "stages.preload", "sh", "-c", f"echo ${PLACE}; exec cat")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen(
        command, cwd=ROOT, env=dict(environ), text=True, start_new_session=True, **pipes
    )
    _servers.append(server)
    assert server.stdout
    return {PLACE: server.stdout.readline().strip()}


def run(project: Path, *command: str, code: int = 0) -> str:
    """A command's standard output and error together; it must end with ``code``. Its stages are
    forks, where the environment allows it.
    """
    environ = environment(project) | preloaded()
    done = subprocess.run(
        command,
        cwd=project,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == code, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def start(workspace: Path, *command: str, **settings: str) -> subprocess.Popen[str]:
    """A command whose output is a pipe, in a session of its own."""
    environ = environment(workspace) | settings
    return subprocess.Popen(
        command,
        cwd=workspace,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def scratch(workspace: Path) -> Path:
    return workspace.parent / "scratch"


def holder(workspace: Path, process: subprocess.Popen[str], stage: str = "prune") -> int:
    """The number of the process that holds the only key, once there is one; ``process`` is to bring
    it about.
    """
    while process.poll() is None:
        for lock in scratch(workspace).glob(f"{stage}/*.lock"):
            with suppress(ValueError):  # not written yet
                return int(json.loads(lock.read_text(encoding="utf-8"))["pid"])
        time.sleep(0.02)
    raise AssertionError(f"nobody holds a key: {process.communicate()[0]}")


def invoke(stage: str, *arguments: str) -> Result:
    """A stage in this process, in the current directory. Before `induce` and `prune`, a missing
    allocation is made, and before what measures a model its training: reproducers of old reports do
    not know them.
    """
    if (
        stage in ("induce", "prune")
        and Path("build/prepare").exists()
        and not Path(f"build/allocate/{arguments[0]}.json").exists()
    ):
        done = invoke("allocate", *arguments)
        if done.exit_code:
            return done
    if (
        stage in ("evaluate", "tasks", "export")
        and arguments[0] != "dense"
        and not Path(f"build/distil/{arguments[0]}").exists()
    ):
        done = invoke("distil", *arguments)
        if done.exit_code:
            return done
    return CliRunner().invoke(import_module(f"stages.{stage}").main, arguments, catch_exceptions=True)


def build(*steps: str) -> None:
    """Stages in this process, in the current directory, as ``"prune wanda"``; each must end well."""
    for step in steps:
        result = invoke(*step.split())
        assert result.exit_code == 0, f"{step}: {result.output} {result.exception!r}"


def read_params(project: Path) -> Any:
    return YAML(typ="safe").load(project / "params.yaml")


def write_params(project: Path, values: Mapping[str, Any]) -> None:
    with (project / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(dict(values), file)


def change_params(project: Path, key: str, value: Any) -> None:
    """Set one dotted key; ``REMOVED`` takes it away."""
    values = read_params(project)
    *path, last = key.split(".")
    section = values
    for part in path:
        section = section[part]
    if value is REMOVED:
        del section[last]
    else:
        section[last] = value
    write_params(project, values)


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(value) or value), encoding="utf-8")


def change_artifact(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON artifact below ``build/``, and seal it again, as if its stage had written that."""
    workspace = _owner(path)
    value = workspace.load(path)
    workspace.save(path, change(value) or value)


def load_artifact(path: Path) -> dict[str, Any]:
    """A JSON artifact below ``build/``, without its seal."""
    return _owner(path).load(path)


def adopt(project: Path) -> None:
    """Seal all that is in ``build/`` again, as if it had been made for the model that `prepare` saw last."""
    build = project / "build"
    model = seals.parse_json((build / "prepare/model.json").read_bytes(), "build/prepare/model.json")[1].model
    for path in build.rglob("*"):
        old, new = Workspace(project), Workspace(project)
        new.made_for(model, path)
        if path.suffix == ".safetensors" and path.parent.parent.name == "texts":
            new.save_tensors(path, *old.load_tensors(path))
        elif (
            path.suffix == ".json"
            and path.parent.name not in ("checkpoint", "costs")
            and '"seal":' in path.read_text(encoding="utf-8")
        ):
            new.save(path, old.load(path))


def _owner(path: Path) -> Workspace:
    return Workspace(path.parents[path.parts[::-1].index("build")])


def tree(directory: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file below a directory."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def results(project: Path) -> dict[str, str]:
    """``tree`` of what DVC tracks below build/ and report/: all but the records of cost, which
    differ from run to run.
    """
    found = {
        f"{folder}/{path}": digest
        for folder in ("build", "report")
        for path, digest in tree(project / folder).items()
    }
    return {
        path: digest
        for path, digest in found.items()
        if not path.startswith(("build/costs/", "report/costs.js"))
    }
