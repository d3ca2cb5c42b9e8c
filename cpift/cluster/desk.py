"""Ray: the desk from which a group's workers take their work. Light on purpose, for it is a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import ray

from cpift.cluster.work_queue import Outcome, WorkItem, WorkQueue
from cpift.console.progress import ProgressMessage
from cpift.errors import first_line

CLOSED = "closed"  # what a worker takes from a desk that hands out no more
_WAIT_SECONDS = 10.0  # after which a worker with nothing to do asks again: it may have ended, and would be given work
_WATCH_SECONDS = 1.0
# What a call to an actor raises that has ended; the second where Ray ended it for its memory.
ENDED = (ray.exceptions.ActorDiedError, ray.exceptions.OutOfMemoryError)


@ray.remote(num_cpus=0)
class Desk:
    """Hands out work, notices workers that end, keeps the latest progress of each item until somebody looks."""

    def __init__(self) -> None:
        self._queue, self._closed = WorkQueue(), False
        self._latest: dict[str, ProgressMessage] = {}
        self._workers: dict[str, Any] = {}  # by their actor's id
        self._put, self._ended = asyncio.Event(), asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    async def put(self, items: Sequence[WorkItem]) -> None:
        self._queue.put(items)
        self._put.set()

    async def close(self, now: bool) -> None:
        """No more work; `now`: whoever is at work ends at once, and the one that takes its place finds this closed."""
        self._closed = True
        self._put.set()
        for worker in self._queue.holders if now else ():
            ray.kill(self._workers[worker])

    async def take(self, worker: str, actor: Any) -> Any:
        """An item's content, CLOSED, or after a while None: ask again."""
        self._workers[worker] = actor
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        until = time.monotonic() + _WAIT_SECONDS
        with contextlib.suppress(asyncio.TimeoutError):
            while not self._closed:
                if (content := self._queue.take(worker)) is not None:
                    return content
                self._put.clear()
                await asyncio.wait_for(self._put.wait(), until - time.monotonic())
        return CLOSED if self._closed else None

    async def finish(self, worker: str, outcome: Outcome) -> None:
        self._queue.finish(worker, outcome)
        self._ended.set()

    async def lose(self, worker: str, why: str) -> None:
        self._queue.lose(worker, why)
        self._put.set()
        self._ended.set()

    async def post(self, message: ProgressMessage) -> None:
        self._latest[message["title"]] = message

    async def look(self, seconds: float) -> tuple[list[ProgressMessage], dict[str, Outcome]]:
        """Progress and outcomes since the last look, after so many seconds or as soon as something has ended."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds)
        self._ended.clear()
        messages, self._latest = list(self._latest.values()), {}
        return messages, self._queue.outcomes()

    async def _watch(self) -> None:
        """What a worker held that ended is for the next one, whether or not another takes that worker's place."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            for worker in self._queue.holders:
                try:
                    await asyncio.wait_for(self._workers[worker].__ray_ready__.remote(), _WATCH_SECONDS)
                except ENDED as error:
                    del self._workers[worker]
                    await self.lose(worker, f"its worker ended: {first_line(error)}")
                except (ray.exceptions.RayError, asyncio.TimeoutError):
                    continue  # busy, or not to be reached just now
