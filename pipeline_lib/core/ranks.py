"""The processes that run one stage together: the number of this one, its share of the work, and the
communication with the others. A single process sends nothing.

All processes run the same code on the same files. Rows are assigned to them by lanes
(``stats/lanes.py``), matrices by their cost (``deal``). Sums of several processes have a fixed
order, so the number of processes changes no bit. Only the first process writes (``writes``).
"""

import io
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline_lib.core import settings
from pipeline_lib.core.errors import LostError

if TYPE_CHECKING:
    import torch

FIRST = 2048  # bytes of the first message of a transfer
SMALL = 1024  # maximum bytes of a tensor that is sent inside its value
BEAT = 0.5  # seconds between two signs of life
# a process may compute for hours while others wait; missing signs of life show that one is gone
FOREVER = timedelta(days=30)
K = TypeVar("K")
T = TypeVar("T")
V = TypeVar("V")
_place = [0, 1]  # this process's number, and how many there are


def rank() -> int:
    """The number of this process, from 0."""
    return _place[0]


def count() -> int:
    """How many processes run the stage."""
    return _place[1]


def first() -> bool:
    """Whether this is the first process, which writes and prints."""
    return rank() == 0


def writes() -> bool:
    """Whether this process writes the next output. It is a barrier for all processes."""
    gathered(None)
    return first()


def outer() -> int | None:
    """This process's number among those that an outer `torchrun` started; None if it started none,
    or only one.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return int(os.environ["RANK"])
    return None


def local() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if count() > 1 else 0


def everyone() -> list[int]:
    """All processes, beginning with the one that holds the last lane, where a sum over the lanes ends."""
    return [count() - 1, *range(count() - 1)]


def part(items: int) -> range:
    """The consecutive numbers of 0 … ``items`` - 1 that this process computes."""
    return division(items, count())[rank()]


def division(items: int, processes: int) -> list[range]:
    """For each of some processes, the consecutive numbers of 0 … ``items`` - 1 that it computes."""
    borders = [place * items // processes for place in range(processes + 1)]
    return [range(first, last) for first, last in pairwise(borders)]


def deal(costs: Mapping[K, float], processes: int | None = None) -> dict[K, int]:
    """The owner of each item: the most expensive first, each to the process with the least work.

    Args:
        processes: how many there are; None: those that run the stage.
    """
    loads = [0.0] * (processes or count())
    owners = {}
    for item in sorted(costs, key=lambda item: -costs[item]):  # stable: equal costs keep their order
        owners[item] = loads.index(min(loads))
        loads[owners[item]] += costs[item]
    return owners


def each(costs: Mapping[K, float], compute: Callable[[K], V]) -> dict[K, V]:
    """``compute`` of every item. Each process computes the items that it owns (``deal``), and all
    get all results.
    """
    owners = deal(costs)
    own = {place: compute(item) for place, item in enumerate(costs) if owners[item] == rank()}
    found = {place: value for part in gathered(own) for place, value in part.items()}
    return {item: found[place] for place, item in enumerate(costs)}


def joined(values: Sequence[T]) -> list[T]:
    """The values of all processes, one after another."""
    return [value for part in gathered(list(values)) for value in part]


def gathered(value: T) -> list[T]:
    """The values of all processes."""
    return [broadcast(value, source) for source in range(count())]


def broadcast(value: T, source: int) -> T:
    """The value of the process ``source``; the values of the others are ignored."""
    if count() == 1:
        return value
    return _sent(value, source, [other for other in range(count()) if other != source])


def passed(value: T, source: int, to: int) -> T:
    """Send a value from one process to another; only these two take part."""
    return _sent(value, source, [to]) if rank() in (source, to) else value


class _Pickler(pickle.Pickler):
    """Leaves tensors out of the pickled bytes, and lists them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        import torch

        if not isinstance(value, torch.Tensor):
            return None
        self.tensors.append(value.detach().contiguous())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, raw: bytes, tensors: "Sequence[torch.Tensor]") -> None:
        super().__init__(io.BytesIO(raw))
        self.tensors = tensors

    def persistent_load(self, number: int) -> "torch.Tensor":
        return self.tensors[number]


def _sent(value: Any, source: int, to: Sequence[int]) -> Any:
    """Send a value; this process is the source or a receiver.

    The first message has a fixed size, and holds all of a small value. Small tensors are sent
    inside the value.
    """
    import torch

    own, raw, tensors = rank() == source, b"", list[torch.Tensor]()
    if own:
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(value)
        tensors = pickler.tensors
        raw = pickle.dumps((file.getvalue(), list(map(_kind, tensors))))
        raw = len(raw).to_bytes(8, "big") + raw
    found = _text(raw[:FIRST].ljust(FIRST, b"\0"), source, to)
    size = 8 + int.from_bytes(found[:8], "big")
    if size > FIRST:
        found += _text(raw[FIRST:] or bytes(size - FIRST), source, to)
    body, kinds = pickle.loads(found[8:size])
    if not own:
        tensors = list(map(_empty, kinds))
    for tensor, (*_, small) in zip(tensors, kinds, strict=True):
        if small is None and tensor.numel():
            _pass(_bytes(tensor), source, to)
    return value if own else _Unpickler(body, tensors).load()


def _text(raw: bytes, source: int, to: Sequence[int]) -> bytes:
    import torch

    buffer = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    _pass(buffer, source, to)
    return buffer.numpy().tobytes()


def _bytes(tensor: "torch.Tensor") -> "torch.Tensor":
    import torch

    return tensor.view(-1).view(torch.uint8)


def _kind(tensor: "torch.Tensor") -> tuple[Any, ...]:
    """Shape, dtype and kind of device of a tensor, and its bytes if it is small and on the CPU."""
    small = tensor.device.type == "cpu" and tensor.numel() * tensor.element_size() <= SMALL
    raw = _bytes(tensor).numpy().tobytes() if small else None
    return tensor.shape, tensor.dtype, tensor.device.type, raw


def _empty(kind: tuple[Any, ...]) -> "torch.Tensor":
    import torch

    shape, dtype, device, raw = kind
    tensor = torch.empty(shape, dtype=dtype, device=_device(device))
    if raw:
        _bytes(tensor).copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    return tensor


def _device(kind: str) -> str:
    return kind if kind == "cpu" else f"{kind}:{local()}"


def _pass(tensor: "torch.Tensor", source: int, to: Sequence[int]) -> None:
    import torch.distributed as dist

    with _talking():
        if len(to) == count() - 1 > 1:
            dist.broadcast(tensor, source)
        elif rank() != source:
            dist.recv(tensor, source)
        else:
            for other in to:
                dist.send(tensor, other)


@contextmanager
def _talking() -> Iterator[None]:
    """Convert torch's error about a process that does not answer to a LostError."""
    try:
        yield
    except RuntimeError as error:
        raise LostError(_lost("another process")) from error


def _lost(who: str) -> str:
    return (
        f"Process {rank()} of {count()} lost {who}: killed, out of memory, or cut off from the network;"
        " run the same command again: finished work is kept."
    )


@contextmanager
def together(own: int, size: int, meeting: Path | None, end: Callable[[LostError], Any]) -> Iterator[None]:
    """Take part, in this context, in a group of processes. Only the first process's output is shown.

    Args:
        own: this process's number.
        size: how many processes there are.
        meeting: the file in which they find each other; None: the store at torchrun's MASTER_ADDR
            and MASTER_PORT.
        end: ends this process at once, from any thread, because another process is lost. This
            process may be waiting in torch, which would wait forever.

    Raises:
        LostError: the others do not start, or one is gone.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    wait = timedelta(seconds=settings.timeout())
    _place[:] = own, size
    over, answered, one = threading.Event(), [time.monotonic()], threading.Lock()

    def lost(error: LostError) -> None:
        with one:  # only the first of several threads reports
            if not over.is_set():
                end(error)

    if settings.threads() is None:  # each has its share of the cores
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, torch.get_num_threads() // neighbours))
    try:
        with _talking():
            if meeting is None:
                store, _, _ = next(rendezvous("env://", own, size, timeout=wait))
            else:
                store = dist.FileStore(str(meeting), size)  # type: ignore[attr-defined]
            store.set_timeout(wait)

            def meet(where: str) -> None:
                store.set(f"{where}/{own}", "")
                store.wait([f"{where}/{other}" for other in range(size)], wait)

            meet("here")
            beating = threading.Thread(target=_beat, args=(store.clone(), answered, over, lost), daemon=True)
            beating.start()
            threading.Thread(target=_watch, args=(answered, over, lost), daemon=True).start()
            backend = "gloo" if settings.device_name() == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=store, rank=own, world_size=size, timeout=FOREVER)
            meet("connected")  # a process may end before others are connected to it
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, ExitStack() as silent:
            for stream in (redirect_stdout, redirect_stderr):
                if own:
                    silent.enter_context(stream(nowhere))
            yield
        over.set()
        beating.join(settings.timeout())  # the network may be cut just now
        dist.destroy_process_group()
    finally:
        with one:
            over.set()
        _place[:] = 0, 1


def _beat(store: Any, answered: list[float], over: threading.Event, end: Callable[[LostError], Any]) -> None:
    """Send signs of life, and check those of the others, until one sends none for SPARSELINE_TIMEOUT.

    Args:
        answered: when the store answered last.
    """
    me, limit = rank(), settings.timeout()
    seen = {other: (b"", time.monotonic()) for other in range(count()) if other != me}
    beats, sign = 0, b""
    try:
        while True:
            ended, beats = over.wait(BEAT), beats + 1
            store.set(f"beat/{me}", "over" if ended else str(beats))
            if ended:
                return
            for other, (before, since) in list(seen.items()):
                sign = store.get(key) if store.check([key := f"beat/{other}"]) else b""
                if sign == b"over":
                    del seen[other]
                elif sign != before:
                    seen[other] = sign, time.monotonic()
                elif time.monotonic() - since > limit:
                    end(LostError(_lost(f"process {other}")))
            answered[0] = time.monotonic()
    except RuntimeError:
        end(LostError(_lost("the others")))


def _watch(answered: list[float], over: threading.Event, end: Callable[[LostError], Any]) -> None:
    """End this process if the store's host is cut off: torch would wait for its answer without a
    limit.
    """
    while not over.wait(BEAT):
        if time.monotonic() - answered[0] > settings.timeout():
            end(LostError(_lost("the others")))
