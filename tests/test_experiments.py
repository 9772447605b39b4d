"""Experiments: what a queue computes, and what `make compare` makes of the results. Oracles: DVC's logs and its own table, figures by hand."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from dvc.utils.hydra import apply_overrides, get_hydra_sweeps
from project import ROOT, WANDA, build, commit, environment, invoke, make_project, read_params, run, tree
from ruamel.yaml import YAML

from pipeline_lib.calibration.texts import TextParams
from pipeline_lib.core import params
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.params import merge
from pipeline_lib.induction.induce import InduceParams
from pipeline_lib.pruning.prune import VariantParams
from pipeline_lib.reporting import compare

SWEEP = ("-S", "prune.selection.sparsity=0.4,0.6", "-S", "texts.test.rows=7")  # the second changes something upstream, in both runs alike
VARIANTS = YAML(typ="safe").load(ROOT / "params.yaml")["variants"]
SHARED = {"check", "text@test", "evaluate-dense"}
OWN = {"prune@wanda", "evaluate@wanda", "choose", "report"}


class Swept(NamedTuple):
    project: Path
    names: list[str]  # of the experiments, in the order of the queue


def experiments(project: Path) -> list[str]:
    refs = run(project, "git", "for-each-ref", "--sort=committerdate", "--format=%(refname)", "refs/exps").split()
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
    project = make_project(
        tmp_path_factory.mktemp("experiments") / "project",
        variants={"wanda": WANDA},
        induced={},
        curved={},
        exported={},
        choose={"candidates": ["wanda"]},
        tasks={"presets": [], "variants": []},
    )
    with chdir(project):
        build("check", "prepare", *(f"text {name}" for name in read_params(project)["texts"]), "calibrate", "scale", "sensitivity")
        build("prune wanda", "evaluate dense", "evaluate wanda", "choose", "report")
    run(project, "dvc", "commit", "--force")
    commit(project)
    run(project, "dvc", "exp", "run", "--queue", *SWEEP)
    with (project.parent / "log").open("w", encoding="utf-8") as log:  # a pipe would stay open as long as the worker
        subprocess.run(("dvc", "queue", "start"), cwd=project, env=environment(project), stdout=log, stderr=log, timeout=60, check=True)
    try:
        deadline = time.monotonic() + 900  # a busy machine takes minutes; a failed run is told at once
        while len(names := experiments(project)) < 2:
            assert "refs/exps/celery/failed" not in run(project, "git", "for-each-ref"), run(project, "dvc", "queue", "status")
            assert time.monotonic() < deadline, run(project, "dvc", "queue", "status")
            time.sleep(0.5)
    finally:
        stop(project)
    yield Swept(project, names)


def test_queued_runs_compute_nothing_twice(swept: Swept) -> None:
    """What HEAD has is not run, what the runs have in common is run by the first alone. Oracle: DVC's logs."""
    first, second = (run(swept.project, "dvc", "queue", "logs", name) for name in swept.names)
    ran, restored = (re.compile(pattern) for pattern in (r"Running stage '([^']+)'", r"Stage '([^']+)' is cached"))
    assert sorted(ran.findall(first)) == sorted(SHARED | OWN) and restored.findall(first) == []
    assert set(ran.findall(second)) <= OWN and {"prune@wanda", "evaluate@wanda", "report"} <= set(ran.findall(second))
    assert SHARED <= set(restored.findall(second)) <= SHARED | {"choose"}


def test_collected_is_what_dvc_shows(swept: Swept) -> None:
    """Oracle: `dvc exp show --json`."""
    shown = json.loads(run(swept.project, "dvc", "exp", "show", "--json"))
    head = next(revision for revision in shown if revision["name"] == "main")
    revisions = {one["revs"][0]["name"]: one["revs"][0] for one in head["experiments"]} | {"main": head}
    found = {one.name: one for one in compare.collect(swept.project)}
    assert set(found) == {"main", "workspace", *swept.names} and set(revisions) == {"main", *swept.names}
    for name, revision in revisions.items():
        metrics = revision["data"]["metrics"]["report/summary.json"]["data"]
        assert {variant: model.perplexity for variant, model in found[name].models.items()} == {
            v: m["perplexity"] for v, m in metrics.items()
        }
        assert {variant: model.sparsity for variant, model in found[name].models.items()} == {v: m["sparsity"] for v, m in metrics.items()}
    assert [found[name].changes for name in swept.names] == [
        {"texts.test.rows": "=7", "prune.selection.sparsity": sparsity} for sparsity in ("=0.4", "=0.6")
    ]


def test_an_applied_experiment_is_complete_and_compared(swept: Swept, monkeypatch: pytest.MonkeyPatch) -> None:
    """HEAD measured other rows of the test text, so that it is left out beside the applied run. Oracles: `dvc status`, git, the summaries."""
    project = swept.project
    before = tree(project / "build")
    run(project, "dvc", "exp", "apply", swept.names[0])
    assert json.loads(run(project, "dvc", "status", "--json")) == {}
    assert tree(project / "build") != before
    status = run(project, "git", "status", "--porcelain")
    monkeypatch.chdir(project)
    result = invoke("compare")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    told = [(line.split()[0], re.findall(r"wanda +(\S+)%", line)) for line in lines if "wanda" in line]
    assert told == [(swept.names[0], ["40.00"]), (swept.names[1], ["60.00"])]
    assert "Left out, since they measured another model or other texts: main." in lines
    assert all(name in (project / "report" / "compare.html").read_text(encoding="utf-8") for name in swept.names)
    assert run(project, "git", "status", "--porcelain") == status  # the page is ignored
    assert json.loads(run(project, "dvc", "status", "--json")) == {}


def locked(lock: str, *names: str) -> dict[str, dict[str, str]]:
    """Stage -> path -> digest of its outputs by a dvc.lock, costs aside."""
    stages = YAML(typ="safe").load(lock)["stages"]
    outs = {name: {out["path"]: out["md5"] for out in stages[name]["outs"]} for name in names}
    return {name: {path: md5 for path, md5 in own.items() if "build/costs" not in path} for name, own in outs.items()}


@pytest.mark.parametrize("names", [("papers", "sparseline"), pytest.param(tuple(VARIANTS), marks=pytest.mark.campaign)], ids=["two", "all"])
def test_two_clones_and_two_workers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    """Shipped variants, one cache, one scratch, the same stages everywhere at the same time. Oracle: the bytes of stages that ran alone.

    Two variants that take every kind of step before the rounding of weights; all of them: `make campaign`.
    """
    variants = {name: merge(VARIANTS[name], {"activation_budget_bytes": 0}) for name in names}
    project = make_project(
        tmp_path / "project",
        variants=variants,
        induced={"papers": {}},
        curved={"sparseline": {}},
        exported={},
        choose={"candidates": []},
        tasks={"presets": [], "variants": []},
        report={"baseline": "papers"},
    )
    stages = ("induce@papers", "curves@sparseline", *(f"prune@{name}" for name in variants))
    with chdir(project):
        build("check", "prepare", "text calibration", "calibrate", "scale", "sensitivity")
    run(project, "dvc", "commit", "--force", "check", "prepare", "text@calibration", "calibrate", "scale", "sensitivity")
    commit(project)
    clones = [tmp_path / name for name in ("one", "two")]
    for clone in clones:
        run(project, "git", "clone", "--quiet", str(project), str(clone))
        run(clone, "dvc", "checkout", "--allow-missing")
    run(project, "dvc", "exp", "run", "--queue", "-S", "evaluate.batch_rows=2,3", *stages)
    command = ("dvc", "queue", "start", "--jobs", "2")
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        subprocess.run(command, cwd=project, env=environment(project), stdout=log, stderr=log, timeout=60, check=True)
    try:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        running = [subprocess.Popen(("dvc", "repro", *stages), cwd=one, env=environment(one), text=True, **pipes) for one in clones]
        said = [process.communicate()[0] for process in running]
        assert [process.returncode for process in running] == [0, 0], said
        deadline = time.monotonic() + 600
        while len(done := experiments(project)) < 2:
            assert "refs/exps/celery/failed" not in run(project, "git", "for-each-ref"), run(project, "dvc", "queue", "status")
            assert time.monotonic() < deadline, run(project, "dvc", "queue", "status")
            time.sleep(0.5)
    finally:
        stop(project)
    outputs = ("induce", "curves", "prune", "facts")
    monkeypatch.chdir(project)
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(tmp_path / "own"))
    build(*(stage.replace("@", " ") for stage in stages))
    undisturbed = {name: tree(project / "build" / name) for name in outputs}
    assert all({name: tree(clone / "build" / name) for name in outputs} == undisturbed for clone in clones)
    refs = {ref.split("/")[-1]: ref for ref in run(project, "git", "for-each-ref", "--format=%(refname)", "refs/exps").split()}
    locks = [run(project, "git", "show", f"{refs[name]}:dvc.lock") for name in done]
    wanted = locked((clones[0] / "dvc.lock").read_text(encoding="utf-8"), *stages)
    assert all(locked(lock, *stages) == wanted for lock in locks) and all(wanted.values())
    assert not tree(tmp_path / "scratch")


# Figures by hand


def summary(*, dense: float = 10.0, **variants: tuple[float, float]) -> dict[str, Any]:
    """variant=(sparsity, perplexity on test); on validation it is half of that, and the gap closed 12.34%."""
    found = {
        name: {"sparsity": s, "perplexity": {"test": p, "validation": p / 2}, "gap": {"test": 0.1234}} for name, (s, p) in variants.items()
    }
    return {"dense": {"sparsity": 0.0, "perplexity": {"test": dense, "validation": dense / 2}}} | found


def record(project: Path, ref: str, figures: Any, **changes: Any) -> None:
    """A commit with these figures, and with parameters laid over HEAD's, under ``ref``; the workspace is as before."""
    head = run(project, "git", "rev-parse", "HEAD").strip()
    write(project, figures, merge(json.loads((project / "params.yaml").read_text(encoding="utf-8")), changes))
    commit(project)
    run(project, "git", "update-ref", ref, "HEAD")
    run(project, "git", "reset", "--quiet", "--hard", head)


def write(project: Path, figures: Any, values: Any) -> None:
    (project / "params.yaml").write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    (project / "report").mkdir(exist_ok=True)
    (project / "report" / "summary.json").write_text(figures if isinstance(figures, str) else json.dumps(figures), encoding="utf-8")


PARAMS: dict[str, Any] = {
    "prune": {"selection": {"sparsity": 0.5}, "other": {"alpha": 1}},
    "choose": {"text": "validation"},
    "variants": {"a": {}, "b": {}},
}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """main with two variants at 50%."""
    project = tmp_path / "repository"
    project.mkdir()
    run(project, "git", "init", "--quiet", "--initial-branch", "main")
    for key, value in {"user.name": "test", "user.email": "test@localhost", "commit.gpgsign": "false"}.items():
        run(project, "git", "config", key, value)
    write(project, summary(a=(0.5, 20.0), b=(0.5, 18.0)), PARAMS)
    (project / ".gitignore").write_text((ROOT / ".gitignore").read_text(encoding="utf-8"), encoding="utf-8")
    commit(project)
    monkeypatch.chdir(project)
    return project


def experiment(name: str, revision: str = "ab" * 20) -> str:
    return f"refs/exps/{revision[:2]}/{revision[2:]}/{name}"


def result() -> compare.Comparison:
    return compare.compare(compare.collect(Path()), "validation")


def told(points: compare.Comparison) -> list[tuple[str, str, float]]:
    return [(point.run, point.variant, point.model.sparsity) for point in points.points]


def test_runs_are_ranked_by_sparsity_and_the_best_is_marked(repository: Path) -> None:
    """Of the three models at 50% the experiment's a is best; what it repeats of main (b) is told once. Notes of DVC's own are no runs."""
    record(repository, experiment("tuned"), summary(a=(0.5, 16.0), b=(0.5, 18.0)), prune={"other": {"alpha": 2}})
    record(repository, experiment("sparse"), summary(a=(0.7, 40.0), b=(0.7, 36.0)), prune={"selection": {"sparsity": 0.7}})
    record(repository, "refs/exps/exec/EXEC_HEAD", summary(a=(0.1, 11.0)))
    found = result()
    assert told(found) == [("tuned", "a", 0.5), ("main", "b", 0.5), ("main", "a", 0.5), ("sparse", "b", 0.7), ("sparse", "a", 0.7)]
    assert found.best("test") == found.best("validation") == {0, 3}
    rows = [line.split("  ") for line in compare.terminal(found).splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells[0] == ["run", "changed", "variant", "pruned", "validation ppl", "test ppl", "test gap closed"]
    assert cells[1] == ["tuned", "other.alpha=2", "a", "50.00%", "8.00 *", "16.00 *", "12.3%"]
    assert cells[2] == ["main", "–", "b", "50.00%", "9.00", "18.00", "12.3%"]


def test_branches_and_the_workspace_are_runs(repository: Path) -> None:
    """The same figures on a branch are no point of their own; a run without a summary is none."""
    run(repository, "git", "branch", "twin")
    record(repository, "refs/heads/other", summary(c=(0.5, 19.0)), variants={"c": {"score": "obs"}})
    write(repository, summary(a=(0.6, 25.0)), merge(PARAMS, {"prune": {"selection": {"sparsity": 0.6}}}))
    assert told(result()) == [("main", "b", 0.5), ("other", "c", 0.5), ("main", "a", 0.5), ("workspace", "a", 0.6)]
    changes = {one.name: one.changes for one in compare.collect(Path())}
    assert changes == {
        "main": {},
        "twin": {},
        "other": {"variants.c": " added"},
        "workspace": {"prune.selection.sparsity": "=0.6"},
    }
    (repository / "report" / "summary.json").unlink()
    assert [one.name for one in compare.collect(Path())] == ["main", "other", "twin"]


def test_another_model_is_left_out(repository: Path) -> None:
    """Its dense perplexity tells. The workspace says what is compared, HEAD where it has no figures."""
    record(repository, experiment("alike"), summary(a=(0.6, 25.0)))
    record(repository, experiment("larger"), summary(dense=8.0, a=(0.5, 9.0)))
    assert result().apart == ("larger",)
    assert {point.run for point in result().points} == {"main", "alike"}
    record(repository, experiment("larger-still"), summary(dense=8.0, a=(0.6, 9.5)))
    write(repository, summary(dense=8.0, a=(0.7, 10.0)), PARAMS)
    assert result().apart == ("main", "alike")


def test_experiments_of_one_name_are_told_apart(repository: Path) -> None:
    """DVC lets two commits have experiments of the same name."""
    for number in (0, 1):
        record(repository, experiment("same", f"{number}" * 40), summary(a=(0.6, 20.0 + number)))
    assert {one.name for one in compare.collect(Path())} == {"main", "same", f"same ({'1' * 7})", "workspace"}


def test_keys_are_short_where_that_is_clear() -> None:
    """Oracle: by hand. Sixty characters of changes are written out, and the first in any case."""
    changes = {"one.x.alpha": "=2", "two.x.alpha": "=2", "three.y.z": " removed", "four": f"={'4' * 30}", "five": "=5"}
    dense, models = (
        compare.Model(sparsity=0, perplexity={"test": 5}),
        [compare.Model(sparsity=0.5, perplexity={"test": p}) for p in (6, 7, 8)],
    )
    runs = [
        compare.Run(name, own, {"dense": dense, "a": m})
        for name, own, m in zip("pqr", ({}, changes, {"six": f"={'6' * 90}", "five": "=5"}), models, strict=True)
    ]
    changed = next(column for column in compare.columns(compare.compare(runs, "test")) if column.head == "changed")
    assert changed.cells == ("–", "one.x.alpha=2, two.x.alpha=2, y.z removed, 2 more", f"six={'6' * 90}, 1 more")


def test_the_page_has_a_figure_per_text(repository: Path) -> None:
    """Self-contained, in the report's two colour schemes, a point per model. Oracle: the XML parser."""
    record(repository, experiment("sparse"), summary(a=(0.7, 40.0), b=(0.7, 36.0)))
    html = compare.page(result())
    figures = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)]
    words = [" ".join(figure.itertext()) for figure in figures]
    assert ["perplexity, validation" in words[0], "perplexity, test" in words[1], len(words)] == [True, True, 2]
    assert "prefers-color-scheme: dark" in html and not re.search(r'(src|href)="(?!#)', html)
    assert html == compare.page(result())


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        ("{", "report/summary.json of workspace cannot be read"),
        (
            {"dense": {"sparsity": 0, "perplexity": {}}, "a": {"sparsity": "none"}},
            "report/summary.json of workspace cannot be read (a.sparsity: ",
        ),
        (
            summary(a=(0.5, 20.0), b=(0.5, 18.0)),
            "no experiment and no branch has other figures than main; queue some: `make sweep-sparsity`",
        ),
    ],
)
def test_nothing_to_compare_is_told(repository: Path, figures: Any, sentence: str) -> None:
    write(repository, figures, PARAMS)
    done = invoke("compare")
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
    assert f"error: {sentence}" in done.stderr
    assert not (repository / "report" / "compare.html").exists()


def test_no_run_and_no_repository_are_told(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(SparselineError, match="git cannot tell the runs"):
        compare.collect(tmp_path)
    run(repository, "git", "rm", "--quiet", "report/summary.json")
    run(repository, "git", "commit", "--quiet", "--message", "none")
    with pytest.raises(SparselineError, match=r"no run has a report/summary\.json yet"):
        result()


# Sweeps


@pytest.mark.parametrize(
    "sweep", sorted(re.findall(r"^(sweep-[\w-]+): SET", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
)
def test_a_sweep_changes_what_params_yaml_has(tmp_path: Path, sweep: str) -> None:
    """Oracles: DVC's own reading of what the target would queue, and the stages' checks of params.yaml with it."""
    said = run(ROOT, "make", "--dry-run", "--assume-old", "environment", sweep)
    queued = get_hydra_sweeps({"params.yaml": re.findall(r"-S '(\S+)'", said)})
    assert "dvc exp run --queue" in said and 3 <= len(queued) <= 6
    seen = {(ROOT / "params.yaml").read_text(encoding="utf-8")}
    for number, one in enumerate(queued):
        path = tmp_path / f"{number}.yaml"
        shutil.copyfile(ROOT / "params.yaml", path)
        apply_overrides(path, one["params.yaml"])  # KeyError and the like: no such knob
        seen.add(path.read_text(encoding="utf-8"))
        values = YAML(typ="safe", pure=True).load(path)
        for name, variant in values["variants"].items():
            params.parse(VariantParams, merge(values["prune"], variant), name)
        params.parse(InduceParams, values["induce"], "induce")
        params.parse(TextParams, values["texts"]["calibration"], "texts.calibration")
    assert len(seen) >= len(queued)  # at most one of the values is the shipped one


def test_a_sweep_wants_a_set() -> None:
    assert "make sweep: SET is missing" in run(ROOT, "make", "--assume-old", "environment", "sweep", code=2)
