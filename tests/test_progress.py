"""Progress in a terminal and in a log. Oracles: times by hand on a clock that a test turns, and
what a terminal would show.
"""

import io
import os
import subprocess
import sys

import pytest
from project import ROOT

from pipeline_lib.core.progress import Progress, duration, track


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def log(seconds: list[float], total: int, done: int = 0) -> list[str]:
    """Lines of a loop whose steps take these seconds."""
    stream, clock = io.StringIO(), Clock()
    with Progress("prune wanda", total, "blocks", done, stream, clock) as progress:
        for one in seconds:
            clock.now += one
            progress.advance()
    assert "\r" not in stream.getvalue()
    return stream.getvalue().splitlines()


def test_a_log_has_plain_lines() -> None:
    """Two of 19 blocks in 10 s leave 17 · 5 = 85 s. The next line appears after another 10 s."""
    lines = log([5.0] * 19, total=19)
    assert lines[0] == "prune wanda: 2 of 19 blocks, 1 min 25 s left"
    assert lines[1] == "prune wanda: 4 of 19 blocks, 1 min 15 s left"
    assert lines[-1] == "prune wanda: 19 of 19 blocks, took 1 min 35 s"
    assert len(lines) == 10


def test_a_log_of_many_quick_steps_stays_short() -> None:
    """10,000 steps in 100 s: nine lines on the way and the last one."""
    lines = log([0.01] * 10_000, total=10_000)
    assert len(lines) == 10
    assert (
        lines[0].startswith("prune wanda: 1")
        and lines[-1] == "prune wanda: 10000 of 10000 blocks, took 1 min 40 s"
    )


def test_a_moment_is_not_worth_a_line() -> None:
    assert log([1.0] * 9, total=9) == []


def test_a_resumed_run_reckons_with_its_own_blocks() -> None:
    """30 of 32 were there; the 31st took 20 s, so the last one has 20 s left."""
    assert log([20.0, 20.0], total=32, done=30) == [
        "prune wanda: 31 of 32 blocks, 20 s left",
        "prune wanda: 32 of 32 blocks, took 40 s",
    ]


def test_an_early_end_says_how_far_it_came() -> None:
    assert log([15.0], total=8)[-1] == "prune wanda: 1 of 8 blocks, took 15 s"


def test_a_failure_is_not_told_as_an_end() -> None:
    stream, clock = io.StringIO(), Clock()
    with pytest.raises(ValueError), Progress("a", 2, "blocks", stream=stream, clock=clock):
        clock.now += 60
        raise ValueError
    assert stream.getvalue() == ""


def test_a_terminal_has_a_bar() -> None:
    """It redraws one line, with what is done, of how much."""
    stream = Terminal()
    with Progress("prune wanda", 4, "blocks", done=1, stream=stream) as progress:
        progress.advance(3)
    drawn = stream.getvalue().split("\r")
    assert "prune wanda" in drawn[1] and "1/4" in drawn[1]
    assert "4/4" in drawn[-1] and drawn[-1].count("\n") == 1


def test_track_hands_on_the_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step counts when its body is over, not when it begins."""
    counted: list[int] = []
    monkeypatch.setattr(Progress, "advance", lambda self, count=1: counted.append(count))
    for number, item in enumerate(track("abc", "a", "letters")):
        assert item == "abc"[number] and len(counted) == number
    assert counted == [1, 1, 1]
    assert list(track(iter("ab"), "a", "letters", total=2)) == ["a", "b"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"),
        (4.51, "4.5 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.7, "1 min 0 s"),
        (80, "1 min 20 s"),
        (3599.6, "1 h 0 min"),
        (7530, "2 h 5 min"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_no_stage_draws_a_bar_of_its_own() -> None:
    """Oracle: the sources. A bare tqdm would be one endless line in a log."""
    users = [
        path.name
        for folder in ("pipeline_lib", "stages")
        for path in (ROOT / folder).rglob("*.py")
        if "tqdm" in path.read_text()
    ]
    assert users == ["progress.py"]


def test_a_terminal_that_does_not_know_its_size_has_a_bar_too() -> None:
    """As those of `script` and of some containers, 0 by 0. Oracle: what came out of a pseudo-terminal."""
    main, other = os.openpty()
    code = "from pipeline_lib.core.progress import track; list(track(range(3), 'prune wanda', 'blocks'))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=other, stdout=other, check=True)
    os.close(other)
    assert b"prune wanda: 100%" in os.read(main, 10_000)
    os.close(main)
