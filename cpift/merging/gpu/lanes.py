"""Models and masks whose slices lie on a device: copied there while what was asked for before is computed.

A merge uses a device from two threads, one that writes a tensor and one that looks ahead at the next: each has a lane.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from cpift_kernels import Lane, Placement, Staged

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.errors import CpiftError, Problem
from cpift.method.masks import RegionMasks

if TYPE_CHECKING:
    import numpy as np
    import torch

_Slice = tuple[int, str, int, int]  # of a model, by its number: tensor, elements start..stop-1
_AHEAD: ContextVar[bool] = ContextVar("_AHEAD", default=False)


class GpuMemoryError(CpiftError):
    """What is computed on a GPU does not fit its memory."""


@contextmanager
def within_memory() -> Iterator[None]:
    """Raises GpuMemoryError where torch finds no room on the device."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        what = f"the GPU has no room for the slices of all models ({str(error).splitlines()[0]})"
        remedy = "use `cpu`, or end what else holds its memory (nvidia-smi, rocm-smi)"
        raise GpuMemoryError(f"resources.device: {what} → {remedy}") from error


class Lanes:
    """The lanes of one merge."""

    def __init__(self, here: Placement, ahead: Placement):
        self._of = {False: Slices(here), True: Slices(ahead)}

    @property
    def current(self) -> Slices:
        return self._of[_AHEAD.get()]

    @contextmanager
    def looking_ahead(self) -> Iterator[Lane]:
        """What this thread asks for within it goes through the lane that looks ahead."""
        token = _AHEAD.set(True)
        try:
            yield self.current.lane
        finally:
            _AHEAD.reset(token)


class Slices:
    """A lane, and the slices of models that go through it before they are asked for.

    A slice that is announced is being read from the disk; once the next one is announced too it is copied, where slices
    of its model were asked for before. So two slices of a model are on the device at most.
    """

    def __init__(self, place: Placement):
        self.lane = Lane(place)
        self._announced: dict[int, list[_Slice]] = {}  # by model, to be copied
        self._staged: dict[_Slice, Staged] = {}
        self._used: set[int] = set()  # models

    def announce(self, number: int, model: Checkpoint, name: str, start: int, stop: int) -> None:
        waiting = self._announced.setdefault(number, [])
        while waiting and number in self._used:
            self._stage(waiting.pop(0), model)
        waiting.append((number, name, start, stop))

    def take(self, number: int, model: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
        """On the device, for what is launched from now on; until it is given back, if it was announced."""
        wanted, waiting = (number, name, start, stop), self._announced.get(number, [])
        self._used.add(number)
        if wanted in waiting:
            waiting.remove(wanted)
            self._stage(wanted, model)
        if wanted in self._staged:
            return self.lane.use(self._staged[wanted])
        return self.lane.load(model.slice(name, start, stop))

    def give_back(self, number: int, name: str, start: int, stop: int) -> None:
        """Whatever reads the slice was launched, or nothing will."""
        given = number, name, start, stop
        if given in self._announced.get(number, []):
            self._announced[number].remove(given)
        if (staged := self._staged.pop(given, None)) is not None:
            self.lane.done(staged)

    def _stage(self, one: _Slice, model: Checkpoint) -> None:
        self._staged[one] = self.lane.stage(model.slice(*one[1:]))


class Placed:
    """Models and masks as their slices on a device; the same object again for the same one."""

    def __init__(self, lanes: Lanes):
        self._lanes = lanes
        self._known: dict[int, DeviceCheckpoint] = {}

    def model(self, model: Checkpoint) -> Checkpoint:
        return self._known.setdefault(id(model), DeviceCheckpoint(model, self._lanes, len(self._known)))

    def masks(self, masks: RegionMasks) -> RegionMasks:
        return DeviceMasks(masks, self._lanes)


class DeviceCheckpoint(Checkpoint):
    """A model whose slices are on a device from when they are asked for until they are released."""

    def __init__(self, inner: Checkpoint, lanes: Lanes, number: int):
        self.folder, self.config, self.tensors = inner.folder, inner.config, inner.tensors
        self.ties, self.is_apart, self._maps = inner.ties, inner.is_apart, {}
        self._inner, self._lanes, self._number = inner, lanes, number

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """On the device, for what is launched before it is released."""
        return self._lanes.current.take(self._number, self._inner, name, start, stop)

    def gather(self, name: str, starts: np.ndarray[Any, Any], length: int) -> torch.Tensor:
        return self._inner.gather(name, starts, length)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        self._inner.prefetch(name, start, stop)
        self._lanes.current.announce(self._number, self._inner, name, start, stop)

    def release(self, name: str, start: int, stop: int) -> None:
        self._lanes.current.give_back(self._number, name, start, stop)
        self._inner.release(name, start, stop)

    def require_unchanged(self) -> None:
        self._inner.require_unchanged()

    def unequal_copies(self) -> Iterator[Problem]:
        return self._inner.unequal_copies()


class DeviceMasks(RegionMasks):
    """Masks whose words are copied to a device as they are asked for."""

    def __init__(self, inner: RegionMasks, lanes: Lanes):
        self._inner, self._lanes = inner, lanes

    def has(self, name: str) -> bool:
        return self._inner.has(name)

    def words(self, task: str, name: str, start: int, stop: int) -> torch.Tensor:
        return self._lanes.current.lane.load(self._inner.words(task, name, start, stop))
