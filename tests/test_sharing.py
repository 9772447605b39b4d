"""A cache directory for two clones, link types, and remotes over SSH and S3: real servers on this
machine. Oracles: DVC's own account of what it ran, the first clone's files, and the MD5 sums that
name the objects of a cache.
"""

import configparser
import getpass
import hashlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from project import (
    ROOT,
    WANDA,
    build,
    change_params,
    commit,
    environment,
    make_project,
    read_params,
    results,
    run,
    tree,
)
from ruamel.yaml import YAML
from test_pipeline import executed, restored, stale

ALL = {
    f"{stage}@{name}" for stage in ("generate", "text") for name in ("calibration", "validation", "test")
} | {
    *("prepare", "calibrate", "scale", "sensitivity", "evaluate-dense", "tasks-dense", "choose", "report"),
    *(
        f"{stage}@wanda"
        for stage in ("curves", "allocate", "induce", "prune", "distil", "evaluate", "tasks", "export")
    ),
}
CHANGE = ("variants.wanda.selection", {**WANDA["selection"], "sparsity": 0.6})
CONCERNED = {
    *(f"{stage}@wanda" for stage in ("allocate", "induce", "prune", "distil", "evaluate", "tasks", "export")),
    "choose",
    "report",
}
STEPS = (
    *(
        "keys",
        "prepare",
        "generate calibration",
        "generate validation",
        "generate test",
        "text calibration",
        "text validation",
        "text test",
        "calibrate",
        "scale",
        "sensitivity",
    ),
    *(f"{stage} wanda" for stage in ("curves", "allocate", "induce", "prune", "distil", "evaluate", "tasks")),
    *("evaluate dense", "tasks dense", "export wanda", "choose", "report"),
)
CHECKPOINT = "prune/wanda/checkpoint"
SHIPPED = configparser.ConfigParser()
SHIPPED.read_string((ROOT / ".dvc" / "config").read_text(encoding="utf-8").replace("    ", ""))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which every stage has run, with dvc.lock committed and the runs in the cache.
    Read only.
    """
    variants = {"wanda": WANDA | {"candidate": True}}
    project = make_project(tmp_path_factory.mktemp("sharing") / "project", variants=variants)
    with chdir(project):
        build(*STEPS)
    run(project, "dvc", "commit", "--force")
    commit(project)
    return project


def cache_of(project: Path) -> Path:
    """Where ``make_project`` puts it."""
    return project.parent / f"{project.name}.dvc" / "cache"


def clone_of(project: Path, clone: Path, *config: str, cache: Path | None = None) -> Path:
    """A clone as on another machine: nothing of DVC's is shared. ``config`` is what a user would
    add to .dvc/config.local.
    """
    run(project, "git", "clone", "--quiet", str(project), str(clone))
    for key, value in {
        "user.name": "test",
        "user.email": "test@localhost",
        "commit.gpgsign": "false",
    }.items():
        run(clone, "git", "config", key, value)
    beside = clone.parent / f"{clone.name}.dvc"
    remote = ["remote = team"] if any("remote" in line for line in config) else []
    own = (
        "[core]",
        *remote,
        f"site_cache_dir = {beside / 'site'}",
        "[cache]",
        f"dir = {cache or beside / 'cache'}",
    )
    (clone / ".dvc" / "config.local").write_text("\n".join((*own, *config)) + "\n", encoding="utf-8")
    return clone


def objects(store: Path) -> list[Path]:
    """Of a cache or a remote; temporary files have other names."""
    return [path for path in store.glob("files/md5/??/*") if re.fullmatch(r"[0-9a-f]{30}(\.dir)?", path.name)]


def damaged(store: Path) -> list[Path]:
    """Objects whose bytes are not those that their names promise."""
    return [
        p
        for p in objects(store)
        if hashlib.md5(p.read_bytes()).hexdigest() != p.parent.name + p.name.removesuffix(".dir")
    ]


def same_results(a: Path, b: Path) -> bool:
    return results(a) == results(b)


# One machine: a cache directory for several clones


def kind_of(path: Path, store: Path) -> str:
    """How a file in the workspace holds its bytes."""
    if path.is_symlink():
        return "symlink" if path.resolve().is_relative_to(store.resolve()) else "stray"
    twins = [other for other in objects(store) if other.stat().st_ino == path.stat().st_ino]
    return "hardlink" if twins else "copy"  # or a reflink, which stat cannot tell


def reflinks(directory: Path) -> bool:
    (directory / "original").write_bytes(b"x" * 4096)
    made = subprocess.run(
        ("cp", "--reflink=always", "original", "twin"), cwd=directory, capture_output=True, check=False
    )
    return made.returncode == 0


@pytest.mark.parametrize("kind", ["reflink", "hardlink", "symlink"])
def test_stages_write_beside_links_never_through_them(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Stages called by hand, on outputs that are links into a cache. Oracle: the names of the
    objects there.
    """
    if kind == "reflink" and not reflinks(tmp_path):
        pytest.skip("this file system has no reflinks (Btrfs, XFS and ZFS do)")
    store = Path(shutil.copytree(cache_of(ran), tmp_path / "cache"))
    clone = clone_of(ran, tmp_path / "clone", f"type = {kind}", cache=store)
    run(clone, "dvc", "checkout")
    weights = sorted((clone / "build" / CHECKPOINT).glob("*.safetensors"))
    assert {kind_of(path, store) for path in weights} == {"copy" if kind == "reflink" else kind}
    if kind in ("hardlink", "symlink"):
        assert {path.stat().st_mode & 0o777 for path in weights} == {0o444}
    before = tree(clone / "build" / CHECKPOINT)
    change_params(clone, *CHANGE)
    monkeypatch.chdir(clone)
    build(*STEPS)
    assert tree(clone / "build" / CHECKPOINT) != before
    assert not any(path.is_symlink() for path in (clone / "build" / CHECKPOINT).iterdir())
    assert damaged(store) == []
    change_params(clone, CHANGE[0], WANDA["selection"])
    run(clone, "dvc", "checkout", "--force")
    assert tree(clone / "build" / CHECKPOINT) == before


def test_two_clones_share_a_cache_and_hold_a_model_once(ran: Path, tmp_path: Path) -> None:
    """With the commands of docs/sharing.md and the link types of .dvc/config. Oracle: the file that
    a clone computed, the other clone's and the cache's are one inode.
    """
    store = Path(shutil.copytree(cache_of(ran), tmp_path / "team"))
    earlier = set(store.rglob("*"))
    first, second = (
        clone_of(ran, tmp_path / name, f"type = {SHIPPED['cache']['type']}") for name in ("first", "second")
    )
    for clone in (first, second):
        run(clone, "dvc", "cache", "dir", "--local", str(store))
        run(clone, "dvc", "config", "--local", "cache.shared", "group")
        assert executed(run(clone, "dvc", "repro")) == set()
        change_params(clone, *CHANGE)
    assert executed(run(first, "dvc", "repro")) == CONCERNED
    assert executed(run(second, "dvc", "repro")) == set()
    assert same_results(first, second)
    assert damaged(store) == []
    weights = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in objects(store)}
    for clone in (first, second):
        for path in (clone / "build" / CHECKPOINT).glob("*.safetensors"):
            assert path.samefile(weights[hashlib.sha256(path.read_bytes()).hexdigest()]), path
    modes: dict[str, set[int]] = {"directory": set(), "object": set()}
    for path in set((store / "files").rglob("*")) - earlier:
        modes["directory" if path.is_dir() else "object"].add(path.stat().st_mode & 0o7777)
    assert modes == {"directory": {0o2775}, "object": {0o444}}  # the group may add objects, nobody change one


def test_a_second_clone_of_what_is_shipped_computes_nothing(tmp_path: Path) -> None:
    """The tracked files, the embedded model and, of the variants, one that needs few stages.
    Oracle: DVC's account of both clones.

    A dvc.lock among them would name outputs that no cache has, and then DVC looks no further.
    """
    shipped = tmp_path / "shipped"
    for name in subprocess.run(
        ("git", "ls-files"), cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if (ROOT / name).exists() and not name.startswith(("benchmarks/", "docs/")):
            (shipped / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, shipped / name)
    assert not (shipped / "dvc.lock").exists()
    change_params(shipped, "variants", {"magnitude": read_params(ROOT)["variants"]["magnitude"]})
    change_params(shipped, "report.baseline", "magnitude")
    run(shipped, "git", "init", "--quiet", "--initial-branch", "main")
    run(shipped, "git", "config", "user.name", "test")
    run(shipped, "git", "config", "user.email", "test@localhost")
    commit(shipped)
    first, second = (
        clone_of(shipped, tmp_path / name, cache=tmp_path / "cache") for name in ("first", "second")
    )
    computed = executed(run(first, "dvc", "repro", "evaluate@magnitude"))
    assert {"prepare", "prune@magnitude", "evaluate@magnitude"} <= computed
    again = run(second, "dvc", "repro", "evaluate@magnitude")
    assert (executed(again), restored(again)) == (set(), computed)
    assert same_results(first, second)


# Several machines: remotes


class Remote(NamedTuple):
    config: tuple[str, ...]  # sections of .dvc/config.local
    stored: Callable[[], int]  # how many files the server holds
    directory: Path | None  # of the remote itself, where its files are as DVC wrote them


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(ready: Callable[[], bool], server: subprocess.Popen[Any], log: Path) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert server.poll() is None, log.read_text(encoding="utf-8")
        assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[Remote]:
    """OpenSSH's own server, with keys of its own, for this user alone."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None:
        pytest.skip("no sshd on this machine (Debian: apt-get install openssh-server)")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it as root; its service makes it
    home, port = tmp_path / "ssh", free_port()
    home.mkdir()
    for key in ("host", "user"):
        run(home, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": home / "host",
        "AuthorizedKeysFile": home / "user.pub",
        "PidFile": "none",
        "StrictModes": "no",  # a test's directory may lie below one that others can write to
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "Subsystem": "sftp internal-sftp",
    }
    (home / "sshd_config").write_text(
        "".join(f"{key} {value}\n" for key, value in settings.items()), encoding="utf-8"
    )
    store = home / "store"
    section = (
        (
            f"['remote \"team\"']\nurl = ssh://127.0.0.1:{port}{store}\nuser = {getpass.getuser()}\nkeyfile ="
            f" {home / 'user'}"
        ),
    )
    with (home / "log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen((sshd, "-D", "-e", "-f", str(home / "sshd_config")), stdout=log, stderr=log)
        try:
            wait_for(lambda: listens(port), server, home / "log")
            yield Remote(section, lambda: len(objects(store)), store)
        finally:
            server.terminate()
            server.wait()


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[Remote]:
    """OpenStack Swift with its S3 interface: a real server, in a process of its own (tests/s3_server.py)."""
    if importlib.util.find_spec("swift") is None:
        pytest.skip("no S3 server in this environment (pip install -e .[dev])")
    home = tmp_path / "s3"
    home.mkdir()
    with (home / "log").open("w", encoding="utf-8") as log:
        command = (sys.executable, "-W", "ignore", str(ROOT / "tests" / "s3_server.py"), str(home))
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for((home / "port").exists, server, home / "log")
            endpoint = f"http://127.0.0.1:{(home / 'port').read_text()}"
            section = (
                (
                    f"['remote \"team\"']\nurl = s3://models/sparseline\nendpointurl = {endpoint}\nregion ="
                    " us-east-1"
                ),
                "access_key_id = test:tester\nsecret_access_key = testing",
            )
            make = (
                "import sys, s3fs; s3fs.S3FileSystem(endpoint_url=sys.argv[1], key='test:tester',"
                " secret='testing').mkdir('models')"
            )
            run(home, "python", "-c", make, endpoint)
            yield Remote(section, lambda: len(list(home.glob("disk/objects/**/*.data"))), None)
        finally:
            server.terminate()
            server.wait()


def kill_when(project: Path, *command: str, enough: Callable[[], bool]) -> None:
    """SIGKILL in the middle of a transfer."""
    with (project.parent / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=project, env=environment(project), stdout=log, stderr=log)
        try:
            wait_for(enough, process, project.parent / "log")
        finally:
            process.kill()
            process.wait()
    assert process.returncode == -9


@pytest.mark.parametrize("kind", ["ssh", "s3"])
def test_an_empty_clone_pulls_what_another_computed(
    ran: Path, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    """Push and pull are both killed half-way first. Then nothing is computed, and after a changed
    parameter only what depends on it.
    """
    remote: Remote = request.getfixturevalue(kind)
    first = clone_of(ran, tmp_path / "first", *remote.config, cache=cache_of(ran))
    everything = len(objects(cache_of(ran)))  # of which the runs that other tests added are not pushed
    push, pull = ("dvc", "push", "--run-cache", "--jobs", "1"), ("dvc", "pull", "--run-cache", "--jobs", "1")
    kill_when(first, *push, enough=lambda: remote.stored() >= everything // 6)
    half = remote.stored()
    if remote.directory:
        assert len(objects(remote.directory)) < everything
        assert damaged(remote.directory) == []
    run(first, *push)
    assert remote.stored() > half
    if remote.directory:
        assert damaged(remote.directory) == []

    second = clone_of(ran, tmp_path / "second", *remote.config)
    store = tmp_path / "second.dvc" / "cache"
    kill_when(second, *pull, enough=lambda: len(objects(store)) >= everything // 6)
    assert damaged(store) == []
    run(second, *pull)
    assert damaged(store) == []
    assert executed(run(second, "dvc", "repro")) == set()
    assert same_results(ran, second)
    if kind == "ssh":  # what is computed does not depend on the remote, and what was pulled is enough for it
        change_params(second, *CHANGE)
        assert stale(second) == {"allocate@wanda", "prune@wanda", "report"}
        with chdir(second):
            build("allocate wanda", "prune wanda", "evaluate wanda", "choose", "report")


def test_a_clone_without_lock_file_finds_the_runs(ran: Path, tmp_path: Path, ssh: Remote) -> None:
    """A branch that never ran: `dvc fetch --run-cache`, then `dvc repro --pull`. The report's
    figures are in git, not in the cache, so that the report, and it alone, is written again.
    """
    first = clone_of(ran, tmp_path / "first", *ssh.config, cache=cache_of(ran))
    run(first, "dvc", "push", "--run-cache")
    second = clone_of(ran, tmp_path / "second", *ssh.config)
    (second / "dvc.lock").unlink()
    run(second, "dvc", "fetch", "--run-cache")
    output = run(second, "dvc", "repro", "--pull")
    assert executed(output) == {"report"}
    assert restored(output) == ALL - {"report"}
    assert same_results(second, ran)


def test_what_git_ignores_is_in_the_cache() -> None:
    """DVC pushes cached outputs only: one that is neither in the cache nor in git makes every clone
    run its stage again, as `keys` is to.
    """
    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].values()
    uncached = [
        path
        for stage in (stage.get("do", stage) for stage in stages)
        for out in (
            out
            for kind in ("outs", "metrics", "plots")
            for out in stage.get(kind, [])
            if isinstance(out, dict)
        )
        for path, options in out.items()
        if options.get("cache") is False
    ]
    ignored = subprocess.run(
        ("git", "check-ignore", "--no-index", *uncached),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ignored.stdout.splitlines() == ["build/keys"]
    assert uncached == ["build/keys", "report/summary.json"]
