"""Run a stage's job in several processes, started here or by an outer `torchrun`."""

import json
import logging
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pipeline_lib.core import files, process, ranks, runtime, settings
from pipeline_lib.core.errors import LostError, SparselineError
from pipeline_lib.core.preloaded import SIGNALS

T = TypeVar("T")


def run(job: Callable[..., T], *arguments: Any) -> T:
    """Run the job in SPARSELINE_PROCESSES processes, or in those that an outer `torchrun` started,
    and return the first process's result.

    Raises:
        SparselineError: the settings contradict each other.
        Fault: the job failed in one of the processes.
        LostError: one of the processes is gone.
    """
    if (outer := ranks.outer()) is not None:
        with ranks.together(outer, int(os.environ["WORLD_SIZE"]), None, _told):
            return job(*arguments)
    if (count := settings.processes()) == 1:
        return job(*arguments)
    if (device := settings.device_name()) == "auto" or ":" in device:
        raise SparselineError(
            f"SPARSELINE_DEVICE={device} is one GPU, and SPARSELINE_PROCESSES={count} processes need one"
            " each; set the device to cuda, or SPARSELINE_PROCESSES to 1."
        )
    return _launched(count, job, *arguments)


def _told(error: LostError) -> NoReturn:
    os.write(2, f"error: {error}\n".encode())
    os._exit(runtime.LOST)


def _launched(count: int, job: Callable[..., T], *arguments: Any) -> T:
    """Run the job in workers, which are forks of this process: it has only imported modules, and has
    no thread in a library that might hold a lock. With a GPU they are new processes, because CUDA
    does not survive a fork.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

    logging.getLogger("torch").setLevel(logging.CRITICAL)  # it repeats the workers' messages at length
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    with tempfile.TemporaryDirectory(prefix="sparseline-") as place:
        workers = start_processes(
            _worker,
            (count, Path(place), os.getpid(), job, arguments),
            count,
            join=False,
            start_method="fork" if settings.device_name() == "cpu" else "spawn",
        )
        try:
            while not workers.join():
                pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            codes = [worker.exitcode for worker in workers.processes]
            raise _fault(Path(place), [codes.pop(error.error_index), *codes]) from error
        except process.Stopped as error:
            for worker in filter(BaseProcess.is_alive, workers.processes):
                os.kill(worker.pid, error.number)
            for worker in workers.processes:
                worker.join(2 * process.PATIENCE)
            raise
        found = [pickle.loads(_result(Path(place), rank).read_bytes()) for rank in range(count)]
    runtime.used([peak for _, peak in found if peak is not None])
    value: T = found[0][0]
    return value


def _result(place: Path, rank: int) -> Path:
    return place / f"result-{rank}.pickle"


def _worker(
    rank: int, count: int, place: Path, launcher: int, job: Callable[..., T], arguments: tuple[Any, ...]
) -> None:
    """Run the job in a worker, and write its result and its peak GPU memory to a file, which the
    launcher reads. If the job fails, the error is written instead.
    """

    def note(error: BaseException) -> int:
        message, status = runtime.explained(error)
        fault = {"message": message, "status": status, "lost": isinstance(error, LostError)}
        if not isinstance(error, process.Stopped):  # the launcher knows the signal
            (place / f"fault-{rank}.json").write_text(json.dumps(fault), encoding="utf-8")
        return status

    def end(error: LostError) -> NoReturn:
        os._exit(note(error))

    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
    for number in SIGNALS:  # instead of the launcher's handlers
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    try:
        with (
            process.following(launcher),
            process.stoppable(),
            ranks.together(rank, count, place / "store", end),
        ):
            result = job(*arguments), runtime.peak_gpu()
            _result(place, rank).write_bytes(pickle.dumps(result))
    except BaseException as error:
        sys.exit(note(error))


def _fault(place: Path, codes: list[int]) -> BaseException:
    """The error that the launcher reports: that of the worker that failed, or else that of a worker
    that lost another one.

    Args:
        codes: exit codes of the workers, first that of the one that ended first.
    """
    faults = [json.loads(files.text(path)) for path in sorted(place.glob("fault-*.json"))]
    for fault in sorted(faults, key=lambda fault: bool(fault["lost"])):
        if not fault["lost"]:
            return runtime.Fault(fault["message"], fault["status"])
    for code in codes:
        if code < 0 and code != -signal.SIGTERM:  # that is how the launcher ends the others
            return LostError(
                f"One of the stage's processes was ended by {signal.Signals(-code).name}, as the system does"
                " where memory runs out; run the same command again: finished work is kept."
            )
    if faults:
        return LostError(faults[0]["message"])
    return LostError(
        f"One of the stage's processes ended with code {codes[0]}; run the same command again: finished"
        " work is kept."
    )
