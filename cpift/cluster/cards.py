"""Work for the GPUs of a Ray cluster, or of this machine: a process a GPU, which takes one piece after another.

Each has pinned memory and streams of its own, so it stays as long as there is work for it, and leaves when there is
none: its GPU is then another's. One that is lost, with its node maybe, is replaced, and its piece is done again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cpift.cluster.session import KEPT, alive_nodes, ray_answers, use_assigned_gpus
from cpift.errors import StageError, first_line
from cpift.merging.engine import Merging, Tell

RETRIES = 3
_LOOK_SECONDS = 5.0
_WAIT_SECONDS = 30.0  # for a first GPU to be free, before somebody is told
_ROOM_SECONDS = 180.0  # for nodes with GPUs that were lost to come back
# What a call to a process says that ended, or that cannot be reached.
_LOST = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)

Make: TypeAlias = Callable[[], Merging]


@dataclass(frozen=True)
class Work:
    """A piece of a pass over the models. position: share of the parameters that come before it.

    function: takes where it computes, None for the processors, and the arguments; both are sent to other processes.
    """

    position: float
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Card:
    """A GPU of a node, with the threads that are its own there."""

    node: str
    threads: int


def cards(threads: int) -> list[Card]:
    """All GPUs of the nodes that run, in a fixed order. threads: the most that one has."""
    found = []
    for node in sorted(alive_nodes(), key=lambda node: str(node["NodeID"])):
        gpus, cpus = int(node["Resources"].get("GPU", 0)), node["Resources"].get("CPU", 0)
        found += [Card(node["NodeID"], max(1, min(threads, int(cpus // gpus)))) for _ in range(gpus)]
    return found


def on_cards(works: Sequence[Work], there: Sequence[Card], make: Make, tell: Tell) -> Iterator[tuple[int, Any]]:
    """Do all of it; the number of each piece and a reference to what became of it, as soon as it has ended.

    make: what a process computes with, made there. tell: is told where no GPU is free for a while. Raises StageError
    where processes are lost too often, or no node has a GPU any more; and what `make` raised.
    """
    pool = _Pool(works, there, make, tell)
    try:
        yield from pool.ended()
    finally:
        pool.close()


class _Pool:
    """The processes of one pass, by the number of their card. Each begins with the pieces of its own share of the
    parameters, which its node may still hold in its page cache, and then takes over others'."""

    def __init__(self, works: Sequence[Work], there: Sequence[Card], make: Make, tell: Tell):
        self._works, self._cards, self._make, self._tell = works, there, make, tell
        self._waiting = [deque[int]() for _ in there]
        for number, work in enumerate(works):
            self._waiting[int(work.position * len(there))].append(number)
        self._actors: dict[int, Any] = {}
        self._running: dict[Any, tuple[int, int | None]] = {}  # card and piece by call; None: it is starting
        self._lost = Counter[tuple[int, int | None]]()  # of a piece wherever it was, or of a card that never started
        self._begun, self._told = False, False

    def ended(self) -> Iterator[tuple[int, Any]]:
        fullest = sorted(range(len(self._cards)), key=lambda at: -len(self._waiting[at]))
        for at in fullest[: len(self._works)]:
            self._start(at)
        while self._running:
            call = self._next()
            at, number = self._running.pop(call)
            if (why := _lost(call)) is not None:
                self._replace(at, number, why)
                continue
            if number is None:
                _raise_own(call)
                self._begun = True
            else:
                yield number, call
            self._give(at)

    def close(self) -> None:
        for at in list(self._actors) if ray_answers() else ():
            self._leave(at)

    def _start(self, at: int) -> None:
        card = self._cards[at]
        near = NodeAffinitySchedulingStrategy(card.node, soft=True, _spill_on_unavailable=True)
        self._actors[at] = _Process.options(scheduling_strategy=near).remote(self._make, card.threads)  # type: ignore[attr-defined]  # ray.remote makes it
        self._running[self._actors[at].begin.remote()] = at, None

    def _give(self, at: int) -> None:
        """The next piece to a process, or its leave."""
        queue = self._waiting[at] or max(self._waiting, key=len)
        if not queue:
            self._leave(at)
            return
        number = queue.popleft() if queue is self._waiting[at] else queue.pop()
        work = self._works[number]
        self._running[self._actors[at].do.remote(work.function, *work.arguments)] = at, number

    def _leave(self, at: int) -> None:
        ray.kill(self._actors.pop(at))

    def _replace(self, at: int, number: int | None, why: BaseException) -> None:
        of = (at, None) if number is None else (-1, number)
        self._lost[of] += 1
        if self._lost[of] > RETRIES:
            raise StageError(f"a process with a GPU was lost {RETRIES + 1} times: {first_line(why)}")
        if number is not None:
            self._waiting[at].appendleft(number)
        self._leave(at)
        self._start(at)

    def _next(self) -> Any:
        """A call that has ended. Raises StageError where none can end any more."""
        began = seen = time.monotonic()
        while True:
            ready, _ = ray.wait(list(self._running), num_returns=1, timeout=_LOOK_SECONDS)
            if ready:
                return ready[0]
            now = time.monotonic()
            seen = now if cards(1) else seen
            if now - seen > _ROOM_SECONDS:
                raise StageError(f"no node has had a GPU for {_ROOM_SECONDS:g} s: were nodes lost? {KEPT}")
            if not (self._begun or self._told) and now - began > _WAIT_SECONDS:
                self._tell(f"resources.device cuda: waiting for one of {len(self._cards)} GPUs, which others hold")
                self._told = True


def _lost(call: Any) -> BaseException | None:
    """Why a call that has ended has no answer of its own."""
    try:
        ray.get(call)
    except _LOST as error:
        return error
    except ray.exceptions.RayError:
        return None
    return None


def _raise_own(call: Any) -> None:
    """What a process could not begin with, as it was raised there."""
    try:
        ray.get(call)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


@ray.remote(num_cpus=0, num_gpus=1, max_restarts=0)
class _Process:
    """Computes on the GPU that Ray assigned to it."""

    def __init__(self, make: Make, threads: int):
        self._make, self._threads = make, threads

    def begin(self) -> None:
        import torch

        use_assigned_gpus()
        torch.set_num_threads(self._threads)
        self._merging = self._make()

    def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self._merging, *arguments)
