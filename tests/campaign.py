"""Kills at random moments and hostile inputs: `python tests/campaign.py all --minutes 10`. Each
finding is printed with its reproducer.

Oracles: an undisturbed run's bytes; exit codes and the one error line; what else lies in and beside
the project, before and after.
"""

import hashlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

ROOT = Path(__file__).parent.parent
sys.path.insert(1, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import click  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from project import SPARSELINE, WANDA, build, environment, make_workspace, moved  # noqa: E402
from ruamel.yaml import YAML  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

LIMIT = 20.0  # seconds for one command
MEMORY = 8 * 2**30  # of address space, above what this process has
FILE_SIZE = "CAMPAIGN_FILE_SIZE"  # environment variable: bytes that a file may have
SAID = 2**20  # bytes of output that are kept
ASKED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # to end
Oracle = Literal["tracebacks", "wrong", "lost"]
QUANTISED: dict[str, Any] = {
    "induce": {},
    "quantization": {"bits": 4, "group": 20, "symmetric": False},
    "reconstruction": {
        "steps": ["obs", "lsq", "finetune"],
        "statistics": "per_site",
        "dense_target": 1.0,
        "lsq": {"iterations": 5},
        "finetune": {"window": 2},
    },
    "export": ["dense", "bitmask"],
}
VARIANTS = {"wanda": WANDA | {"candidate": True}, "sparseline": SPARSELINE, "quantised": QUANTISED}
SHARED = (
    "keys",
    "prepare",
    "text calibration",
    "text validation",
    "text test",
    "calibrate",
    "scale",
    "sensitivity",
)
OF_VARIANTS = tuple(
    f"{stage} {name}"
    for name in VARIANTS
    for stage in ("curves", "allocate", "induce", "prune", "distil", "evaluate", "tasks")
)
EXPORTS = tuple(f"export {name}" for name in VARIANTS)
COMMANDS = (*SHARED, *OF_VARIANTS, "evaluate dense", "tasks dense", *EXPORTS, "choose", "report")


class Fault(NamedTuple):
    """Something that an oracle saw."""

    oracle: Oracle
    what: str


class Ended(NamedTuple):
    """How a command ended: its exit code as `subprocess` has it, None where it ran past its time."""

    code: int | None
    output: str


class Tried(NamedTuple):
    name: str
    faults: list[Fault]


class Kind(Protocol):
    """One kind of disturbance."""

    name: str

    def attempt(self, number: int, draw: random.Random, place: Path) -> Tried:
        """The case of this number in the empty directory ``place``: named ones first, then random ones."""


@dataclass
class Ground:
    """A finished project and what is known of it; cases take copies."""

    home: Path
    project: Path = field(init=False)
    undisturbed: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self.project = make_workspace(
            self.home / "ground" / "project", model={"layers": 3}, variants=VARIANTS
        )
        with moved(self.project, environment(self.project)):
            build(*COMMANDS)
        shutil.rmtree(self.project.parent / "scratch")
        self.undisturbed = outcome(self.project)

    def copy(self, place: Path) -> Path:
        """The project in ``place``, and beside it what nobody may touch."""
        (place / "outside").mkdir(parents=True)
        (place / "tmp").mkdir()
        (place / "outside" / "sentinel").write_text("not yours", encoding="utf-8")
        return Path(shutil.copytree(self.project, place / "project", symlinks=True))


def new_home() -> Path:
    """A directory, in memory if there is room: most of the time would go into copies otherwise."""
    memory = Path("/dev/shm")
    return Path(
        tempfile.mkdtemp(
            prefix="campaign-",
            dir=memory if memory.is_dir() and shutil.disk_usage(memory).free > 2**31 else None,
        )
    )


# Commands


def fork(
    work: Callable[[], object], limit: float = LIMIT, kill: tuple[float, signal.Signals] | None = None
) -> Ended:
    """Run ``work`` in a fork of this process, in a session of its own, within limits of time and memory.

    Args:
        kill: after so many seconds this signal is sent.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        _run(work, writing)
    os.close(writing)
    begun, output, status, watched = time.monotonic(), bytearray(), None, os.pidfd_open(child)
    while status is None and (now := time.monotonic()) < begun + limit:
        if kill and now >= begun + kill[0]:
            os.kill(child, kill[1])
            kill = None
        ready, _, _ = select.select(
            [reading, watched], [], [], min(begun + limit, begun + kill[0] if kill else begun + limit) - now
        )
        if watched in ready:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        elif reading in ready and not _take(reading, output):  # closed, not ended
            select.select([watched], [], [], min(0.01, limit))
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # whoever is left of its session
    if status is None:
        os.waitpid(child, 0)
    while _take(reading, output):
        pass
    os.close(reading)
    os.close(watched)
    return Ended(status, output.decode("utf-8", errors="replace"))


def _take(pipe: int, output: bytearray) -> bool:
    """Read on; whether there was something. Of very much the beginning is kept."""
    part = os.read(pipe, 2**16)
    if len(output) < SAID:
        output += part
    return bool(part)


def _run(work: Callable[[], object], writing: int) -> None:
    """In the fork: whatever comes, it ends here."""
    code: Any = 3
    try:
        os.setsid()
        for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, writing), (2, writing)):
            os.dup2(source, descriptor)
        os.close(writing)
        for number in ASKED:
            signal.signal(number, signal.SIG_DFL)  # as a stage has it before its body
        sys.stdout, sys.stderr = (
            open(at, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            for at in (1, 2)
        )
        most = psutil.Process().memory_info().vms + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def stage(place: Path, command: str, environ: Mapping[str, str | None] | None = None) -> Callable[[], None]:
    """What ``fork`` is to run: a stage in the project of ``place``; with ``load <directory>`` a
    bitmask checkpoint is loaded.
    """

    def work() -> None:
        os.chdir(place / "project")
        changed = environment(place / "project") | {"TMPDIR": str(place / "tmp")} | dict(environ or {})
        os.environ.clear()
        os.environ |= {name: value for name, value in changed.items() if value is not None}
        tempfile.tempdir = None
        if size := os.environ.pop(FILE_SIZE, None):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
        name, *arguments = command.split(" ")
        if name == "load":
            _load(Path(arguments[0]))
        else:
            sys.argv = sys.orig_argv = ["-m", f"stages.{name}", *arguments]
            import_module(f"stages.{name}").main(arguments)

    return work


def _load(directory: Path) -> None:
    from pipeline_lib.core import runtime
    from pipeline_lib.export.load import load_model, tensors

    with runtime.told():
        load_model(directory)
        digest = hashlib.sha256()
        for name, tensor in sorted(tensors(directory)):
            digest.update(
                f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
                + tensor.contiguous().view(torch.uint8).numpy().tobytes()
            )
        print(f"digest {digest.hexdigest()}")


# Oracles


def snapshot(place: Path, *skipped: str) -> dict[str, str]:
    """Path -> what lies there, of everything below but directories, without opening anything but
    regular files.
    """
    found = {}
    for folder, below, names in os.walk(place):
        here = os.path.relpath(folder, place)
        below[:] = [name for name in below if os.path.normpath(f"{here}/{name}") not in skipped]
        for path in (Path(folder, name) for name in (*names, *below)):
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                found[str(path.relative_to(place))] = f"link {path.readlink()}"
            elif stat.S_ISREG(status.st_mode):
                found[str(path.relative_to(place))] = _digest(
                    path, status.st_ino, status.st_size, status.st_mtime_ns
                )
            elif not stat.S_ISDIR(status.st_mode):
                found[str(path.relative_to(place))] = f"mode {status.st_mode:o}"
    return found


@lru_cache(maxsize=10_000)
def _digest(path: Path, *_known: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(project: Path) -> dict[str, str]:
    """What DVC tracks of build/ and report/, and what lies there that should not, costs aside."""
    found = {
        f"{folder}/{path}": digest
        for folder in ("build", "report")
        for path, digest in snapshot(project / folder).items()
    }
    return {
        path: digest
        for path, digest in found.items()
        if not path.startswith(("build/costs/", "report/costs.js"))
    }


@cache
def outputs(command: str) -> tuple[str, ...]:
    """Where a stage may write, by dvc.yaml: patterns."""
    name, _, key = command.partition(" ")
    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    described = stages.get(f"{name}-dense" if key == "dense" else name, {})
    described = described.get("do", described)
    entries = [entry for part in ("outs", "plots", "metrics") for entry in described.get(part, [])]
    names = [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]
    return tuple(name.replace("${key}", key).replace("${item.use}", "*") for name in names)


def belongs(path: str, command: str) -> bool:
    """Whether a path below the project is one of a stage's outputs."""
    return any(fnmatchcase(path, out) or fnmatchcase(path, f"{out}/*") for out in outputs(command))


def judge(ended: Ended) -> list[Fault]:
    """Exit code, error line and tracebacks; without a signal."""
    errors = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    if ended.code is None:
        return [Fault("wrong", f"ran past its time\n{tail(ended.output)}")]
    if ended.code not in (0, 2, *(128 + number for number in ASKED)) or own_traceback(ended.output):
        return [Fault("tracebacks", f"exit code {ended.code}\n{tail(ended.output)}\n{_bug(ended.output)}")]
    if ended.code and len(errors) != 1:
        return [Fault("wrong", f"{len(errors)} error lines\n{tail(ended.output)}")]
    return []


def own_traceback(output: str) -> bool:
    """Ctrl-C before a stage's own first line gives Python's traceback, and DVC has its own."""
    return (
        "Traceback (most recent" in output
        and re.search(r'File ".*(pipeline_lib|stages)/', output) is not None
    )


def tail(output: str) -> str:
    return "\n".join(output.splitlines()[-6:])[-1200:]


def _bug(output: str) -> str:
    """Where a bug was, from the file that the error names."""
    named = re.search(r"Attach (\S+\.txt) to", output)
    with suppress(OSError):
        text = Path(named[1]).read_text(encoding="utf-8") if named else output
        frames = re.findall(r'File "\S*?((?:pipeline_lib|stages)/\S+)", line (\d+), in (\S+)', text)
        return f"at {' '.join(frames[-1])}: {text.strip().splitlines()[-1][:300]}" if frames else ""
    return ""


def unsound(path: Path) -> str:
    """What is wrong with an output that no other can be compared with: JSON and numbers that are none."""
    # which are the source's own, verbatim
    if path.suffix == ".json" and path.parent.name not in ("checkpoint", "dense"):
        try:
            json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        except ValueError as error:
            return f"{path.name}: {error}"
    if path.suffix == ".safetensors" and path.is_file():
        tensors = load_file(path).items()
        infinite = [
            name
            for name, tensor in tensors
            if tensor.is_floating_point() and not bool(tensor.isfinite().all())
        ]
        return f"{path.name}: {infinite[0]} is not finite" if infinite else ""
    return ""


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def remains(place: Path) -> list[Fault]:
    """Temporary files and locks that nobody will remove."""
    scratch = place / "scratch"
    left = (
        []
        if scratch.is_symlink()
        else [path for path in scratch.rglob("*") if path.is_file() or path.is_symlink()]
    )
    left += [path for path in (place / "project").rglob(".*.partial") if ".git" not in path.parts]
    return [Fault("lost", f"left behind: {path.relative_to(place)}") for path in left[:3]]


def orphans(place: Path, seconds: float = 15) -> list[Fault]:
    """Processes whose current directory is in a case's place; they are ended."""
    deadline = time.monotonic() + seconds
    while (found := list(_within(place))) and time.monotonic() < deadline:
        time.sleep(0.05)
    told = []
    for process in found:
        with suppress(psutil.Error):
            told.append(Fault("lost", f"process {process.pid} lives on: {' '.join(process.cmdline())[:200]}"))
            process.kill()
    return told


def _within(place: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if (
                Path(process.cwd()).is_relative_to(place)
                and process.status() != psutil.STATUS_ZOMBIE
                and process.pid != os.getpid()
            ):
                yield process


# The campaign


@dataclass
class Tally:
    """What is recorded of a kind."""

    kind: str
    seed: int
    tried: int = 0
    tracebacks: int = 0
    wrong: int = 0
    lost: int = 0
    slowest_s: float = 0.0

    def add(self, faults: Sequence[Fault], seconds: float) -> None:
        """One case: each oracle counts once."""
        self.tried += 1
        self.slowest_s = round(max(self.slowest_s, seconds), 1)
        for count in {fault.oracle for fault in faults}:
            setattr(self, count, getattr(self, count) + 1)

    @property
    def clean(self) -> bool:
        return not (self.tracebacks or self.wrong or self.lost)


def attempt(kind: Kind, seed: int, number: int, home: Path, tally: Tally, keep: bool = False) -> Tried:
    """One case in a directory of its own, which is removed."""
    place, begun = home / f"{kind.name}-{number}", time.monotonic()
    place.mkdir()
    tried = kind.attempt(number, random.Random(f"{kind.name} {seed} {number}"), place)
    tally.add(tried.faults, time.monotonic() - begun)
    if not keep:
        shutil.rmtree(place, ignore_errors=True)
    for fault in tried.faults:
        click.echo(f"\nFINDING {kind.name} {tried.name!r}: {fault.oracle}: {fault.what}")
        click.echo(
            f"again: python tests/campaign.py {kind.name.partition('-')[0]} --kind {kind.name} --seed"
            f" {seed} --only {number}"
        )
    return tried


def merge(path: Path, tallies: Sequence[Tally]) -> None:
    """Add tallies to a record, which has one entry for each kind and seed."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    for tally in (tally for tally in tallies if tally.tried):
        old = next(
            (entry for entry in entries if (entry["kind"], entry["seed"]) == (tally.kind, tally.seed)), None
        )
        if old is None:
            entries.append(vars(tally) | {"commit": commit})
            continue
        old |= {name: old[name] + getattr(tally, name) for name in ("tried", "tracebacks", "wrong", "lost")}
        old |= {"slowest_s": max(old["slowest_s"], tally.slowest_s), "commit": commit}
    path.write_text(
        json.dumps(sorted(entries, key=lambda one: (one["kind"], one["seed"])), indent=1) + "\n",
        encoding="utf-8",
    )


@click.command(help=__doc__)
@click.argument("what", type=click.Choice(["kill", "fuzz", "all"]))
@click.option("--minutes", type=float, help="for all kinds together")
@click.option("--count", type=int, help="cases of each kind")
@click.option("--seed", type=int, help="default: a random one, which is printed")
@click.option("--kind", "names", multiple=True, help="only these kinds")
@click.option("--only", "only", type=int, help="only the case of this number; its directory is kept")
@click.option(
    "--record", type=click.Path(path_type=Path), help="add to this file: benchmarks/results/campaign.json"
)
@click.option(
    "--atheris", "guided", is_flag=True, help="bitmask files guided by coverage, too (pip install atheris)"
)
def main(
    what: str,
    minutes: float | None,
    count: int | None,
    seed: int | None,
    names: tuple[str, ...],
    only: int | None,
    record: Path | None,
    guided: bool,
) -> None:
    import fuzz
    import kills

    seed = random.randrange(2**31) if seed is None else seed
    click.echo(f"seed {seed}")
    os.nice(5)
    os.environ["HF_DATASETS_CACHE"] = cached = tempfile.mkdtemp(prefix="campaign-cache-")
    home = new_home()
    ground = Ground(home)
    sys.excepthook = sys.__excepthook__  # which the stages have replaced by theirs
    kinds = [
        kind
        for module, make in (("kill", kills.kinds), ("fuzz", fuzz.kinds))
        if what in (module, "all")
        for kind in make(ground)
    ]
    kinds = [kind for kind in kinds if not names or kind.name in names]
    tallies = {kind.name: Tally(kind.name, seed) for kind in kinds}
    if only is not None:
        for kind in kinds:
            tried = attempt(kind, seed, only, home, tallies[kind.name], keep=True)
            click.echo(f"{kind.name} {only}: {tried.name}: {len(tried.faults)} findings; {home}")
    else:
        _rounds(
            kinds, seed, home, tallies, count, None if minutes is None else time.monotonic() + 60 * minutes
        )
        if guided:
            tallies |= {tally.kind: tally for tally in fuzz.guided(ground, seed, 60 * (minutes or 1))}
        shutil.rmtree(home, ignore_errors=True)
    shutil.rmtree(cached, ignore_errors=True)
    for tally in tallies.values():
        click.echo(json.dumps(vars(tally)))
    if record:
        merge(record, list(tallies.values()))
    sys.exit(not all(tally.clean for tally in tallies.values()))


def _rounds(
    kinds: Sequence[Kind],
    seed: int,
    home: Path,
    tallies: dict[str, Tally],
    count: int | None,
    until: float | None,
) -> None:
    """Each kind gets as much time as any other, or as many cases."""
    spent = dict.fromkeys((kind.name for kind in kinds), 0.0)
    limit = count if count is not None or until is not None else 100
    while left := [kind for kind in kinds if limit is None or tallies[kind.name].tried < limit]:
        if until is not None and time.monotonic() > until:
            return
        kind, begun = min(left, key=lambda kind: spent[kind.name]), time.monotonic()
        attempt(kind, seed, tallies[kind.name].tried, home, tallies[kind.name])
        spent[kind.name] += time.monotonic() - begun


if __name__ == "__main__":
    from campaign import main as run  # the module that the kinds import, not a second one

    run()
