"""Devices that are none: what is asked of their queues is done as late, or as early, as a GPU may do it."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from cpift_kernels import Placement
from cpift_kernels.placement import Event, Inline, Queue
from cpift_kernels.triton import common
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CPU = torch.device("cpu")
_POISON = 0xA5  # of memory that nothing was written to: small numbers, so that they are wrong and finite
_computing = threading.local()  # `place`: whose queue launches of this thread go to


class Lazy:
    """Copies and launches happen when somebody waits for them, and then no others than those they need.

    eager: queues that go ahead as far as they are allowed to. without: a wait that is left out, as the queues of
    `follow`, or ("host", queue) for waits of the host. counts: what was asked for, over all placements that share it.
    """

    device = CPU

    def __init__(
        self,
        eager: Sequence[Queue] = (),
        without: tuple[str, str] | None = None,
        counts: Counter[str] | None = None,
    ):
        self._eager, self._without = eager, without
        self.counts = Counter[str]() if counts is None else counts
        self._given: Mapping[Queue, list[Callable[[], None] | tuple[Queue, int]]] = {"in": [], "compute": [], "out": []}
        self._done: dict[Queue, int] = {"in": 0, "compute": 0, "out": 0}
        self._lock = threading.RLock()

    def room(self, nbytes: int, queue: Queue) -> torch.Tensor:
        self.counts["rooms"] += 1
        return self.pinned(nbytes)

    def pinned(self, nbytes: int) -> torch.Tensor:
        with _disable_current_modes():
            return torch.full((nbytes,), _POISON, dtype=torch.uint8)

    def copy(self, queue: Queue, target: torch.Tensor, source: torch.Tensor) -> None:
        self.counts[f"copies {queue}"] += 1
        self.give(queue, lambda: _copied(target, source))

    @contextmanager
    def computing(self) -> Iterator[None]:
        before, _computing.place = getattr(_computing, "place", None), self
        try:
            with _InOrder(self):
                yield
        finally:
            _computing.place = before

    def record(self, queue: Queue) -> Event:
        return queue, len(self._given[queue])

    def follow(self, queue: Queue, event: Event) -> None:
        if (queue, event[0]) != self._without:
            self.give(queue, event)

    def wait(self, event: Event) -> None:
        self.counts[f"waits {event[0]}"] += 1
        if self._without != ("host", event[0]):
            self._run(*event)

    def give(self, queue: Queue, work: Callable[[], None] | tuple[Queue, int]) -> None:
        with self._lock:
            self._given[queue].append(work)
            moved = True
            while moved:
                moved = any(self._advance(one) for one in self._eager)

    def compute(self) -> None:
        """Do what launches were asked for so far."""
        self._run("compute", len(self._given["compute"]))

    def _run(self, queue: Queue, stop: int) -> None:
        with self._lock:
            while self._done[queue] < stop:
                work = self._given[queue][self._done[queue]]
                if isinstance(work, tuple):
                    self._run(*work)
                else:
                    with _launched_here():
                        work()
                self._done[queue] += 1

    def _advance(self, queue: Queue) -> bool:
        """Do what a queue may do without waiting; whether there was anything."""
        begun = self._done[queue]
        while self._done[queue] < len(self._given[queue]):
            work = self._given[queue][self._done[queue]]
            if isinstance(work, tuple) and self._done[work[0]] < work[1]:
                break
            self._run(queue, self._done[queue] + 1)
        return self._done[queue] > begun


class Limited(Inline):
    """Everything at once, on a device with so many bytes for the lanes."""

    def __init__(self, limit: int):
        super().__init__(CPU)
        self.limit, self.most = limit, 0
        self._live: dict[object, int] = {}  # bytes of each room; entries come and go at once, from whatever thread

    @property
    def held(self) -> int:
        return sum(list(self._live.values()))

    def room(self, nbytes: int, queue: Queue) -> torch.Tensor:
        if self.held + nbytes > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes.\nMore is said here.")
        room, key = super().room(nbytes, queue), object()
        self._live[key] = nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(room.untyped_storage(), self._live.pop, key)
        return room


def _copied(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


@contextmanager
def _launched_here() -> Iterator[None]:
    before, _computing.place = getattr(_computing, "place", None), None
    try:
        yield
    finally:
        _computing.place = before


class _InOrder(TorchDispatchMode):
    """torch's own operations on a device come after the launches before them: those are done first."""

    def __init__(self, place: Lazy):
        super().__init__()
        self._place = place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(_computing, "place", None) is self._place:  # not by what is launched itself
            self._place.compute()
        return func(*args, **(kwargs or {}))


@contextmanager
def queued_launches() -> Iterator[None]:
    """Within it a launch goes to the queue of the placement whose `computing` it is in; inside `as_gpu`."""
    run = common.launch

    def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        place: Lazy | None = getattr(_computing, "place", None)
        if place is None:
            run(kernel, programs, *args, **options)
        elif programs:
            place.counts["launches"] += 1
            place.give("compute", lambda: run(kernel, programs, *args, **options))

    with patch.object(common, "launch", launch):
        yield


def placing(make: Callable[[], Placement]) -> Callable[[torch.device], Placement]:
    """What `DeviceMerging` makes queues with."""
    return lambda device: make()
