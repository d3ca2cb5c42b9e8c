"""Regions and fusion as Ray tasks: ranges of segments are marked, and output files written, by any worker.

Models and masks lie on storage that every node sees; only brackets, candidates and records pass through Ray. Work is
cut by size and put together in order, so the bytes do not depend on how many workers there are. A task whose worker or
node is lost is run again, and costs what it had done.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.exceptions
from cpift_kernels.cpu.phases import Mark, Marked, Masks, Range, Selection

from cpift.checkpoint_writing import Shard
from cpift.config import ResourcesConfig
from cpift.distributed_session import ray_session
from cpift.errors import CpiftError, StageError
from cpift.merging import Method, Progress, merge_shards

_RETRIES = 3
_TASKS_A_CPU = 4  # so many tasks are cut for every processor, to even out their times


class RayMerging:
    """How a pipeline on a cluster selects and merges (`merging.Merging`)."""

    def __init__(self, resources: ResourcesConfig):
        self._resources = resources
        self._cpus = max(1, math.ceil(resources.cpus_per_worker))

    def session(self) -> AbstractContextManager[None]:
        """Keep one connection over several stages."""
        return ray_session(self._resources)

    def mark(self, selection: Selection, masks: Masks) -> Mark:
        """Marks ranges in tasks, as many as the cluster has room for."""

        def mark(ranges: Sequence[Range], brackets: np.ndarray) -> Iterator[Marked]:
            with ray_session(self._resources):
                held = ray.put((selection, masks, brackets))
                step = max(1, len(ranges) // (_TASKS_A_CPU * self._slots()))
                remote = _mark.options(num_cpus=self._cpus, max_retries=_RETRIES, scheduling_strategy="SPREAD")
                tasks = [remote.remote(held, ranges[at : at + step], self._cpus) for at in range(0, len(ranges), step)]
                for task in tasks:
                    yield from _result(task)

        return mark

    def merge_shards(
        self, method: Method, shards: Sequence[Shard], out: Path, made_from: str, budget: int, progress: Progress
    ) -> dict[str, dict[str, Any]]:
        """`merging.merge_shards` with one task a file."""
        with ray_session(self._resources):
            self._slots()
            return self._merge_all(method, shards, out, made_from, budget, progress)

    def _merge_all(
        self, method: Method, shards: Sequence[Shard], out: Path, made_from: str, budget: int, progress: Progress
    ) -> dict[str, dict[str, Any]]:
        held = ray.put(method)
        remote = _merge.options(num_cpus=self._cpus, max_retries=_RETRIES, scheduling_strategy="SPREAD")
        pending = {remote.remote(held, shard, out, made_from, budget, self._cpus): shard for shard in shards}
        records: dict[str, dict[str, Any]] = {}
        failed: CpiftError | None = None
        while pending:
            (ready,), _ = ray.wait(list(pending), num_returns=1)
            shard = pending.pop(ready)
            try:
                records |= _result(ready)
                progress(sum(info.numel for info in shard.tensors), shard.name)
            except CpiftError as error:  # the others are finished and kept
                failed = failed or error
        if failed is not None:
            raise failed
        return records

    def _slots(self) -> int:
        """Tasks that the cluster runs at once. Raises CpiftError if it cannot run one."""
        have = ray.cluster_resources().get("CPU", 0)
        if have < self._cpus:
            raise CpiftError(
                f"a task of regions and fusion takes {self._cpus} CPUs (resources.cpus_per_worker), the cluster has "
                f"{have:g}: lower it, or add nodes"
            )
        return int(have // self._cpus)


@ray.remote
def _mark(held: tuple[Selection, Masks, np.ndarray], ranges: Sequence[Range], threads: int) -> list[Marked]:
    import torch

    torch.set_num_threads(threads)
    selection, masks, brackets = held
    return [selection.mark(part, brackets, masks) for part in ranges]


@ray.remote
def _merge(
    method: Method, shard: Shard, out: Path, made_from: str, budget: int, threads: int
) -> dict[str, dict[str, Any]]:
    import torch

    torch.set_num_threads(threads)
    return merge_shards(method, [shard], out, made_from, budget, lambda elements, name: None)


def _result(task: Any) -> Any:
    """A task's result; what its worker raised is raised here as it was."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, FileNotFoundError):
            where = "are models and --output on storage that every node sees?"
            raise StageError(f"a worker found no {error.cause.filename}: {where}") from error
        raise error.cause if isinstance(error.cause, (CpiftError, ValueError, OSError)) else error from None
    except ray.exceptions.RayError as error:
        raise StageError(f"a worker was lost {_RETRIES + 1} times: {str(error).strip().splitlines()[0]}") from error
