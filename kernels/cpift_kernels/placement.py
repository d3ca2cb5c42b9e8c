"""Work on a device whose copies run beside it: queues, events, and the lane that one thread sends its slices through.

A device does what each of its queues was given in that order, and nothing else is sure: a queue goes on while another
one does, unless it was told to follow it, and the host reads what is not there yet, unless it waits. `Placement` is all
that a lane asks of a device, so that another one can stand for it where there is none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Queue = Literal["in", "compute", "out"]
QUEUES: tuple[Queue, ...] = ("in", "compute", "out")
Event = Any  # a place in a queue
Ready = Callable[[], None]  # waits until what it stands for is there

SLOTS = 4  # of pinned memory that copies to the device go through
SLOT = 1 << 22  # bytes of each: a larger slice is copied in parts
BUFFER = 1 << 24  # bytes of a buffer on the device, at least: of 2**22 elements in fp32
LEAVING = 3  # results that are being copied to the host at once


class Placement(Protocol):
    """Memory and queues of a device."""

    @property
    def device(self) -> torch.device:
        """Where tensors of `room` lie."""

    def room(self, nbytes: int, queue: Queue) -> Tensor:
        """uint8 [nbytes] on the device, to be freed when all that uses it beside `queue` is done.

        Raises torch.OutOfMemoryError."""

    def pinned(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] on the host, which copies read and write at the bus's full speed."""

    def copy(self, queue: Queue, target: Tensor, source: Tensor) -> None:
        """Give a copy to a queue."""

    def computing(self) -> AbstractContextManager[object]:
        """What is launched in it goes to the queue `compute`."""

    def record(self, queue: Queue) -> Event:
        """The end of what a queue was given so far."""

    def follow(self, queue: Queue, event: Event) -> None:
        """What a queue is given from now on waits for an event of another one."""

    def wait(self, event: Event) -> None:
        """The host waits."""


class Streams:
    """A GPU, by streams of its own."""

    def __init__(self, device: torch.device):
        import torch

        self.device = device
        self._streams = {queue: torch.cuda.Stream(device) for queue in QUEUES}

    def room(self, nbytes: int, queue: Queue) -> Tensor:
        import torch

        with torch.cuda.stream(self._streams[queue]):  # what is freed is given again to the same stream
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pinned(self, nbytes: int) -> Tensor:
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, queue: Queue, target: Tensor, source: Tensor) -> None:
        import torch

        with torch.cuda.stream(self._streams[queue]):
            target.copy_(source, non_blocking=True)

    def computing(self) -> AbstractContextManager[object]:
        import torch

        return torch.cuda.stream(self._streams["compute"])

    def record(self, queue: Queue) -> Event:
        return self._streams[queue].record_event()

    def follow(self, queue: Queue, event: Event) -> None:
        self._streams[queue].wait_event(event)

    def wait(self, event: Event) -> None:
        event.synchronize()


class Inline:
    """A device without queues: everything is done when it is asked for."""

    def __init__(self, device: torch.device):
        self.device = device

    def room(self, nbytes: int, queue: Queue) -> Tensor:
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pinned(self, nbytes: int) -> Tensor:
        import torch

        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, queue: Queue, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def computing(self) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self, queue: Queue) -> Event:
        return None

    def follow(self, queue: Queue, event: Event) -> None:
        """It is done."""

    def wait(self, event: Event) -> None:
        """It is done."""


def placement_of(device: torch.device) -> Placement:
    """Queues of its own on a CUDA or ROCm device; another device does everything at once."""
    return Streams(device) if device.type == "cuda" else Inline(device)


@dataclass
class Staged:
    """A slice on its way to the device, in a buffer of the lane's."""

    values: Tensor
    buffer: Tensor
    there: Event


def lane_bytes(slices: int) -> int:
    """What a `Lane` holds on the device, at most, of so many slices at once, a result, and those on their way."""
    return (slices + 1 + LEAVING) * BUFFER


class Lane:
    """What one thread sends to a device, has done there and takes back, each beside the others.

    It holds SLOTS pinned slots, as many buffers on the device as slices were staged at once, and LEAVING results.
    """

    def __init__(self, place: Placement):
        self.place = place
        self._slots: deque[tuple[Tensor, Event | None]] = deque()
        self._free: list[tuple[Tensor, Event]] = []
        self._leaving: deque[_Leaving] = deque()

    # ---- to the device -----------------------------------------------------------------------------------------------

    def stage(self, source: Tensor) -> Staged:
        """Begin to copy a slice, [n] on the host, into a buffer; `use` gives it, `done` takes the buffer back."""
        buffer = self._buffer(source.nbytes)
        values = buffer[: source.nbytes].view(source.dtype)
        self._send("in", values, source)
        return Staged(values, buffer, self.place.record("in"))

    def use(self, staged: Staged) -> Tensor:
        """The slice, for what is launched from now on."""
        self.place.follow("compute", staged.there)
        return staged.values

    def done(self, staged: Staged) -> None:
        """All that reads the slice was launched."""
        self._free.append((staged.buffer, self.place.record("compute")))

    def load(self, source: Tensor) -> Tensor:
        """A copy of [n] on the device for what is launched from now on, in memory of its own."""
        values = self.place.room(source.nbytes, "compute").view(source.dtype)
        self._send("compute", values, source)
        return values

    def keep(self, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy parts, [n] on the host each, to their places on the device; waits until all are there, for whatever
        queue reads them."""
        for part, target in parts:
            self._send("compute", target, part)
        self.place.wait(self.place.record("compute"))

    def _buffer(self, nbytes: int) -> Tensor:
        fitting = [number for number, (buffer, _) in enumerate(self._free) if buffer.nbytes >= nbytes]
        if not fitting:
            return self.place.room(max(nbytes, BUFFER), "in")
        buffer, read = self._free.pop(fitting[0])
        self.place.follow("in", read)
        return buffer

    def _send(self, queue: Queue, target: Tensor, source: Tensor) -> None:
        step = SLOT // source.itemsize
        for start in range(0, source.numel(), step):
            part = source[start : start + step]
            with self._slot() as (slot, used):
                slot[: part.nbytes].view(part.dtype).copy_(part)
                self.place.copy(queue, target[start : start + step], slot[: part.nbytes].view(part.dtype))
                used(self.place.record(queue))

    @contextmanager
    def _slot(self) -> Iterator[tuple[Tensor, Callable[[Event], None]]]:
        """A slot that no copy reads any more, and what is to be told of the one that will."""
        if len(self._slots) < SLOTS:
            slot = self.place.pinned(SLOT)
        else:
            slot, read = self._slots.popleft()
            self.place.wait(read)
        yield slot, lambda event: self._slots.append((slot, event))

    # ---- back to the host --------------------------------------------------------------------------------------------

    def fetch(self, values: Tensor, target: Tensor) -> Ready:
        """Begin to copy what launches so far make of `values` to `target` on the host; the result waits for that."""
        if len(self._leaving) >= LEAVING:
            self._leaving.popleft()()
        self._leaving.append(leaving := _Leaving(self.place, values, self._back([values], [target])))
        return leaving

    def bring(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Copies of flat tensors on the host, with one wait."""
        targets = [self.place.pinned(one.nbytes).view(one.dtype) for one in values]
        self.place.wait(self._back(values, targets))
        return targets

    def _back(self, values: Sequence[Tensor], targets: Sequence[Tensor]) -> Event:
        self.place.follow("out", self.place.record("compute"))
        for one, target in zip(values, targets, strict=True):
            self.place.copy("out", target, one)
        return self.place.record("out")

    def close(self) -> None:
        """Wait for everything, before its memory is freed."""
        for queue in QUEUES:
            self.place.wait(self.place.record(queue))
        self._free.clear()
        self._leaving.clear()


class _Leaving:
    """A result on its way to the host; memory on the device is held until it is there."""

    def __init__(self, place: Placement, values: Tensor, there: Event):
        self._place, self._there = place, there
        self._values: Tensor | None = values

    def __call__(self) -> None:
        self._place.wait(self._there)
        self._values = None
