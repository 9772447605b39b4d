"""Variants as jobs, through submitit: on Slurm, or as processes of this machine.

One job runs the stages that all variants share, then one job runs per variant, then one for the
report. Each start of a job has its own clone with the project's cache, and DVC's run cache collects
the results. Earlier processes of a requeued job may still run on a lost node. They share only the
cache and the scratch directory with the new ones, and both are safe for several processes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from dvc.config import Config
from submitit.helpers import DelayedSubmission

from pipeline_lib.command import project
from pipeline_lib.core import artifacts, params
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.recipe.variants import read_all

SHARED = ("scale", "sensitivity", "evaluate-dense", "tasks-dense")  # and what these need: all that is shared
LAST = "export"  # the last of a variant's stages
PLACE = Path(".dvc/tmp/jobs")
VISIBLE = "CUDA_VISIBLE_DEVICES"
LIMIT = 100  # how often a job is requeued at most when it reaches its time limit


@dataclass(frozen=True)
class How:
    """Where jobs run."""

    local: bool  # as processes of this machine
    at_once: int  # variants that run at the same time, if ``local``
    minutes: int  # time limit of a job, after which it is requeued
    sbatch: Mapping[str, str]  # options of sbatch


@dataclass(frozen=True)
class ClusterJob:
    """`dvc repro` of some targets in a new clone. If the time limit is reached, submitit calls
    ``checkpoint`` and requeues the job.
    """

    name: str
    targets: tuple[str, ...]
    folder: Path  # of the submission, on a file system that all nodes see
    within: str  # the project's directory in the repository
    cache: Path
    environ: Mapping[str, str | None]  # settings; None: not set

    def __call__(self) -> None:
        for name, value in self.environ.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
            os.environ.setdefault("SPARSELINE_THREADS", cores)
        clone = Path(tempfile.mkdtemp(prefix=f"{self.name}.", dir=self.folder))
        _git(self.folder, "clone", "--quiet", "source.git", str(clone))
        home = clone / self.within
        local = self.folder / "config.local"
        if local.exists():
            shutil.copyfile(local, home / ".dvc" / "config.local")
        with Config(str(home / ".dvc")).edit("local") as config:
            config.setdefault("cache", {})["dir"] = str(self.cache)
            config.setdefault("core", {})["site_cache_dir"] = str(home / ".dvc" / "tmp" / "site")
        if data := _git(home, "ls-files", "*.dvc"):  # what was added by `dvc add`
            project.call(home, *project.DVC, "checkout", "--quiet", "--allow-missing", *data.splitlines())
        # submitit's signal for the time limit reaches all processes of a job
        deaf = ("env", "--ignore-signal=USR2")
        repro = (*deaf, "python", "-m", "stages.preload", *project.DVC, "repro", *self.targets)
        if code := project.call(home, *repro):
            said = " ".join(("dvc repro", *self.targets))
            raise SparselineError(f"{self.name}: `{said}` ended with {code} in {home}, which is kept.")
        shutil.rmtree(clone, ignore_errors=True)
        if "SLURM_JOB_ID" in os.environ:
            # nobody reads the result that submitit would write, and processes on a lost node may write it too
            sys.stdout.flush()
            os._exit(0)

    def checkpoint(self) -> DelayedSubmission:
        return DelayedSubmission(self)


def submit(names: Sequence[str], how: How) -> Iterator[str]:
    """Submit these variants, or all if none is named, and yield a sentence per job. Local jobs are
    run to their end.

    Raises:
        SparselineError: there is no such variant, the project cannot be cloned, there is no Slurm, or a
            local job failed.
    """
    variants = list(read_all())
    for name in names:
        if name not in variants:
            raise SparselineError(
                f"{params.FILE} has no variant {name!r}; variants: {', '.join(variants) or 'none'}."
            )
    chosen = [name for name in variants if not names or name in names]
    folder, within = _source()
    root = Path.cwd()
    cache = Path(Config(str(root / ".dvc"))["cache"].get("dir") or root / ".dvc" / "cache")
    environ: dict[str, str | None] = {
        name: value for name, value in os.environ.items() if name.startswith("SPARSELINE_")
    }
    if how.local:  # submitit hides all GPUs from local jobs
        environ[VISIBLE] = os.environ.get(VISIBLE)

    def job(name: str, *targets: str) -> ClusterJob:
        return ClusterJob(name, targets, folder, within, cache, environ)

    steps = [[job("shared", *SHARED)], [job(name, f"{LAST}@{name}") for name in chosen]]
    if len(chosen) == len(variants):
        steps.append([job("report")])
    executor = _executor(folder, how)
    yield from _here(executor, steps, how.at_once) if how.local else _queued(executor, steps)
    if len(chosen) < len(variants):
        yield "the report was not submitted, because it needs all variants"


def _executor(folder: Path, how: How) -> submitit.AutoExecutor:
    try:
        executor = submitit.AutoExecutor(
            folder / "logs",
            "local" if how.local else "slurm",
            local_max_num_timeout=LIMIT,
            slurm_max_num_timeout=LIMIT,
        )
    except RuntimeError as error:
        raise SparselineError(
            "Slurm is not installed here (no command `srun`); submit from a machine of the cluster, or use"
            " --local."
        ) from error
    executor.update_parameters(timeout_min=how.minutes, stderr_to_stdout=True)
    if not how.local:
        # otherwise a job waits forever if one that it depends on has failed
        options: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes", **how.sbatch}
        # srun, which runs the job, asks for one core otherwise
        cores = 'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"'
        executor.update_parameters(slurm_additional_parameters=options, slurm_setup=[cores])
    return executor


def _queued(executor: submitit.AutoExecutor, steps: Sequence[Sequence[ClusterJob]]) -> Iterator[str]:
    """Each step waits, in Slurm's queue, for all jobs of the step before it."""
    before: list[str] = []
    for step in steps:
        started = []
        for job in step:
            executor.update_parameters(name=f"sparseline-{job.name}")
            if before:
                executor.update_parameters(slurm_dependency=f"afterok:{':'.join(before)}")
            try:
                submitted = executor.submit(job)
            except (subprocess.CalledProcessError, submitit.core.utils.FailedJobError) as error:
                raise SparselineError(
                    f"{job.name}: sbatch refused it ({' '.join(str(error).split())[-300:]}); correct the"
                    " options given by --sbatch."
                ) from error
            started.append(submitted.job_id)
            yield f"{job.name}: job {submitted.job_id}, {submitted.paths.stdout}"
        before = started
    yield "`squeue` shows them; when they have ended, `dvc repro` takes their results from the cache"


def _here(
    executor: submitit.AutoExecutor, steps: Sequence[Sequence[ClusterJob]], at_once: int
) -> Iterator[str]:
    """Run each step after all jobs of the step before it have succeeded."""
    started: list[submitit.Job[Any]] = []

    def run(job: ClusterJob) -> str | None:
        """The path of the job's log if it failed."""
        submitted = executor.submit(job)
        started.append(submitted)
        return str(submitted.paths.stdout) if submitted.exception() else None

    for step in steps:
        with ThreadPoolExecutor(at_once) as pool:
            waiting = {job.name: pool.submit(run, job) for job in step}
            try:
                failed = {name: log for name, one in waiting.items() if (log := one.result())}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for one in started:
                    one.cancel()
                raise
        if failed:
            raise SparselineError(
                "Of the jobs "
                + ", ".join(f"{name} failed ({log})" for name, log in failed.items())
                + "; correct the cause, then run the same command again: finished work is kept."
            )
        yield f"{', '.join(waiting)}: done"


def _source() -> tuple[Path, str]:
    """Make the repository that the jobs clone, with uncommitted changes. Returns the submission's
    folder, and the project's directory in the repository. Folders of earlier submissions are
    deleted after two weeks.

    Raises:
        SparselineError: the project is not in git, or a path of the parameters would be missing.
    """
    here = Path.cwd()
    if not project.tracked(here):
        raise SparselineError(
            "Jobs run in clones, but this project is in no git repository; run `git init`, `git add --all`"
            " and `git commit`."
        )
    within = _git(here, "rev-parse", "--show-prefix")
    # a commit of the changes, to which nothing refers; empty without changes
    identity = ("-c", "user.name=sparseline", "-c", "user.email=sparseline@localhost")
    commit = _git(here, *identity, "stash", "create") or _git(here, "rev-parse", "HEAD")
    listed = _git(here, "ls-tree", "-rz", "--name-only", "--full-tree", commit).split("\0")
    there = {place for file in map(Path, listed) for place in (file, *file.parents)}
    for key, path in _paths():
        place = Path(os.path.normpath(Path(within, path)))
        by_dvc = {one.with_name(f"{one.name}.dvc") for one in (place, *place.parents) if one.name}
        if not Path(path).is_absolute() and not there & {place, *by_dvc}:
            raise SparselineError(
                f"{params.FILE}: {key} = {path} is not in git, and jobs run in clones; give an absolute path,"
                " or add it by `git add` or `dvc add`."
            )
    PLACE.mkdir(parents=True, exist_ok=True)
    for left in PLACE.iterdir():
        if time.time() - artifacts.newest(left) > artifacts.ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=PLACE.absolute()))
    source, branch = folder / "source.git", "refs/heads/submitted"
    _git(here, "clone", "--quiet", "--bare", _git(here, "rev-parse", "--git-common-dir"), str(source))
    _git(here, "push", "--quiet", "--force", str(source), f"{commit}:{branch}")
    _git(source, "symbolic-ref", "HEAD", branch)
    local = Path(".dvc/config.local")
    if local.exists():
        shutil.copyfile(local, folder / "config.local")
    return folder, within


def _paths() -> Iterator[tuple[str, str]]:
    """Keys of params.yaml whose paths DVC watches, and the paths."""
    yield "model.path", str(params.section("model")["path"])
    for name, text in params.section("texts").items():
        yield f"texts.{name}.path", str(text["path"])
    yield "tasks.path", str(params.section("tasks")["path"])


def _git(directory: Path, *arguments: str) -> str:
    """The output of a git command.

    Raises:
        SparselineError: the command fails.
    """
    done = subprocess.run(("git", *arguments), cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SparselineError(
            f"`git {' '.join(arguments)}` does not work in {directory}: {' '.join(done.stderr.split())[:300]}"
        )
    return done.stdout.strip()
