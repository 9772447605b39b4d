"""Experiments: what a queue computes, and what DVC shows of the results. Oracles: DVC's logs and
its own table, git.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import chdir, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from dvc.utils.hydra import apply_overrides, get_hydra_sweeps
from project import ROOT, WANDA, build, commit, environment, make_project, preloaded, read_params, run, tree
from ruamel.yaml import YAML

from pipeline_lib.core import params
from pipeline_lib.recipe.variants import read_all
from pipeline_lib.texts.texts import TextParams

# the second changes something upstream, in both runs alike
SWEEP = ("-S", "prune.selection.sparsity=0.4,0.6", "-S", "texts.test.rows=7")
VARIANTS = YAML(typ="safe").load(ROOT / "params.yaml")["variants"]
KEYS = {"keys"}  # every run's own
SHARED = {"generate@test", "text@test", "evaluate-dense"}
OWN = {
    *(f"{stage}@wanda" for stage in ("allocate", "induce", "prune", "distil", "evaluate", "tasks", "export")),
    "choose",
    "report",
}


class Swept(NamedTuple):
    project: Path
    names: list[str]  # of the experiments, in the order of the queue


def experiments(project: Path) -> list[str]:
    refs = run(
        project, "git", "for-each-ref", "--sort=committerdate", "--format=%(refname)", "refs/exps"
    ).split()
    return [ref.split("/")[-1] for ref in refs if re.match(r"refs/exps/[0-9a-f]{2}/", ref)]


def works(pid: int) -> bool:
    """Whether the process is still a worker of a queue."""
    with suppress(OSError):
        return b"queue-worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def stop(project: Path, seconds: float = 60) -> None:
    """End the queue's worker, by its own means and then by force."""
    run(project, "dvc", "queue", "stop", "--kill")
    deadline = time.monotonic() + seconds
    for record in (project / ".dvc" / "tmp" / "exps" / "celery").rglob("dvc-exp-worker-*.json"):
        pid = json.loads(record.read_text(encoding="utf-8"))["pid"]
        while works(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        if works(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    """A project at 50%, and a queue of two experiments that has ended."""
    variants = {"wanda": WANDA | {"candidate": True}}
    project = make_project(tmp_path_factory.mktemp("experiments") / "project", variants=variants)
    with chdir(project):
        build(
            "keys",
            "prepare",
            *(f"{stage} {name}" for name in read_params(project)["texts"] for stage in ("generate", "text")),
        )
        build("calibrate", "scale", "sensitivity")
        build(
            *(
                f"{stage} wanda"
                for stage in ("curves", "allocate", "induce", "prune", "distil", "evaluate", "tasks")
            )
        )
        build("evaluate dense", "tasks dense", "export wanda", "choose", "report")
    run(project, "dvc", "commit", "--force")
    commit(project)
    run(project, "dvc", "exp", "run", "--queue", *SWEEP)
    # a pipe would stay open as long as the worker
    with (project.parent / "log").open("w", encoding="utf-8") as log:
        subprocess.run(
            ("dvc", "queue", "start"),
            cwd=project,
            env=environment(project) | preloaded(),
            stdout=log,
            stderr=log,
            timeout=60,
            check=True,
        )
    try:
        deadline = time.monotonic() + 900  # a busy machine takes minutes; a failed run is told at once
        while len(names := experiments(project)) < 2:
            assert "refs/exps/celery/failed" not in run(project, "git", "for-each-ref"), run(
                project, "dvc", "queue", "status"
            )
            assert time.monotonic() < deadline, run(project, "dvc", "queue", "status")
            time.sleep(0.5)
    finally:
        stop(project)
    yield Swept(project, names)


def test_queued_runs_compute_nothing_twice(swept: Swept) -> None:
    """What HEAD has is not run, what the runs have in common is run by the first alone. Oracle:
    DVC's logs.
    """
    first, second = (run(swept.project, "dvc", "queue", "logs", name) for name in swept.names)
    ran, restored = (
        re.compile(pattern) for pattern in (r"Running stage '([^']+)'", r"Stage '([^']+)' is cached")
    )
    assert sorted(ran.findall(first)) == sorted(KEYS | SHARED | OWN) and restored.findall(first) == []
    assert (
        KEYS | {"allocate@wanda", "prune@wanda", "evaluate@wanda", "report"}
        <= set(ran.findall(second))
        <= KEYS | OWN
    )
    assert SHARED <= set(restored.findall(second)) <= SHARED | {"choose"}


def test_dvc_shows_the_figures_of_all_runs(swept: Swept) -> None:
    """`dvc exp show` has metrics and what was changed; `dvc plots diff` draws perplexity over
    sparsity. Oracle: the files that git keeps.
    """
    shown = json.loads(run(swept.project, "dvc", "exp", "show", "--json"))
    head = next(revision for revision in shown if revision["name"] == "main")
    revisions = {one["revs"][0]["name"]: one["revs"][0] for one in head["experiments"]} | {"main": head}
    assert set(revisions) == {"main", *swept.names}
    drawn = run(
        swept.project,
        "dvc",
        "plots",
        "diff",
        *revisions,
        "--targets",
        "report/perplexity.json",
        "--show-vega",
    )
    points = json.loads(drawn)["data"]["values"]
    found = {
        (one["rev"], one["variant"], one["text"]): (one["sparsity"], round(one["perplexity"], 6))
        for one in points
    }
    expected = {}
    for name, sparsity in zip(["main", *swept.names], (0.5, 0.4, 0.6), strict=True):
        data = revisions[name]["data"]
        assert data["params"]["params.yaml"]["data"]["prune"]["selection"]["sparsity"] == sparsity
        summary = json.loads(
            run(swept.project, "git", "show", f"{revisions[name]['rev']}:report/summary.json")
        )
        assert data["metrics"]["report/summary.json"]["data"] == summary
        assert summary["wanda"]["sparsity"] == sparsity
        for variant, model in summary.items():
            expected |= {
                (name, variant, text): (model["sparsity"], value)
                for text, value in model["perplexity"].items()
            }
    assert found == expected and len(points) == len(expected) == 12  # runs × models × texts


def test_an_applied_experiment_is_complete(swept: Swept) -> None:
    """All but the keys, which no cache has: the first stage writes them, and no other runs.
    Oracles: DVC's words, the outputs.
    """
    project = swept.project
    before = tree(project / "build")
    run(project, "dvc", "exp", "apply", swept.names[0])
    output = run(project, "dvc", "repro")
    assert re.findall(r"Running stage '([^']+)'", output) == ["keys"] and "is cached" not in output
    assert json.loads(run(project, "dvc", "status", "--json")) == {}
    assert tree(project / "build") != before


def locked(lock: str, *names: str) -> dict[str, dict[str, str]]:
    """Stage -> path -> digest of its outputs by a dvc.lock, costs aside."""
    stages = YAML(typ="safe").load(lock)["stages"]
    outs = {name: {out["path"]: out["md5"] for out in stages[name]["outs"]} for name in names}
    return {
        name: {path: md5 for path, md5 in own.items() if "build/costs" not in path}
        for name, own in outs.items()
    }


@pytest.mark.parametrize(
    "names",
    [("papers", "best"), pytest.param(tuple(VARIANTS), marks=pytest.mark.campaign)],
    ids=["two", "all"],
)
def test_two_clones_and_two_workers_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    """Shipped variants, one cache, one scratch, the same stages everywhere at the same time.
    Oracle: the bytes of stages that ran alone.

    Two variants that take every kind of step before the rounding of weights; all of them: `make campaign`.
    """
    monkeypatch.setenv("SPARSELINE_ACTIVATION_BYTES", "0")
    variants = {name: VARIANTS[name] for name in names}
    project = make_project(tmp_path / "project", variants=variants, report={"baseline": "papers"})
    stages = tuple(
        f"{stage}@{name}" for stage in ("curves", "allocate", "induce", "prune") for name in variants
    )
    before = (
        "keys",
        "prepare",
        "generate calibration",
        "text calibration",
        "calibrate",
        "scale",
        "sensitivity",
    )
    with chdir(project):
        build(*before)
    run(project, "dvc", "commit", "--force", *(stage.replace(" ", "@") for stage in before))
    commit(project)
    clones = [tmp_path / name for name in ("one", "two")]
    for clone in clones:
        run(project, "git", "clone", "--quiet", str(project), str(clone))
        run(clone, "dvc", "checkout", "--allow-missing")
    run(project, "dvc", "exp", "run", "--queue", "-S", "evaluate.batch_rows=2,3", *stages)
    command = ("dvc", "queue", "start", "--jobs", "2")
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        subprocess.run(
            command,
            cwd=project,
            env=environment(project) | preloaded(),
            stdout=log,
            stderr=log,
            timeout=60,
            check=True,
        )
    try:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        running = [
            subprocess.Popen(
                ("dvc", "repro", *stages), cwd=one, env=environment(one) | preloaded(), text=True, **pipes
            )
            for one in clones
        ]
        said = [process.communicate()[0] for process in running]
        assert [process.returncode for process in running] == [0, 0], said
        deadline = time.monotonic() + 600
        while len(done := experiments(project)) < 2:
            assert "refs/exps/celery/failed" not in run(project, "git", "for-each-ref"), run(
                project, "dvc", "queue", "status"
            )
            assert time.monotonic() < deadline, run(project, "dvc", "queue", "status")
            time.sleep(0.5)
    finally:
        stop(project)
    outputs = ("curves", "allocate", "induce", "prune", "facts")
    monkeypatch.chdir(project)
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(tmp_path / "own"))
    build(*(stage.replace("@", " ") for stage in stages))
    undisturbed = {name: tree(project / "build" / name) for name in outputs}
    assert all({name: tree(clone / "build" / name) for name in outputs} == undisturbed for clone in clones)
    refs = {
        ref.split("/")[-1]: ref
        for ref in run(project, "git", "for-each-ref", "--format=%(refname)", "refs/exps").split()
    }
    locks = [run(project, "git", "show", f"{refs[name]}:dvc.lock") for name in done]
    wanted = locked((clones[0] / "dvc.lock").read_text(encoding="utf-8"), *stages)
    assert all(locked(lock, *stages) == wanted for lock in locks) and all(wanted.values())
    assert not tree(tmp_path / "scratch")


# Sweeps


@pytest.mark.parametrize(
    "sweep",
    sorted(
        re.findall(r"^(sweep-[\w-]+): SET", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    ),
)
def test_a_sweep_changes_what_params_yaml_has(tmp_path: Path, sweep: str) -> None:
    """Oracles: DVC's own reading of what the target would queue, and the stages' checks of
    params.yaml with it.
    """
    said = run(ROOT, "make", "--dry-run", "--assume-old", "environment", sweep)
    queued = get_hydra_sweeps({"params.yaml": re.findall(r"-S '(\S+)'", said)})
    assert "dvc exp run --queue" in said and 3 <= len(queued) <= 6
    seen = {(ROOT / "params.yaml").read_text(encoding="utf-8")}
    for number, one in enumerate(queued):
        path = tmp_path / f"{number}.yaml"
        shutil.copyfile(ROOT / "params.yaml", path)
        apply_overrides(path, one["params.yaml"])  # KeyError and the like: no such knob
        seen.add(path.read_text(encoding="utf-8"))
        read_all(path)
        params.load(TextParams, "texts.calibration", path)
    assert len(seen) >= len(queued)  # at most one of the values is the shipped one


def test_a_sweep_wants_a_set() -> None:
    assert "make sweep: SET is missing" in run(ROOT, "make", "--assume-old", "environment", "sweep", code=2)
