"""Storage of hidden states between two blocks: on the device, in host memory, or in files. The place
does not change their values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, overload

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline_lib.core import settings
from pipeline_lib.core.artifacts import save_tensors

Place = Literal["device", "host", "disk"]


@dataclass
class Storage:
    """Limits, in bytes, for the hidden states of all streams on the device and in host memory.

    Batches are placed one by one: the first on the device, the next in host memory, the others in
    files in ``directory``. Without a directory, host memory takes the others too. A batch keeps its
    place. A later stream of the same name reuses the places of the first one.
    """

    device: float = math.inf
    host: float = math.inf
    directory: Path | None = None
    spare: float = math.inf  # limit on the device for values that could be computed again
    _places: dict[tuple[str, int], Place] = field(default_factory=dict)

    def place(self, name: str, number: int, size: int) -> Place:
        """The place of a stream's batch of ``size`` bytes."""
        found = self._places.get((name, number))
        if found is None:
            if size <= self.device:
                found, self.device = "device", self.device - size
            elif size <= self.host or self.directory is None:
                found, self.host = "host", self.host - size
            else:
                found = "disk"
            self._places[name, number] = found
        return found

    def room(self) -> float:
        """Bytes left on the device for values that could be computed again."""
        return min(self.device, self.spare)


def allowed_storage(device: torch.device, directory: Path | None = None, wanted: float = 0) -> Storage:
    """The storage that the settings allow for hidden states of ``wanted`` bytes.

    With a CPU they are all in memory or, above SPARSELINE_ACTIVATION_BYTES, all in files. With a GPU
    they use its memory up to SPARSELINE_GPU_ACTIVATION_BYTES, then host memory up to
    SPARSELINE_ACTIVATION_BYTES, then files.

    Args:
        directory: directory for files; None: no files, regardless of the settings.
    """
    host = settings.activation_bytes()
    if device.type != "cuda":
        if directory is not None and wanted > host:
            return Storage(0, 0, directory)
        return Storage(spare=max(0, host - wanted))
    budget = settings.gpu_activation_bytes()
    if budget is None:
        budget = int(settings.GPU_SHARE * torch.cuda.mem_get_info(device)[0])
    return Storage(budget, host, directory)


class _Cell(Protocol):
    """Holds one batch [B, T, D]."""

    def read(self) -> torch.Tensor:
        """The batch, on the device."""

    def write(self, hidden: torch.Tensor) -> None:
        """Replace the batch."""

    def row(self, number: int) -> torch.Tensor:
        """One row [1, T, D], on the device. Other rows are not read."""

    def rows(self) -> int:
        """Number of rows."""


class _OnDevice:
    def __init__(self) -> None:
        self.hidden = torch.empty(0)

    def read(self) -> torch.Tensor:
        return self.hidden

    def write(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden

    def row(self, number: int) -> torch.Tensor:
        return self.hidden[number : number + 1]

    def rows(self) -> int:
        return len(self.hidden)


class _InHost:
    """A batch in host memory. With a GPU the memory is pinned, because only copies from pinned memory
    run beside computation.
    """

    def __init__(self, link: "_Link") -> None:
        self.link = link
        self.buffer = torch.empty(0)

    def read(self) -> torch.Tensor:
        return self.link.take(self)

    def write(self, hidden: torch.Tensor) -> None:
        if self.buffer.shape != hidden.shape or self.buffer.dtype != hidden.dtype:
            self.buffer = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=self.link.side is not None)
        self.link.put(self, hidden)

    def row(self, number: int) -> torch.Tensor:
        return self.link.part(self.buffer[number : number + 1])

    def rows(self) -> int:
        return len(self.buffer)


class _OnDisk:
    def __init__(self, file: Path, device: torch.device) -> None:
        self.file, self.device = file, device

    def read(self) -> torch.Tensor:
        return load_file(self.file)["hidden"].to(self.device)

    def write(self, hidden: torch.Tensor) -> None:
        save_tensors(self.file, {"hidden": hidden.contiguous()})

    def row(self, number: int) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as opened:
            hidden: torch.Tensor = opened.get_slice("hidden")[number : number + 1]
        return hidden.to(self.device)

    def rows(self) -> int:
        with safe_open(self.file, framework="pt") as opened:
            return int(opened.get_slice("hidden").get_shape()[0])


class _Link:
    """Copies between a device and host memory. On a GPU they run on a separate CUDA stream, beside
    computation, and the next batch is fetched in advance.

    The side stream runs copies in the order of the requests, so a batch is never read before it is
    written. Computation waits (by an event) for the copy that it needs. The side stream waits for a
    result before copying it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: _Ahead | None = None

    def take(self, cell: _InHost) -> torch.Tensor:
        """A cell's batch on the device. It is copied now, unless it was fetched in advance."""
        found = self._ahead if self._ahead is not None and self._ahead[0] is cell else self.fetch(cell)
        self._ahead = None
        _, hidden, copied = found
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            # the allocator must not reuse this memory on the side stream before computation is done
            hidden.record_stream(current)
        return hidden

    def fetch(self, cell: _InHost) -> "_Ahead":
        """Begin to copy a cell's batch to the device."""
        self._ahead = None  # frees the last one first: at most one batch is ahead
        if self.side is None:
            self._ahead = cell, cell.buffer.to(self.device, copy=True), None
        else:
            with torch.cuda.stream(self.side):
                self._ahead = cell, cell.buffer.to(self.device, non_blocking=True), self.side.record_event()
        return self._ahead

    def put(self, cell: _InHost, hidden: torch.Tensor) -> None:
        """Begin to copy a batch into a cell in host memory."""
        if self._ahead is not None and self._ahead[0] is cell:
            self._ahead = None  # out of date
        if self.side is None:
            cell.buffer.copy_(hidden)
            return
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            cell.buffer.copy_(hidden, non_blocking=True)
        hidden.record_stream(self.side)

    def part(self, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of a batch in host memory, on the device."""
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.side)
        return rows.to(self.device, non_blocking=True, copy=True)


# the cell, its batch on the device, and the event that ends the copy
_Ahead = tuple[_InHost, torch.Tensor, torch.cuda.Event | None]


class Batches(Sequence[torch.Tensor]):
    """A sequence of batches of hidden states [B, T, D], each in its place in the storage. Reading a
    batch copies it to the device.

    A slice shares the places. Reading a batch in host memory prefetches the next one. If several
    processes run the stage, each has its own batches, and knows only the sizes of the others.
    """

    def __init__(
        self,
        count: int,
        device: torch.device,
        storage: Storage,
        name: str,
        sizes: Sequence[int] | None = None,
    ) -> None:
        """``sizes``: number of rows in each batch; required if this process does not hold all batches."""
        self._device, self._storage, self._name, self._sizes = device, storage, name, sizes
        self._link: _Link | None = None
        self._cells: list[_Cell | None] = [None] * count
        self._numbers: Sequence[int] = range(count)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> "Batches": ...
    def __getitem__(self, place: int | slice) -> "torch.Tensor | Batches":
        if isinstance(place, slice):
            part = Batches(0, self._device, self._storage, self._name, self._sizes)
            part._link, part._cells, part._numbers = self._link, self._cells, self._numbers[place]
            return part
        found = self._cell(place).read()
        following = place + 1 if place >= 0 else place + len(self) + 1
        if following < len(self) and isinstance(ahead := self._cells[self._numbers[following]], _InHost):
            ahead.link.fetch(ahead)
        return found

    def __setitem__(self, place: int, hidden: torch.Tensor) -> None:
        number = self._numbers[place]
        if self._cells[number] is None:
            self._cells[number] = self._placed(number, hidden.numel() * hidden.element_size())
        self._cell(place).write(hidden)

    def sizes(self) -> list[int]:
        """Number of samples in each batch."""
        if self._sizes is not None:
            return [self._sizes[number] for number in self._numbers]
        return [self._cell(place).rows() for place in range(len(self))]

    @property
    def own(self) -> list[int]:
        """The positions of the batches that this process holds."""
        return [place for place, number in enumerate(self._numbers) if self._cells[number] is not None]

    def row(self, place: int, number: int) -> torch.Tensor:
        """One sample [1, T, D] of a batch. Other samples are not read."""
        return self._cell(place).row(number)

    def _cell(self, place: int) -> _Cell:
        found = self._cells[self._numbers[place]]
        if found is None:
            raise ValueError(f"batch {place} is read before it is written")
        return found

    def _placed(self, number: int, size: int) -> _Cell:
        where = self._storage.place(self._name, number, size)
        if where == "device":
            return _OnDevice()
        if where == "host":
            self._link = self._link or _Link(self._device)
            return _InHost(self._link)
        directory = self._storage.directory or Path()
        directory.mkdir(parents=True, exist_ok=True)
        return _OnDisk(directory / f"{self._name}-{number:05d}.safetensors", self._device)
