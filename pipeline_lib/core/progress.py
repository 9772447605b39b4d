"""Progress of a stage: a bar in a terminal, lines at intervals in a log or a pipe."""

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import Self, TextIO, TypeVar

EVERY = 10.0  # seconds between two lines of a log
T = TypeVar("T")
# wraps a loop's range, so that a caller can count the items; ``iter`` does nothing
Watched = Callable[[range], Iterable[int]]


class Progress:
    """A context manager that counts finished items of ``total``, and also reports the end.

    In a terminal it shows tqdm's bar. Elsewhere it prints at most a line every ten seconds, and a
    last one if the work took that long: ``prune wanda: 3 of 32 blocks, 1 min 20 s left``.
    """

    def __init__(
        self,
        what: str,
        total: int,
        units: str,
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``done`` items were finished before the start (a resumed run); ``stream`` is standard error
        by default.
        """
        self._what, self._total, self._units = what, total, units
        self._before, self._done = done, done
        self._stream, self._clock = stream or sys.stderr, clock
        self._started = self._told = clock()
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm  # a stage that has nothing to do starts faster without it

            size = shutil.get_terminal_size()  # some terminals report no size, and tqdm then draws nothing
            shape = {"ncols": size.columns, "nrows": size.lines}
            self._bar = tqdm(
                total=total, initial=done, desc=what, unit=f" {units}", file=self._stream, **shape
            )

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more items as finished."""
        self._done += count
        now = self._clock()
        if self._bar is not None:
            self._bar.update(count)
        elif now - self._told >= EVERY and self._done < self._total:
            self._told = now
            left = (now - self._started) / (self._done - self._before) * (self._total - self._done)
            self._line(f"{duration(left)} left")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and (took := self._clock() - self._started) >= EVERY:
            self._line(f"took {duration(took)}")

    def _line(self, time: str) -> None:
        print(
            f"{self._what}: {self._done} of {self._total} {self._units}, {time}",
            file=self._stream,
            flush=True,
        )


def track(items: Iterable[T], what: str, units: str, total: int | None = None, done: int = 0) -> Iterator[T]:
    """The same items; each counts as finished when the next is requested.

    ``total`` is needed if the items have no length; ``done`` is as in ``Progress``.
    """
    if total is None:
        assert isinstance(items, Sized)
        total = len(items)
    with Progress(what, total, units, done) as progress:
        for item in items:
            yield item
            del item  # free before the next
            progress.advance()


def duration(seconds: float) -> str:
    """A duration in words: ``4.5 s``, ``45 s``, ``1 min 20 s``, ``2 h 5 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
