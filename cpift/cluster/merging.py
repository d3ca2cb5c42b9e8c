"""Regions and fusion as Ray tasks: ranges of segments are marked, and output files written, by any worker.

Models lie where every node finds them under the same path, masks and output on storage that all nodes see: a folder,
or an object store (`resources.storage`, see `stored_merge.py`), and then masks come back through Ray, as brackets,
candidates and records always do. Work is cut by size and put together in order, so the bytes do not depend on how many
workers there are. A task whose worker or node is lost is run again, and costs what it had done.

Both passes give the same part of the parameters to the same node as long as it has room, so the second one may find in
its page cache what the first has read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.exceptions
from cpift_kernels import Mark, Marked, Masks, Range, Selection
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cpift.checkpoints.writing import Shard, ShardNote, ShardRecord
from cpift.cluster.session import alive_nodes, first_ready, ray_session
from cpift.cluster.stored_merge import fetch, merge_into, publish, with_stored_masks
from cpift.config.run import ResourcesConfig
from cpift.disk.guarded import guarded_reads
from cpift.disk.object_store import ObjectStore
from cpift.errors import CpiftError, StageError, first_line
from cpift.extensions import modules_beside
from cpift.merging.base import MergeMethod
from cpift.merging.checks import OnElements
from cpift.merging.engine import Place, Tell, merge_shards

_RETRIES = 3
_TASKS_A_CPU = 4  # so many tasks are cut for every processor, to even out their times


def merging_of(resources: ResourcesConfig, stored: bool = True) -> RayMerging:
    """Where a run selects and merges as tasks of Ray.

    stored: whether masks and fused shards go to `resources.storage`, where that is an object store. A sweep's or a
    comparison's lie in its folder alone, for there it is decided which of them are kept.
    """
    return RayMerging(resources if stored else resources.model_copy(update={"storage": None}))


class RayMerging:
    """How a pipeline on a cluster selects and merges (`merging.engine.Merging`)."""

    in_passing = False

    def __init__(self, resources: ResourcesConfig):
        self._resources = resources
        self._cpus = max(1, math.ceil(resources.cpus_per_worker))
        self._store = ObjectStore(str(resources.storage)) if resources.remote_storage else None

    def telling(self, tell: Tell) -> RayMerging:
        """It has nothing to tell."""
        return self

    def session(self) -> AbstractContextManager[None]:
        """Keep one connection over several stages."""
        return ray_session(self._resources)

    def mark(self, selection: Selection, masks: Masks) -> Mark:
        """Marks ranges in tasks, as many as the cluster has room for."""

        def mark(ranges: Sequence[Range], brackets: np.ndarray) -> Iterator[Marked]:
            with ray_session(self._resources):
                places = self._places()
                held = ray.put((selection, brackets, None if self._store else masks))
                step = max(1, len(ranges) // (_TASKS_A_CPU * len(places)))
                tasks = [
                    self._options(_mark, places, at / len(ranges)).remote(held, ranges[at : at + step], self._cpus)
                    for at in range(0, len(ranges), step)
                ]
                for task in tasks:
                    marked, words = _result(task)
                    for number, k, tensor, first, part in words:
                        masks.store(number, k, tensor, first, part.copy())  # what Ray hands out is read-only
                    yield from marked

        return mark

    def merge_shards(
        self, method: MergeMethod, shards: Sequence[Shard], out: Path, made_from: str, budget: int, progress: OnElements
    ) -> dict[str, ShardRecord]:
        """`merging.engine.merge_shards` with one task a file."""
        with ray_session(self._resources):
            return self._merge_all(method, shards, out, made_from, budget, progress)

    def placing(self, method: MergeMethod) -> Place:
        """Itself: a user's method or conflict rule goes to workers as it was loaded here."""
        for module in modules_beside():
            ray.cloudpickle.register_pickle_by_value(module)
        return _itself

    def publish(self, folder: Path, fingerprint: str) -> None:
        """Add what a finished model has beside its shards to those in the object store, if there is one."""
        if self._store is not None:
            publish(self._place(self._store, fingerprint), folder)

    def _merge_all(
        self, method: MergeMethod, shards: Sequence[Shard], out: Path, made_from: str, budget: int, progress: OnElements
    ) -> dict[str, ShardRecord]:
        places, position = self._places(), _positions(method)
        store = self._place(self._store, made_from) if self._store is not None else None
        self.placing(method)
        held = ray.put(method if store is None else with_stored_masks(method, store))
        pending = {
            self._options(_merge, places, position[shard.tensors[0].name]).remote(
                held, shard, out if store is None else store, made_from, budget, self._cpus
            ): shard
            for shard in shards
        }
        records: dict[str, ShardRecord] = {}
        failed: CpiftError | None = None
        while pending:
            ready = first_ready(list(pending))
            shard = pending.pop(ready)
            try:
                record = _result(ready)[shard.name]
                records[shard.name] = record if store is None else fetch(store, shard, out, made_from, record)
                progress(sum(info.numel for info in shard.tensors), shard.name)
            except CpiftError as error:  # the others are finished and kept
                failed = failed or error
        if failed is not None:
            raise failed
        return records

    def _place(self, store: ObjectStore, fingerprint: str) -> ObjectStore:
        return store.folder(f"fuse-{fingerprint[:12]}")

    def _places(self) -> list[str]:
        """Node ids in a fixed order, each as often as it runs tasks at once. Raises CpiftError if none runs any."""
        nodes = sorted((node["NodeID"], node["Resources"].get("CPU", 0)) for node in alive_nodes())
        places = [node for node, cpus in nodes for _ in range(int(cpus // self._cpus))]
        if not places:
            raise CpiftError(
                f"a task of regions and fusion takes {self._cpus} CPUs (resources.cpus_per_worker), the nodes "
                f"have {', '.join(f'{cpus:g}' for _, cpus in nodes)}: lower it, or add nodes"
            )
        return places

    def _options(self, task: Any, places: Sequence[str], position: float) -> Any:
        """A task about what begins at a share `position` of the parameters: on the node of that part if it has room."""
        node = places[int(position * len(places))]
        near = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)
        return task.options(num_cpus=self._cpus, max_retries=_RETRIES, scheduling_strategy=near)


def _itself(method: MergeMethod) -> MergeMethod:
    return method


def _positions(method: MergeMethod) -> dict[str, float]:
    """Share of all elements that come before each tensor, in name order."""
    infos = method.models[0].tensors.values()
    ends = list(accumulate(info.numel for info in infos))
    return {info.name: (end - info.numel) / ends[-1] for info, end in zip(infos, ends, strict=True)}


class _Words:
    """Collects the mask words of ranges, for a worker that cannot reach the files."""

    def __init__(self) -> None:
        self.stored: list[tuple[int, int, int, int, np.ndarray]] = []

    def store(self, task: int, k: int, tensor: int, first: int, words: np.ndarray) -> None:
        self.stored.append((task, k, tensor, first, words))

    def words(self, task: int, k: int, tensor: int) -> np.ndarray:
        raise NotImplementedError("marking writes masks and reads none")


@ray.remote
def _mark(
    held: tuple[Selection, np.ndarray, Masks | None], ranges: Sequence[Range], threads: int
) -> tuple[list[Marked], list[tuple[int, int, int, int, np.ndarray]]]:
    """What was found in the ranges and, where no masks are given to write to, their words."""
    import torch

    torch.set_num_threads(threads)
    selection, brackets, masks = held
    words = _Words()
    with guarded_reads("core regions"):
        marked = [selection.mark(part, brackets, words if masks is None else masks) for part in ranges]
    return marked, words.stored


@ray.remote
def _merge(
    method: MergeMethod, shard: Shard, target: Path | ObjectStore, made_from: str, budget: int, threads: int
) -> dict[str, ShardRecord] | dict[str, ShardNote]:
    """The shard's record, written into a folder; its note, uploaded to an object store."""
    import torch

    torch.set_num_threads(threads)
    if isinstance(target, ObjectStore):
        return merge_into(target, method, shard, made_from, budget)
    return merge_shards(method, [shard], target, made_from, budget, lambda elements, name: None)


def _result(task: Any) -> Any:
    """A task's result; what its worker raised is raised here as it was."""
    first_ready([task])
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, FileNotFoundError):
            where = "are models (and --output, without resources.storage) on storage that every node sees?"
            raise StageError(f"a worker found no {error.cause.filename}: {where}") from error
        raise error.cause if isinstance(error.cause, (CpiftError, ValueError, OSError)) else error from None
    except ray.exceptions.RayError as error:
        raise StageError(f"a worker was lost {_RETRIES + 1} times: {first_line(error)}") from error
