"""Ray: a connection for all stages, the progress of what runs on it, and how failures are told."""

from __future__ import annotations

import gc
import logging
import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from cpift.config.run import ResourcesConfig
from cpift.console.ending import handlers_kept, stopping
from cpift.console.progress import OnProgress, ProgressMessage
from cpift.errors import CpiftError, StageError, explain_os_error, first_line

NAMESPACE = "cpift"
POLL_SECONDS = 0.5
_LOOK_SECONDS = 5.0
_ANSWER_SECONDS = 5.0
KEPT = "what was finished is kept → give the same command again"
LOST = f"Ray was lost: a process of its own (the raylet, or the last node's) has ended; {KEPT}"
# Ray Train's defaults are made for hours of training; these shave seconds off short ones on the cluster that we start.
_LOCAL_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_worker_niceness": "0",  # at Ray's 15 any other program on the machine starves the workers
}


@contextmanager
def ray_session(resources: ResourcesConfig) -> Iterator[None]:
    """Connect to the configured cluster, or start Ray here and stop it afterwards. Nested use is free."""
    if ray.is_initialized():
        yield
        return
    address = resources.cluster
    # "local": without an address Ray would join whatever cluster somebody started on this machine.
    options: dict[str, Any] = {"address": "local", "include_dashboard": False, "object_store_memory": 256 * 2**20}
    if address is not None:
        _require_answer(address)
        options = {"address": address}
    else:
        for name, value in _LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    _require_same_mode(address)
    asked = os.environ.get(_AUTH_MODE)
    with handlers_kept():
        ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR, **options)
    _modes.setdefault(os.getpid(), (asked, os.environ.get(_AUTH_MODE)))
    try:
        yield
    except ray.exceptions.RayError as error:  # what was told of one piece of work is no longer one of these
        raise StageError(f"Ray failed: {first_line(error)} {KEPT}") from error
    finally:
        if ray_answers():
            ray.shutdown()


def ray_answers() -> bool:
    """Whether Ray can be told to end: not where a signal ends this process, nor where Ray was lost."""
    return not (stopping() or _lost)


def _require_answer(address: str) -> None:
    """Ray would wait for ever, deaf to signals, for a cluster that is not there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # auto, local
        return
    try:
        socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
    except OSError as error:
        raise CpiftError(
            f"no Ray cluster answers at {address} ({error}) → give the address of its head in resources.address or "
            "RAY_ADDRESS, or leave both out to start Ray here"
        ) from None


def started_here() -> bool:
    """Whether the Ray of this process is one that it started, and that ends with it."""
    node: Any = ray._private.worker._global_node
    return node is not None and bool(node.is_head())


def _require_same_mode(address: str | None) -> None:
    """Ray takes RAY_AUTH_MODE once for a process, and sets `token` where it starts by itself. What runs under another
    mode could not call this process: actors would be cancelled and objects lost, with no word of why."""
    now = os.environ.get(_AUTH_MODE)
    asked, first = _modes.get(os.getpid(), (now, now))
    if now != first or (address is not None and asked != first):
        raise CpiftError(
            f"RAY_AUTH_MODE: {now or 'unset'}, but in this process Ray was first used with {first or 'none'} (where it "
            "starts by itself, Ray sets `token`) → start a new Python process, with RAY_AUTH_MODE as the cluster has it"
        )


def require_ray() -> None:
    """Raise StageError where Ray has lost what it needs: its calls would wait for ever.

    Of a Ray that was started here the processes are looked at, for it takes a minute to notice; a cluster notices.
    """
    global _lost
    node: Any = ray._private.worker._global_node
    ended = started_here() and bool(node.dead_processes())
    if ended or not any(member["Alive"] for member in ray.nodes()):
        _lost = True
        raise StageError(LOST)


_lost = False
_AUTH_MODE = "RAY_AUTH_MODE"
# By process, of its first connection: the mode that the user gave, and the one that Ray took.
_modes: dict[int, tuple[str | None, str | None]] = {}


def first_ready(tasks: Sequence[Any]) -> Any:
    """The first of these tasks to end. Raises StageError where Ray is lost."""
    while True:
        ready, _ = ray.wait(list(tasks), num_returns=1, timeout=_LOOK_SECONDS)
        if ready:
            return ready[0]
        require_ray()


def alive_nodes() -> list[dict[str, Any]]:
    """What Ray knows of each node that runs. Raises StageError if none does."""
    require_ray()
    return [node for node in ray.nodes() if node["Alive"]]


def free_resources() -> list[dict[str, float]]:
    """What each node that runs has left. Raises StageError if none runs."""
    free = ray._private.state.available_resources_per_node()
    return [free.get(node["NodeID"], {}) for node in alive_nodes()]


def cluster_gpus(resources: ResourcesConfig) -> float:
    """GPUs of the cluster that the config or the environment names. Raises CpiftError where none answers."""
    with ray_session(resources):
        gpus: float = sum(node["Resources"].get("GPU", 0.0) for node in alive_nodes())
    return gpus


def use_assigned_gpus() -> None:
    """In a task, an actor or a Train worker: compute on the GPUs that Ray assigned to it, and on no other."""
    from cpift.devices import assign_gpus

    assign_gpus(len(ray.get_runtime_context().get_accelerator_ids()["GPU"]))


def leave_modules_alone() -> None:
    """In a process of ours that has imported what it needs: garbage is no longer looked for there. accelerate looks
    before each stage of a fine-tune, which took half a second each time, a quarter of a short run's processor time."""
    gc.freeze()


@ray.remote(num_cpus=0, max_restarts=-1)
class ProgressBoard:
    """Collects the latest progress message of every running piece of work."""

    def __init__(self) -> None:
        self._latest: dict[str, ProgressMessage] = {}

    def post(self, message: ProgressMessage) -> None:
        self._latest[message["title"]] = message

    def take(self) -> list[ProgressMessage]:
        messages, self._latest = list(self._latest.values()), {}
        return messages


@contextmanager
def progress_board() -> Iterator[tuple[str, Any]]:
    """The name of a new board, for workers to find it, and its handle; the board ends with the block."""
    name = f"progress-{uuid.uuid4().hex[:8]}"
    board = ProgressBoard.options(name=name).remote()  # type: ignore[attr-defined]  # ray.remote makes it
    try:
        yield name, board
    finally:
        ray.kill(board)


def show_progress(board: Any, on_progress: OnProgress) -> None:
    """Hand on what the workers posted since the last call."""
    require_ray()
    try:
        messages = ray.get(board.take.remote(), timeout=_LOOK_SECONDS)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return  # it died with its node and is being restarted; the work goes on
    for message in messages:
        on_progress(message)


def raise_failures(failures: dict[str, BaseException | None], hint: str = "") -> None:
    """Raise StageError that says which failed and why, if any did; `hint` is its last line."""
    failed = {title: error for title, error in failures.items() if error is not None}
    if not failed:
        return
    interrupt = next((error for error in failed.values() if not isinstance(error, Exception)), None)
    if interrupt is not None:
        raise interrupt
    lines = [f"  - {title}: {_root_cause(error).removeprefix(f'{title}: ')}" for title, error in failed.items()]
    done = len(failures) - len(failed)
    first = f"{len(failed)} of {len(failures)} failed, {done} finished and are kept"
    raise StageError("\n".join([first, *lines, hint]).rstrip())


def _root_cause(error: BaseException) -> str:
    """The last words of the innermost error, for Ray wraps a worker's exception several times."""
    workers = getattr(error, "worker_failures", None)
    inner = next(iter(workers.values())) if workers else error
    return explain_os_error(inner) or str(getattr(inner, "cause", None) or inner).strip()
