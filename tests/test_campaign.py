"""A short campaign with a fixed seed, and that its oracles notice what they are for."""

import random
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzz
import kills
import pytest
import torch
from campaign import Ended, Fault, Ground, Kind, Tally, attempt, merge, new_home, orphans

from pipeline_lib.core import artifacts, seals
from pipeline_lib.jobs import prune

pytestmark = pytest.mark.short_campaign
SEED = 4
# Of each kind so many, half of them named ones where there are any.
CASES = {
    "params": 26,
    "text": 10,
    "model": 24,
    "artifact": 26,
    "scratch": 8,
    "bitmask": 32,
    "environment": 20,
}
KILLS = {"kill-prune": 2, "kill-induce": 1, "kill-text": 1}


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    home, threads = new_home(), torch.get_num_threads()
    yield Ground(home)
    torch.set_num_threads(threads)
    shutil.rmtree(home)


@pytest.fixture
def home(ground: Ground) -> Path:
    """Where cases have their directories."""
    return Path(tempfile.mkdtemp(dir=ground.home))


def kind_of(ground: Ground, name: str) -> Kind:
    return next(kind for kind in (*fuzz.kinds(ground), *kills.kinds(ground)) if kind.name == name)


def tally_of(ground: Ground, name: str, numbers: list[int], home: Path) -> Tally:
    kind, tally = kind_of(ground, name), Tally(name, SEED)
    for number in numbers:
        attempt(kind, SEED, number, home, tally)
    return tally


@pytest.mark.parametrize("name", CASES)
def test_hostile_inputs_are_taken_or_refused(ground: Ground, home: Path, name: str) -> None:
    kind = kind_of(ground, f"fuzz-{name}")
    assert isinstance(kind, fuzz.Fuzz)
    named = len(kind.named)
    numbers = random.Random(SEED).sample(range(named), min(named, CASES[name] // 2))
    numbers += range(named, named + CASES[name] - len(numbers))
    assert tally_of(ground, kind.name, numbers, home).clean


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_stage_gives_the_same_results(ground: Ground, home: Path, name: str) -> None:
    assert tally_of(ground, name, list(range(KILLS[name])), home).clean


# The oracles' power


def spoilt(raw: bytes) -> bytes:
    return raw.replace(b"0.", b"1.", 1)


def astray(*_: Any) -> str:
    Path("../outside/sentinel").write_text("mine", encoding="utf-8")
    return ""


def bug(*_: Any) -> str:
    raise ZeroDivisionError


@pytest.mark.parametrize(("count", "place", "name", "instead"), [
    ("wrong", seals, "close", lambda raw, close=seals.close: close(spoilt(raw))),
    ("lost", prune, "prune_variant", astray),
    ("tracebacks", prune, "prune_variant", bug),
])  # fmt: skip
def test_a_fault_is_counted(
    ground: Ground,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: str,
    place: Any,
    name: str,
    instead: Callable[..., Any],
) -> None:
    """In the product; a fork has it too. The case is the undamaged one of `prune wanda`."""
    assert tally_of(ground, "fuzz-scratch", [0], home).clean
    monkeypatch.setattr(place, name, instead)
    found = vars(tally_of(ground, "fuzz-scratch", [0], home))
    assert found[count] == 1, found


def test_damage_that_nobody_notices_is_counted(
    ground: Ground, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One variant's perplexities in another's place, with readers that check seals, and with those
    that do not.
    """

    def exchange(project: Path) -> None:
        shutil.copyfile(project / "build/evaluate/sparseline.json", project / "build/evaluate/wanda.json")

    case = fuzz.Case("exchanged", exchange, ("choose",), "equal")
    kind, checked, unchecked = (
        fuzz.Fuzz(ground, "fuzz-exchanged", [case], lambda _: case),
        Tally("", 0),
        Tally("", 0),
    )
    attempt(kind, SEED, 0, home, checked)
    monkeypatch.setattr(seals, "check", lambda raw, told, file: seals.Seal(told["file"], told["model"]))
    attempt(kind, SEED, 0, home, unchecked)
    assert checked.clean and unchecked.wrong == 1


def test_a_hang_is_counted(ground: Ground, home: Path) -> None:
    case = fuzz.Case("", fuzz.nothing, ("prune wanda",), limit=0.02)
    (home / "place").mkdir()
    ground.copy(home / "place")
    ended, faults, _ = fuzz.run_step(ground, home / "place", "prune wanda", case)
    assert ended.code is None and "wrong" in {fault.oracle for fault in faults}


def test_what_a_kill_leaves_is_counted(tmp_path: Path) -> None:
    whole, half = {"build/a": "1", "build/b": "1"}, {"build/a": "2", "build/.b.partial": "1"}
    assert [fault.oracle for fault in kills.between(whole, half, whole)] == ["wrong"]
    assert [fault.oracle for fault in kills.compared(half, whole)] == ["lost", "wrong"]
    assert not kills.between({}, whole, whole) and not kills.compared(whole, whole)
    assert kills.spoken(Ended(1, ""), signal.SIGINT, False)[0].oracle == "tracebacks"
    assert kills.spoken(Ended(143, ""), signal.SIGTERM, False)[0].oracle == "wrong"
    assert not kills.spoken(Ended(143, "error: SIGTERM came.\n"), signal.SIGTERM, False)
    sleeper = subprocess.Popen(["sleep", "60"], cwd=tmp_path)
    assert [fault.oracle for fault in orphans(tmp_path, 0.1)] == ["lost"]
    assert sleeper.wait() == -9 and not orphans(tmp_path, 0)


def test_records_are_summed_up(tmp_path: Path) -> None:
    path, tally = tmp_path / "campaign.json", Tally("fuzz-text", 3)
    tally.add([Fault("wrong", ""), Fault("wrong", "")], 2.0)
    merge(path, [tally])
    merge(path, [tally, Tally("fuzz-text", 4, tried=1)])
    first, second = artifacts.read_json(path)
    assert (first["tried"], first["wrong"], first["lost"], first["slowest_s"], second["seed"]) == (
        2,
        2,
        0,
        2.0,
        4,
    )
    assert first["commit"]
