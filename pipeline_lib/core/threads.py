"""Use torch's threads together on every product, or each for a part of the work."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from pipeline_lib.core.products import rounding

SMALL = 2**22  # weights of a block, or of a window of blocks; larger ones gain little
PARTS = 4  # parts of the work, for any number of threads
S = TypeVar("S")
T = TypeVar("T")
Map = Callable[[Callable[[S], T], Iterable[S]], Iterable[T]]


def small(device: torch.device, weights: int) -> bool:
    """Whether parts of work on ``weights`` weights run faster side by side on this device."""
    return device.type == "cpu" and weights <= SMALL


@contextmanager
def side_by_side(wanted: bool, parts: int = PARTS) -> Iterator[Map[Any, Any]]:
    """Yield a ``map`` over at least ``parts`` parts. If ``wanted``, each of torch's threads
    computes parts of its own, instead of all sharing one.

    With small products, two threads spend most of their time waking up. The parts' results are in
    memory together. The library of products does not depend on the number of threads or parts.
    """
    if not wanted:
        yield map
        return
    threads = torch.get_num_threads()
    workers = min(PARTS, threads, parts)
    with rounding(False):  # the setting is global, so no thread may change it while another computes
        if workers < 2:
            yield map
            return
        torch.set_num_threads(threads // workers)  # a new thread adopts it when it first asks for it
        try:
            with ThreadPoolExecutor(workers, initializer=torch.get_num_threads) as pool:
                yield pool.map
        finally:
            torch.set_num_threads(threads)
