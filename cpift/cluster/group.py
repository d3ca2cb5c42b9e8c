"""Ray: one Ray Train worker group for a whole run, whose workers take whole fine-tunes and evaluations.

A Ray Train run a fine-tune (`fits.py`) costs a controller, its helpers, and a worker that imports torch and
transformers anew: five times the training itself where that is short. `servable` says what a group cannot take.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import BackendConfig
from ray.train.backend import Backend
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cpift.cluster.desk import ENDED, Desk
from cpift.cluster.placement import Nodes, demand, train_options
from cpift.cluster.session import KEPT, POLL_SECONDS, alive_nodes, first_ready, started_here
from cpift.cluster.work import serve
from cpift.cluster.work_queue import Outcome, WorkItem
from cpift.config.run import ResourcesConfig
from cpift.config.training import Tracker
from cpift.console.progress import OnProgress
from cpift.errors import StageError
from cpift.training.tracking import tracker_variables

_NAME = "workers"  # Ray's name of the group's run, a folder of its storage; nothing is kept there
_CLOSE_SECONDS = 30.0
_ROOM_SECONDS = 180.0  # for nodes that were lost to come back


@dataclass(frozen=True)
class WorkerKind:
    """What all workers of a group have alike: what each takes, and what the environment says to trackers."""

    worker: tuple[tuple[str, float], ...]  # a Demand
    variables: tuple[tuple[str, str], ...]


def servable(resources: ResourcesConfig, tracking: Sequence[Tracker]) -> WorkerKind | None:
    """The workers that fine-tunes of these resources take; None where each needs a Ray Train run of its own.

    That is where several workers share one fine-tune (DDP, FSDP, elastic or not), and where checkpoints go to a storage
    of their own.
    """
    if resources.by_train:
        return None
    variables = tracker_variables(tracking) if resources.on_cluster else {}  # workers of a Ray of ours have them
    return WorkerKind(tuple(demand(resources).items()), tuple(sorted(variables.items())))


class _Apart(Backend):
    """Workers that know nothing of each other: one that ends is replaced, and the others go on."""

    has_replica_groups = True


class _ApartConfig(BackendConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return _Apart


class _GroupTrainer(DataParallelTrainer):
    """Without what hands out Ray's data sets: rows are read as a fine-tune needs them."""

    def _create_default_callbacks(self) -> list[Any]:
        return [
            callback for callback in super()._create_default_callbacks() if not isinstance(callback, DatasetsCallback)
        ]


class _Unscaled(FixedScalingPolicy):
    """A size that no autoscaler is told of."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ray's own starts a process here that speaks with the autoscaler."""

    def _maybe_send_resource_request(self) -> None:
        """Nobody is there to ask."""


class _OwnRayTrainer(_GroupTrainer):
    """On a Ray of ours, which nothing scales, and with which all ends that a controller leaves behind: without the two
    processes that see to that on a cluster, each of which costs as much as a short fine-tune to start."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **settings: Any) -> ray.train.Result:
        unscaled = _Unscaled(settings.pop("scaling_policy").scaling_config)
        return super()._initialize_and_run_controller(scaling_policy=unscaled, **settings)


class FitGroup:
    """`size` workers of a kind, from now until `close`; `folder`: on storage that all nodes see."""

    def __init__(self, kind: WorkerKind, size: int, resources: ResourcesConfig, folder: Path):
        self.kind, self.size = kind, size
        self._failures, self._folder, self._finished = resources.max_failures, folder, 0
        self._error: BaseException | None = None
        self._busy = self._dismissed = False
        # Ray's own watch is for workers that do not answer at all; the worker's, for one that does and trains no more.
        os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(min(600.0, resources.hang_timeout)))
        name = f"desk-{uuid.uuid4().hex[:8]}"
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._desk = Desk.options(name=name, scheduling_strategy=here).remote()  # type: ignore[attr-defined]  # ray.remote makes it
        self._thread = threading.Thread(target=self._drive, args=(self._trainer(name),), daemon=True)
        self._thread.start()

    def run(
        self, items: Sequence[WorkItem], on_result: Callable[[str, Any], None], on_progress: OnProgress
    ) -> dict[str, BaseException | None]:
        """Do all of it, as many at once as there are workers; by title what failed. `on_result` gets each result as
        soon as it is there."""
        failures: dict[str, BaseException | None] = {}
        self._busy = True  # and so it stays where the caller is interrupted
        _answer(self._desk.put.remote(items))
        seen = time.monotonic()
        while len(failures) < len(items):
            seen = time.monotonic() if self._has_room() else seen
            if time.monotonic() - seen > _ROOM_SECONDS:
                raise StageError(f"no node had room for a worker for {_ROOM_SECONDS:g} s: were nodes lost? {KEPT}")
            messages, outcomes = _answer(self._desk.look.remote(POLL_SECONDS))
            for message in messages:
                on_progress(message)
            for title, outcome in outcomes.items():
                failures[title] = _failure(outcome)
                self._finished += 1
                if failures[title] is None:
                    on_result(title, outcome.result)
            if not self._thread.is_alive():
                lost = self._error or StageError("the group of workers ended")
                failures |= {item.title: lost for item in items if item.title not in failures}
        self._busy = False
        return failures

    @property
    def usable(self) -> bool:
        return self._thread.is_alive() and not self._dismissed

    def dismiss(self) -> None:
        """Hand out no more work: the workers leave, while the caller goes on."""
        if not self._dismissed:
            self._dismissed = True
            self._desk.close.remote(self._busy)

    def close(self) -> None:
        """Let the workers go, and wait until what they held is free. Of a `run` that was interrupted they are ended."""
        self.dismiss()
        self._thread.join(_CLOSE_SECONDS)
        ray.kill(self._desk)
        shutil.rmtree(self._folder / _NAME, ignore_errors=True)

    def _has_room(self) -> bool:
        """Whether a worker fits any node that runs: Ray Train would wait for one for ever. Raises StageError if Ray is
        lost."""
        return Nodes([node["Resources"] for node in alive_nodes()]).has_room(dict(self.kind.worker))

    def _trainer(self, desk: str) -> DataParallelTrainer:
        shutil.rmtree(self._folder / _NAME, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        kind = self.kind
        runtime: dict[str, Any] = {"worker_runtime_env": {"env_vars": dict(kind.variables)}} if kind.variables else {}
        # Of a piece of work the desk counts failures. These are of workers that end before they hold any.
        limits: dict[str, Any] = {"max_failures": 10 * (self._failures + 1), "controller_failure_limit": self._failures}
        return (_OwnRayTrainer if started_here() else _GroupTrainer)(
            serve,
            train_loop_config={"desk": desk},
            backend_config=_ApartConfig(),
            scaling_config=ray.train.ScalingConfig(num_workers=self.size, **train_options(dict(kind.worker))),
            run_config=ray.train.RunConfig(
                name=_NAME,
                storage_path=str(self._folder),
                failure_config=ray.train.FailureConfig(**limits),
                **runtime,
            ),
        )

    def _drive(self, trainer: DataParallelTrainer) -> None:
        """Keep the group up, by another controller where one ends, unless nothing is finished in between."""
        left, finished = self._failures, 0
        while True:
            try:
                trainer.fit()
                return
            except (*ENDED, ray.exceptions.ActorUnavailableError, ray.train.TrainingFailedError) as error:
                left, finished = (left - 1 if self._finished == finished else self._failures), self._finished
                if left < 0:
                    self._error = error
                    return
            except BaseException as error:
                self._error = error
                return


def _answer(asked: Any) -> Any:
    """What the desk says. Raises StageError where Ray is lost, for it would say nothing for ever."""
    return ray.get(first_ready([asked]))


def _failure(outcome: Outcome) -> BaseException | None:
    return None if outcome.failure is None else StageError(outcome.failure)
