"""Variants as jobs: on a real Slurm of two nodes on this machine, and as processes. Jobs are queued again, a
node is lost while its processes live on, the controller is killed. Oracle: the bytes of stages that
nobody disturbed, and DVC's account of what it ran.
"""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import slurm
from dvc.repo import Repo
from project import (
    WANDA,
    build,
    change_params,
    commit,
    environment,
    invoke,
    make_project,
    make_workspace,
    results,
    run,
    scratch,
    start,
)
from test_pipeline import executed, restored

from pipeline_lib.command import cluster as jobs
from pipeline_lib.command.cluster import LAST, SHARED, ClusterJob

LONG = 900.0  # seconds that a job may take on a busy machine
LAYERS = 3
FITTED: dict[str, Any] = {  # a block takes most of a second
    "selection": {"score": "obs", "group": "block"},
    "reconstruction": {
        "steps": ["obs", "finetune_channels"],
        "finetune_channels": {"epochs": 40, "patience": 40},
    },
}
ONE: dict[str, Any] = {"wanda": FITTED | {"candidate": True}}  # the name of the report's baseline
PAIR: dict[str, Any] = {
    "wanda": FITTED,
    "other": FITTED | {"selection": {"score": "obs", "group": "row"}, "candidate": True},
}
SIX: dict[str, Any] = PAIR | {
    "magnitude": WANDA | {"selection": {"score": "magnitude", "group": "matrix"}},
    "induced": FITTED | {"induce": {}, "allocation": {"method": "predicted"}},
    "weighed": FITTED | {"allocation": {"method": "weight"}},
    "distilled": WANDA | {"distil": {}},
}
OWN = ("curves", "allocate", "induce", "prune", "distil", "evaluate", "tasks", "export")


def steps(variants: Sequence[str]) -> list[str]:
    texts = ("calibration", "validation", "test")
    shared = ("calibrate", "scale", "sensitivity", "evaluate dense", "tasks dense")
    return [
        *("keys", "prepare"),
        *(f"{stage} {text}" for stage in ("generate", "text") for text in texts),
        *shared,
        *(f"{stage} {variant}" for variant in variants for stage in OWN),
        *("choose", "report"),
    ]


def undisturbed(home: Path, variants: Mapping[str, Any]) -> dict[str, str]:
    workspace = make_workspace(home / "alone", model={"layers": LAYERS}, variants=variants)
    with chdir(workspace):
        build(*steps(list(variants)))
    return results(workspace)


def submitted(project: Path, *options: str) -> dict[str, str]:
    """The numbers of the jobs."""
    process = start(project, "python", "-m", "stages.submit", *options)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return dict(re.findall(r"^(\S+): job (\d+)", output, re.MULTILINE))


def pruning(project: Path, name: str, blocks: int = 0) -> int | None:
    """The process that prunes in a clone of the job with this name, once so many blocks are done."""
    for lock in scratch(project).glob("prune/*.lock"):
        with suppress(ValueError, OSError):  # not written yet, or gone
            owner = json.loads(lock.read_text(encoding="utf-8"))
            done = len(list(lock.with_suffix("").glob("finished-*.json")))
            if Path(owner["directory"]).name.startswith(f"{name}.") and done >= blocks:
                return int(owner["pid"])
    return None


def caught(project: Path, name: str, blocks: int = 0, after: int | None = None) -> int:
    """That process, stopped where it is; not the one that was caught before."""
    deadline = time.monotonic() + LONG
    while (found := pruning(project, name, blocks)) in (None, after):
        assert time.monotonic() < deadline, f"nobody prunes {name}"
        time.sleep(0.02)
    assert found is not None
    os.kill(found, signal.SIGSTOP)
    return found


def log(project: Path, number: str) -> str:
    (path,) = project.glob(f".dvc/tmp/jobs/*/logs/{number}_0_log.out")
    return path.read_text(encoding="utf-8")


def check(project: Path, expected: Mapping[str, str]) -> None:
    """`dvc repro` finds everything, and it is what it should be."""
    assert executed(run(project, "dvc", "repro")) == set()
    found = {
        path: digest for path, digest in results(project).items() if path != "report/.gitignore"
    }  # DVC's
    assert found == expected


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[slurm.Slurm]:
    if reason := slurm.missing():
        pytest.skip(reason)
    with slurm.two_nodes(tmp_path / "slurm") as running:
        monkeypatch.setenv("SLURM_CONF", running.environ["SLURM_CONF"])
        yield running


def ancestor(number: int, module: str) -> psutil.Process:
    return next(one for one in psutil.Process(number).parents() if module in one.cmdline())


def disturbed(project: Path, cluster: slurm.Slurm, requeued: str, lost: str) -> None:
    """All variants are submitted. While they prune, the job of one is queued again, the node of one is lost,
    and the controller is killed and started again.
    """
    numbers = submitted(project)

    def state(name: str) -> dict[str, str]:
        return cluster.job(numbers[name])

    twin = None if lost == requeued else caught(project, lost)
    killed = caught(project, requeued, 1)
    cluster.ask("scontrol", "requeue", numbers[requeued])
    twin = twin or caught(project, lost, 1, after=killed)
    alive = ancestor(twin, "submitit.core._submit")
    restarts = int(state(lost)["Restarts"])
    cluster.kill(state(lost)["BatchHost"])
    cluster.kill("slurmctld")
    cluster.start("slurmctld")
    waits = re.compile("process [0-9]+ on .* has these blocks; waiting until it ends")
    cluster.wait(lambda: bool(waits.search(log(project, numbers[lost]))), LONG, "the job starts elsewhere")
    assert psutil.Process(twin).status() == psutil.STATUS_STOPPED
    assert int(state(lost)["Restarts"]) == restarts + 1
    os.kill(twin, signal.SIGCONT)
    cluster.wait(
        lambda: all(state(name).get("JobState") == "COMPLETED" for name in numbers), LONG, "all jobs end"
    )
    cluster.wait(lambda: not alive.is_running(), LONG, "what lives on at the lost node ends, too")
    assert not psutil.pid_exists(killed) and int(state(requeued)["Restarts"]) >= 1
    resumes = rf"prune {requeued}: resuming after [1-9] of {LAYERS} blocks"
    assert re.search(resumes, log(project, numbers[requeued]))


@pytest.mark.campaign
def test_jobs_on_two_nodes(tmp_path: Path, cluster: slurm.Slurm) -> None:
    project = make_project(tmp_path / "project", model={"layers": LAYERS}, variants=ONE)
    disturbed(project, cluster, "wanda", "wanda")
    check(project, undisturbed(tmp_path, ONE))


@pytest.mark.campaign
def test_six_variants_on_two_nodes(tmp_path: Path, cluster: slurm.Slurm) -> None:
    project = make_project(tmp_path / "project", model={"layers": LAYERS}, variants=SIX)
    disturbed(project, cluster, "other", "wanda")
    check(project, undisturbed(tmp_path, SIX))


def logged(project: Path, pattern: str) -> bool:
    return any(
        re.search(pattern, path.read_text(encoding="utf-8"))
        for path in project.glob(".dvc/tmp/jobs/*/logs/*_0_log.out")
    )


def disturbed_here(project: Path, requeued: str, lost: str) -> None:
    """As processes: a job runs out of its time, and what submitit watches one by is killed. The command
    says what failed; given again, it ends well.
    """
    command = ("python", "-m", "stages.submit", "--local", "--at-once", "2")
    process = start(project, *command)
    twin = None if lost == requeued else caught(project, lost)
    killed = caught(project, requeued, 1)
    ancestor(killed, "submitit.core._submit").send_signal(signal.SIGUSR2)
    time.sleep(1)
    os.kill(killed, signal.SIGCONT)  # it sees that its `dvc` is gone
    twin = twin or caught(project, lost, 1, after=killed)
    ancestor(twin, "submitit.local._local").kill()
    output, _ = process.communicate(timeout=LONG)
    assert process.returncode == 2 and "shared: done" in output, output
    assert re.search(
        rf"Of the jobs {lost} failed \(\S+\); correct the cause, then run the same command again", output
    ), output
    assert logged(project, rf"prune {requeued}: resuming after [1-9] of {LAYERS} blocks")
    process = start(project, *command)
    deadline = time.monotonic() + LONG
    while not logged(project, f"prune {lost}: process [0-9]+ on .* waiting until it ends"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(twin, signal.SIGCONT)
    output, _ = process.communicate(timeout=LONG)
    assert process.returncode == 0 and "report: done" in output, output


@pytest.mark.campaign
def test_jobs_as_processes(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", model={"layers": LAYERS}, variants=ONE)
    disturbed_here(project, "wanda", "wanda")
    check(project, undisturbed(tmp_path, ONE))


@pytest.mark.campaign
def test_six_variants_as_processes(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", model={"layers": LAYERS}, variants=SIX)
    disturbed_here(project, "other", "wanda")
    check(project, undisturbed(tmp_path, SIX))


@pytest.mark.campaign
def test_what_depends_on_a_failed_job_is_cancelled(tmp_path: Path, cluster: slurm.Slurm) -> None:
    """It would be queued for ever. The log of the job has the stage's sentence."""
    project = make_project(tmp_path / "project", variants=PAIR)
    change_params(project, "texts.test.rows", 10**6)
    numbers = submitted(project, "other", "--sbatch", "comment=a trial")
    assert numbers.keys() == {"shared", "other"}
    assert cluster.job(numbers["other"])["Comment"] == "a"  # and what follows a blank
    for name, ended in (("shared", "FAILED"), ("other", "CANCELLED")):
        cluster.wait(
            lambda name=name, ended=ended: cluster.job(numbers[name])["JobState"] == ended, LONG, ended
        )
    assert "error: " in log(project, numbers["shared"])


def test_every_shared_stage_is_in_the_first_job(tmp_path: Path) -> None:
    """And a variant's job ends with all of its stages. Oracle: DVC's graph."""
    import networkx

    with chdir(make_project(tmp_path / "project")), Repo() as repo:
        graph = networkx.relabel_nodes(repo.index.graph, lambda stage: stage.addressing)
    needs = {name: networkx.descendants(graph, name) | {name} for name in graph}
    own = {name for name in graph if name.endswith("@wanda")}
    assert own <= needs[f"{LAST}@wanda"]
    first = set().union(*(needs[name] for name in SHARED))
    assert needs[f"{LAST}@wanda"] - own == first


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[ClusterJob]:
    """The jobs that are submitted, none of which runs."""
    found: list[ClusterJob] = []

    def submit(job: ClusterJob) -> SimpleNamespace:
        found.append(job)
        return SimpleNamespace(job_id=str(len(found)), paths=SimpleNamespace(stdout="log"))

    nowhere = SimpleNamespace(submit=submit, update_parameters=lambda **_: None)
    monkeypatch.setattr(jobs, "_executor", lambda folder, how: nowhere)
    return found


def test_a_job_has_what_is_not_committed_and_what_dvc_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: list[ClusterJob]
) -> None:
    """The project is a directory of a repository, its model is DVC's, and its cache is named by a file that
    git does not see. Its clone is gone afterwards. Oracle: what DVC computes in the project.
    """
    project = make_project(tmp_path / "project", variants={"wanda": WANDA})
    run(project, "git", "rm", "-r", "--quiet", "--cached", "data/model")
    run(project, "dvc", "add", "--quiet", "data/model")
    commit(project)
    change_params(project, "model.exclude", ["layers.0.mlp"])
    monkeypatch.chdir(project)
    for name, value in environment(project).items():
        monkeypatch.setenv(name, value)
    assert invoke("submit").exit_code == 0
    assert [job.name for job in taken] == ["shared", "wanda", "report"]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    replace(taken[0], targets=("prepare",))()
    assert [path.name for path in taken[0].folder.iterdir() if path.is_dir()] == ["source.git"]
    output = run(project, "dvc", "repro", "prepare")
    assert executed(output) == set() and restored(output) == {"prepare"}


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        (lambda: None, ["nobody"], "params.yaml has no variant 'nobody'; variants: wanda."),
        (lambda: shutil.rmtree(".git"), [], "this project is in no git repository"),
        (
            lambda: change_params(Path(), "model.path", "models/mine"),
            [],
            "model.path = models/mine is not in git, and jobs run in clones; give an absolute path",
        ),
        (
            lambda: change_params(Path(), "texts.test.path", "../elsewhere.txt"),
            [],
            "texts.test.path = ../elsewhere.txt is not in git",
        ),
        (
            lambda: os.environ.update(PATH=str(Path("bin").absolute())),
            [],
            "Slurm is not installed here (no command `srun`)",
        ),
    ],
)
def test_what_cannot_be_submitted_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[], None],
    arguments: list[str],
    said: str,
) -> None:
    project = make_project(tmp_path / "project", variants={"wanda": WANDA})
    (project / "bin").mkdir()
    (project / "bin" / "git").symlink_to(str(shutil.which("git")))
    monkeypatch.chdir(project)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # put back afterwards
    change()
    found = invoke("submit", *arguments)
    assert found.exit_code == 2 and said in found.output, found.output
    assert not list(project.glob(".dvc/tmp/jobs/*/logs"))
