"""Models in the memory of several processes, as whoever selects and merges asks these (`holder.Holder`).

What is exchanged is a sample, counts, histograms, the masks of a selection and the elements of a merged model; models
stay. Where a process is lost for good, all of it is done as it would be without.
"""

from __future__ import annotations

import copy
import itertools
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from cpift_kernels import select_over

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.errors import CpiftError
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import Fill, Merged, MergeMethod
from cpift.merging.gpu.lanes import GpuMemoryError
from cpift.merging.resident.holder import NoRoomError, Selecting, Sent, Step
from cpift.merging.resident.residents import Room, able, identity, on_shards, runs
from cpift.merging.resident.shard import ResidentShard
from cpift.method.measures import Update, without_passing

if TYPE_CHECKING:
    import numpy as np
    import torch
    from cpift_kernels import Core, Masks, Models, Ready

Answer = Callable[[], Any]  # waits for it
Ask = Callable[..., Answer]  # begins a call of a method of `Holder`: its name, and its arguments
_AHEAD = 4  # pieces that are asked for before the first of them is there


class LostError(CpiftError):
    """A process that holds models has ended, and no other takes its place."""


_ELSEWHERE = LostError, NoRoomError, GpuMemoryError  # what is not done by holders is done without them


class Holders:
    """What `residents.Residents` is, of several processes.

    asks: of each holder, in the order of their shards. send: makes of an object what a holder is given in its place.
    room, limit: how models lie there, and the bytes that all of them may hold.
    """

    def __init__(self, asks: Sequence[Ask], send: Callable[[Any], Sent], room: Room, limit: int):
        self.asks, self._send, self.room, self.limit = list(asks), send, room, limit

    def select(self, models: Models, counts: Sequence[int], masks: Masks, budget: int) -> list[list[Core]] | None:
        """See `merging.engine.Selects`."""
        models = without_passing(models)
        if not isinstance(models, Update) or (self.room.on_device and models.moments):
            return None
        if not self._fits(models.models, 0):
            return None
        name, sent = uuid.uuid4().hex, self._send(Selecting(models, counts, budget))
        parts = runs(models.models[0].tensors, models.names, len(self.asks))
        shards = [_FarShard(partial(ask, "select", name, sent), models, *part) for ask, part in self._with(parts)]
        try:
            cores = select_over(shards, counts, side_by_side=True)
            for shard in shards:
                shard.fetch(masks, len(counts))
        except _ELSEWHERE:
            return None
        finally:
            _leave(self.asks, name)
        return cores

    def placed(self, method: MergeMethod) -> MergeMethod | None:
        """See `Residents.placed`."""
        if not able(method, self.room.on_device) or not self._fits(method.models, len(method.tuned)):
            return None
        bare = copy.copy(method)
        bare.statistics = bare.reused = None
        name, sent = uuid.uuid4().hex, self._send(bare)
        local = ResidentShard(key=identity)  # says that the files are still those that were opened
        far = {number: _FarMethod(partial(_of, ask, name, sent), method, local) for number, ask in enumerate(self.asks)}
        placed = on_shards(method, far, len(self.asks))
        weakref.finalize(placed, _leave, self.asks, name).atexit = False
        return placed

    def _fits(self, models: Sequence[Checkpoint], tasks: int) -> bool:
        known = all(identity(model) is not None for model in models)
        return known and self.room.needs(models, tasks) <= self.limit

    def _with(self, parts: Iterable[Any]) -> Iterator[tuple[Ask, Any]]:
        return zip(self.asks, parts, strict=True)


def _of(ask: Ask, name: str, sent: Sent, what: str, *arguments: Any) -> Answer:
    return ask(what, name, sent, *arguments)


def _leave(asks: Iterable[Ask], name: str) -> None:
    for ask in asks:
        ask("leave", name)


class _FarShard:
    """A shard of a selection that a holder has (`cpift_kernels.SelectionShard`)."""

    def __init__(self, ask: Ask, models: Update, first: int, last: int):
        self._ask, self._first, self._steps = ask, first, list[Step]()
        self.sizes, self.tasks = models.sizes[first:last], models.tasks

    def sample(self, segment: np.ndarray, start: np.ndarray) -> Any:
        return self._asked("sample", segment, start)()

    def mark(self, brackets: np.ndarray) -> Any:
        return self._done("mark", brackets)

    def histogram(self, task: int, k: int, prefix: int, shift: int) -> Any:
        return self._asked("histogram", task, k, prefix, shift)()

    def settle(self, task: int, k: int, least: int, ties: int) -> int:
        return int(self._done("settle", task, k, least, ties))

    def fetch(self, masks: Masks, ks: int) -> None:
        """Its masks, to `masks` of all tensors."""
        tensors = range(self._first, self._first + len(self.sizes))
        wanted = list(itertools.product(range(self.tasks), range(ks), tensors))
        answers = (self._asked("words", *one) for one in wanted)
        for (task, k, tensor), words in zip(wanted, _in_turn(answers), strict=True):
            if len(words):
                masks.store(task, k, tensor, 0, words.view("uint32").copy())  # what Ray hands out is read-only

    def _asked(self, *step: Any) -> Answer:
        return self._ask(list(self._steps), step)

    def _done(self, *step: Any) -> Any:
        self._steps.append(step)
        return self._ask(list(self._steps))()


def _in_turn(answers: Iterable[Answer]) -> Iterator[Any]:
    """What is answered, in order; the next ones are asked for meanwhile."""
    waiting = deque[Answer]()
    for answer in answers:
        waiting.append(answer)
        if len(waiting) > _AHEAD:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


class _FarMethod:
    """A method whose tensors a holder merges."""

    def __init__(self, ask: Ask, host: MergeMethod, local: ResidentShard):
        self._ask, self._host = ask, host
        self.models = [local.model(model) for model in host.models]
        self._waiting = deque[_Piece]()

    def at(self, name: str) -> _FarMethod:
        return self

    def tensor(self, info: TensorInfo) -> Merged:
        try:
            record = self._ask("record", info.name)()
        except _ELSEWHERE:
            return self._host.tensor(info)
        here: list[Fill] = []  # what is done where the holder is lost later

        def otherwise(start: int, stop: int, out: torch.Tensor) -> None:
            if not here:
                here.append(self._host.tensor(info)[1])
            here[0](start, stop, out)

        def fill(start: int, stop: int, out: torch.Tensor) -> Ready:
            if len(self._waiting) >= _AHEAD:
                self._waiting.popleft()()
            answer = self._ask("piece", info.name, start, stop)
            piece = _Piece(answer, out, partial(otherwise, start, stop, out))
            self._waiting.append(piece)
            return piece

        return record, fill


class _Piece:
    """Elements that are on their way into a buffer; calling it waits until they are there."""

    def __init__(self, answer: Answer, out: torch.Tensor, otherwise: Callable[[], None]):
        self._answer: Answer | None = answer
        self._out, self._otherwise, self._lock = out, otherwise, threading.Lock()

    def __call__(self) -> None:
        import numpy as np
        import torch

        with self._lock:
            if self._answer is None:
                return
            try:
                np.copyto(self._out.view(torch.uint8).numpy(), self._answer())
            except _ELSEWHERE:
                self._otherwise()
            self._answer = None
