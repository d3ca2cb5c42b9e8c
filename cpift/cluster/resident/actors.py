"""Models in the memory of Ray actors: each holds some shards of all models for whoever asks.

An actor that is lost, with its node maybe, is started again by Ray, and what it was asked is asked again: its answers
follow from the question (`merging.resident.holder`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray
import ray.exceptions

from cpift.cluster.session import ray_answers, require_ray, use_assigned_gpus
from cpift.devices import free_on, own_gpus
from cpift.errors import CpiftError, first_line
from cpift.extensions import modules_beside
from cpift.merging.resident.engine import GPU_SHARE
from cpift.merging.resident.holder import Holder
from cpift.merging.resident.holders import Holders, LostError
from cpift.merging.resident.residents import Residents, Room

RESTARTS = 3
_LOOK_SECONDS = 5.0
_ROOM_SECONDS = 180.0  # for a lost actor to be there again
_ALIVE = "ALIVE"
Make = Callable[[Room, int, int, int], Residents]  # what an actor holds models in: room, limit, number, width


class Actors:
    """So many actors that hold models, until `close`.

    limit: bytes that all of them may hold. asks: what each takes of its node, as Ray's actors have it. threads: of each
    while it computes.
    """

    def __init__(
        self, count: int, room: Room, limit: int, asks: Mapping[str, Any], threads: int, make: Make | None = None
    ):
        """make: in this process's memory, or its GPU's, if not given."""
        options = {"scheduling_strategy": "SPREAD", "num_cpus": 0} | dict(asks)
        start = _Actor.options(**options).remote  # type: ignore[attr-defined]  # ray.remote makes it
        make = make or _make
        self._actors = [start(make, (room, limit, number, count), threads) for number in range(count)]
        self.holders = Holders([_Asking(actor) for actor in self._actors], send, room, limit)

    def there(self, seconds: float) -> bool:
        """Whether all of them are, within so many seconds."""
        calls = [actor.ready.remote() for actor in self._actors]
        return len(ray.wait(calls, num_returns=len(calls), timeout=seconds)[0]) == len(calls)

    def lost(self) -> int:
        """How many have ended and are not started again."""
        return sum(_state(actor) == "DEAD" for actor in self._actors if ray_answers())

    def close(self) -> None:
        for actor in self._actors if ray_answers() else ():
            ray.kill(actor)


def send(what: Any) -> _Sent:
    """For actors that are asked about it. A user's conflict rule goes to them as it was loaded here."""
    for module in modules_beside():
        ray.cloudpickle.register_pickle_by_value(module)
    return _Sent([ray.put(what)])


class _Sent:
    """An object that each actor fetches once."""

    def __init__(self, held: Sequence[Any]):
        self._held = held  # in a list, for Ray would fetch an argument with each call

    def __call__(self) -> Any:
        return ray.get(self._held[0])


class _Asking:
    """An actor as `Holders` asks it."""

    def __init__(self, actor: Any):
        self._actor = actor

    def __call__(self, what: str, *arguments: Any) -> Callable[[], Any]:
        return partial(_answer, self._actor, self._actor.ask.remote(what, *arguments))


def _answer(actor: Any, call: Any) -> Any:
    """What an actor answers; what it raised is raised as it was. Raises LostError."""
    seen = time.monotonic()
    while not ray.wait([call], timeout=_LOOK_SECONDS)[0]:
        require_ray()
        now = time.monotonic()
        seen = now if _state(actor) == _ALIVE else seen
        if now - seen > _ROOM_SECONDS:
            raise LostError("a process that holds models was lost, and no node has room for another")
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, (CpiftError, ValueError, OSError)) else error from None
    except ray.exceptions.RayError as error:
        raise LostError(f"a process that holds models was lost {RESTARTS + 1} times: {first_line(error)}") from error


def _state(actor: Any) -> str:
    state: str = ray._private.state.actors(actor._actor_id.hex()).get("State", "")
    return state


def _make(room: Room, limit: int, number: int, width: int) -> Residents:
    place = None
    if room.on_device:
        from cpift_kernels import placement_of

        (gpu,) = own_gpus()
        place = partial(placement_of, gpu)
    return Residents([place], limit, room, number, width)


@ray.remote(max_restarts=RESTARTS, max_task_retries=-1)
class _Actor:
    def __init__(self, make: Make, how: tuple[Room, int, int, int], threads: int):
        self._make, self._how, self._threads = make, how, threads
        self._holder: Holder | None = None

    def ready(self) -> None:
        """It is there."""

    def ask(self, what: str, *arguments: Any) -> Any:
        if self._holder is None:
            import torch

            use_assigned_gpus()
            torch.set_num_threads(self._threads)
            self._holder = Holder(self._make(*self._how))
        return getattr(self._holder, what)(*arguments)


@ray.remote(num_cpus=0, num_gpus=1)
def _free() -> int:
    """Bytes of a GPU that models may take."""
    use_assigned_gpus()
    return int(GPU_SHARE * min(map(free_on, own_gpus())))


def gpu_room(seconds: float) -> int | None:
    """Bytes that models may take on a GPU of a node; None where none is free within so many seconds."""
    call = _free.remote()
    if not ray.wait([call], timeout=seconds)[0]:
        ray.cancel(call)
        return None
    room: int = ray.get(call)
    return room
