"""Kills: a stage or a `dvc repro` gets a signal at a random moment, then the same command runs
again. Oracle: a run that nobody disturbed.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from campaign import (
    COMMANDS,
    QUANTISED,
    Ended,
    Fault,
    Ground,
    Kind,
    Tried,
    fork,
    orphans,
    outcome,
    outputs,
    own_traceback,
    remains,
    stage,
    tail,
)
from project import SPARSELINE, environment, make_project, preloaded, run

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MARGIN = 1.1  # kills come within so many times an undisturbed run's duration
# each kind of step
ALL = SPARSELINE | {"quantization": QUANTISED["quantization"], "reconstruction": QUANTISED["reconstruction"]}
WAIT = 300.0  # seconds for what nobody kills


def spoken(ended: Ended, number: signal.Signals, early: bool) -> list[Fault]:
    """How a stage ends by a signal: its code and one line. ``early``: before it is ready for
    signals, the system's way is right too.
    """
    if own_traceback(ended.output):
        return [Fault("tracebacks", f"{number.name}: a traceback\n{ended.output[-1500:]}")]
    if ended.code in (0, -number) if number == signal.SIGKILL or early else ended.code == 0:
        return []
    if (
        early
        and number == signal.SIGINT
        and ended.code == 1
        and ended.output.rstrip().endswith("KeyboardInterrupt")
    ):
        return []  # while Python itself starts
    errors = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    if ended.code != 128 + number:
        return [Fault("tracebacks", f"{number.name}: exit code {ended.code}\n{tail(ended.output)}")]
    if len(errors) != 1 and not (early and not errors):
        return [Fault("wrong", f"{number.name}: {len(errors)} error lines\n{tail(ended.output)}")]
    return []


def between(before: dict[str, str], found: dict[str, str], after: dict[str, str]) -> list[Fault]:
    """Files under their final names must be an earlier run's or whole."""
    shown = {
        path: digest
        for path, digest in found.items()
        if not any(part.startswith(".") for part in Path(path).parts)
    }
    wrong = sorted(
        path for path, digest in shown.items() if digest not in (before.get(path), after.get(path))
    )
    return [Fault("wrong", f"half-written: {wrong[:3]}")] if wrong else []


def compared(found: dict[str, str], undisturbed: dict[str, str]) -> list[Fault]:
    """The second run's results."""
    lost = sorted(undisturbed.keys() - found.keys())
    differ = sorted(path for path in found if found[path] != undisturbed.get(path))
    faults = [Fault("lost", f"missing after the second run: {lost[:3]}")] if lost else []
    return faults + ([Fault("wrong", f"differ after the second run: {differ[:3]}")] if differ else [])


class KillStage:
    """A stage by hand: every other time a process of its own, else a fork, in which the work is
    most of the time.
    """

    def __init__(self, ground: Ground, name: str) -> None:
        self.name, self._ground = f"kill-{name}", ground
        self._commands = [command for command in COMMANDS if command.split()[0] == name]
        self._durations: dict[tuple[str, bool], float] = {}

    def attempt(self, number: int, draw: random.Random, place: Path) -> Tried:
        command, real, sent = draw.choice(self._commands), number % 2 == 0, draw.choice(SIGNALS)
        after = draw.random() * MARGIN * self._duration(command, real)
        project = self._ground.copy(place)
        if cleared := draw.random() < 0.5:
            for path in outputs(command):
                (
                    shutil.rmtree(project / path)
                    if (project / path).is_dir()
                    else (project / path).unlink(missing_ok=True)
                )
        before = outcome(project)
        ended = self._killed(place, command, real, (after, sent))
        early = real or after < 0.1
        faults = spoken(ended, sent, early) + orphans(place)
        faults += between(before, outcome(project), self._ground.undisturbed)
        again = fork(stage(place, command), WAIT)
        faults += (
            [Fault("wrong", f"the second run ended with {again.code}\n{tail(again.output)}")]
            if again.code != 0
            else []
        )
        faults += compared(outcome(project), self._ground.undisturbed) + remains(place)
        how = (
            f"{command}, {'a process' if real else 'a fork'}, {sent.name} after"
            f" {after:.2f} s{', nothing there' if cleared else ''}"
        )
        return Tried(how, faults)

    def _duration(self, command: str, real: bool) -> float:
        if (command, real) not in self._durations:
            place, begun = self._ground.home / f"{self.name}-undisturbed", time.monotonic()
            self._ground.copy(place)
            begun = time.monotonic()
            ended = self._killed(place, command, real, None)
            self._durations[command, real] = time.monotonic() - begun
            assert ended.code == 0, ended.output
            assert not compared(outcome(place / "project"), self._ground.undisturbed), command
            shutil.rmtree(place)
        return self._durations[command, real]

    def _killed(
        self, place: Path, command: str, real: bool, kill: tuple[float, signal.Signals] | None
    ) -> Ended:
        if not real:
            return fork(stage(place, command), WAIT, kill)
        name, *arguments = command.split()
        return signalled(place, ["python", "-m", f"stages.{name}", *arguments], kill)


def signalled(
    place: Path,
    command: Sequence[str],
    kill: tuple[float, signal.Signals] | None,
    group: bool = False,
    settings: Mapping[str, str] | None = None,
) -> Ended:
    """A process that gets a signal after so many seconds, alone or with its group."""
    environ = environment(place / "project") | {"TMPDIR": str(place / "tmp")} | dict(settings or {})
    with (place / "log").open("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=place / "project", env=environ, stdout=log, stderr=log, start_new_session=True
        )
        code: int | None = None
        with suppress(subprocess.TimeoutExpired):
            if kill is not None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(kill[0])
                with suppress(ProcessLookupError):
                    (os.killpg if group else os.kill)(process.pid, kill[1])
            code = process.wait(WAIT)
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        _wait_for_group(process.pid)
    return Ended(code, (place / "log").read_text(encoding="utf-8", errors="replace"))


def _wait_for_group(number: int, seconds: float = 15) -> None:
    """Wait until the system has removed a killed group. DVC counts a process that has ended, but is
    still listed, as running.
    """
    deadline = time.monotonic() + seconds
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(number, 0)
            time.sleep(0.02)


class KillRepro:
    """`dvc repro`, from nothing or from a state half way."""

    HALF_WAY = ("", "scale", "prune@all")

    def __init__(self, ground: Ground, name: str, command: Sequence[str]) -> None:
        self.name, self._ground, self._command = name, ground, command
        self._home = ground.home / name
        self._durations: dict[int, float] = {}
        self._undisturbed: dict[str, str] = {}

    def attempt(self, number: int, draw: random.Random, place: Path) -> Tried:
        self._prepare()
        state, sent, group = draw.randrange(len(self.HALF_WAY)), draw.choice(SIGNALS), draw.random() < 0.5
        after = draw.random() * MARGIN * self._duration(state)
        project = self._copy(state, place)
        before = outcome(project)
        ended = signalled(place, self._command, (after, sent), group)
        faults = orphans(place)
        if own_traceback(ended.output):
            faults.append(Fault("tracebacks", f"a traceback\n{ended.output[-1500:]}"))
        faults += between(before, outcome(project), self._undisturbed)
        again = signalled(place, ["dvc", "repro"], None, settings=preloaded())
        faults += (
            [Fault("wrong", f"the second run ended with {again.code}\n{tail(again.output)}")]
            if again.code != 0
            else []
        )
        faults += compared(outcome(project), self._undisturbed) + remains(place)
        lock = project / ".dvc/tmp/rwlock"
        held = (
            [
                pid
                for pid in map(int, re.findall(r'"pid": (\d+)', lock.read_text(encoding="utf-8")))
                if psutil.pid_exists(pid)
            ]
            if lock.exists()
            else []
        )
        # DVC passes over those of the dead
        faults += [Fault("lost", f"rwlock: {pid} lives")] if (pid := next(iter(held), None)) else []
        if sent != signal.SIGKILL:
            faults += [
                Fault("lost", f"left behind: {path.name}") for path in (place / "tmp").glob("sparseline-*")
            ]
        who = "the group" if group else "the command alone"
        return Tried(
            f"{' '.join(self._command)} after {self.HALF_WAY[state] or 'nothing'}, {sent.name} to {who} after"
            f" {after:.1f} s",
            faults,
        )

    def _prepare(self) -> None:
        """A project in each of the states, and what it comes to."""
        if self._undisturbed:
            return
        project = make_project(
            self._home / "0" / "project", variants={"all": ALL}, report={"baseline": "all"}
        )
        config = "[core]\n    analytics = false\n    check_update = false\n    site_cache_dir = ../site\n"
        (project / ".dvc" / "config").write_text(config, encoding="utf-8")
        for number, target in enumerate((*self.HALF_WAY[1:], ""), 1):
            shutil.copytree(self._home / str(number - 1), self._home / str(number), symlinks=True)
            run(self._home / str(number) / "project", "dvc", "repro", *([target] if target else []))
        self._undisturbed = outcome(self._home / str(len(self.HALF_WAY)) / "project")

    def _duration(self, state: int) -> float:
        if state not in self._durations:
            place = self._ground.home / f"{self.name}-undisturbed"
            project, begun = self._copy(state, place), time.monotonic()
            ended = signalled(place, self._command, None)
            assert ended.code == 0 and not compared(outcome(project), self._undisturbed), ended.output
            self._durations[state] = time.monotonic() - begun
            shutil.rmtree(place)
        return self._durations[state]

    def _copy(self, state: int, place: Path) -> Path:
        place.mkdir(exist_ok=True)
        (place / "tmp").mkdir()
        return Path(shutil.copytree(self._home / str(state) / "project", place / "project", symlinks=True))


def kinds(ground: Ground) -> list[Kind]:
    stages = list(dict.fromkeys(command.split()[0] for command in COMMANDS))
    whole = {"kill-dvc": ("dvc", "repro"), "kill-preload": ("python", "-m", "stages.preload", "dvc", "repro")}
    return [
        *(KillStage(ground, name) for name in stages),
        *(KillRepro(ground, name, command) for name, command in whole.items()),
    ]
