"""Regions and fusion in processes of Ray: ranges of segments are marked, and output files written, by any of them.

They are tasks that take processors, or with `resources.device: cuda` one process for each GPU (`cards.py`).
Models lie where every node finds them under the same path, masks and output on storage that all nodes see: a folder,
or an object store (`resources.storage`, see `stored_merge.py`), and then masks come back through Ray, as brackets,
candidates and records always do. Work is cut by size and put together in order, so the bytes do not depend on how many
workers there are. A task whose worker or node is lost is run again, and costs what it had done.

Both passes give the same part of the parameters to the same node as long as it has room, so the second one may find in
its page cache what the first has read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import ray
import ray.exceptions
from cpift_kernels import Mark, Marked, Masks, Range, Selection
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cpift.checkpoints.writing import Shard, ShardNote, ShardRecord
from cpift.cluster.cards import RETRIES, Card, Make, Work, cards, on_cards
from cpift.cluster.session import alive_nodes, first_ready, ray_session
from cpift.cluster.stored_merge import fetch, merge_into, publish, with_stored_masks
from cpift.config.run import ResourcesConfig
from cpift.disk.guarded import guarded_reads
from cpift.disk.object_store import ObjectStore
from cpift.errors import CpiftError, StageError, first_line
from cpift.extensions import modules_beside
from cpift.merging.base import MergeMethod
from cpift.merging.checks import OnElements
from cpift.merging.engine import Merging, Place, Tell, merge_shards
from cpift.merging.on_device import on_own_gpu, own_gpu

Ended: TypeAlias = Generator[tuple[int, Any], None, None]
_PIECES_EACH = 4  # so many pieces are cut for every processor or GPU, to even out their times


def merging_of(resources: ResourcesConfig, stored: bool = True) -> RayMerging:
    """Where a run selects and merges in processes of Ray.

    stored: whether masks and fused shards go to `resources.storage`, where that is an object store. A sweep's or a
    comparison's lie in its folder alone, for there it is decided which of them are kept.
    """
    placed = resources if stored else resources.model_copy(update={"storage": None})
    return RayMerging(placed, own_gpu if resources.device == "cuda" else None)


class RayMerging:
    """How a pipeline selects and merges in processes of Ray (`merging.engine.Merging`): on a cluster, or on all GPUs of
    this machine."""

    in_passing = False

    def __init__(self, resources: ResourcesConfig, make: Make | None = None, tell: Tell = lambda text: None):
        """make: what a process that has a GPU computes with; None: tasks that have processors."""
        self._resources, self._make, self._tell = resources, make, tell
        self._cpus = max(1, math.ceil(resources.cpus_per_worker))
        self._store = ObjectStore(str(resources.storage)) if resources.remote_storage else None
        self._session: ExitStack | None = None  # of a Ray that starts here when it is needed

    def telling(self, tell: Tell) -> RayMerging:
        """The same; it tells where it waits for a GPU."""
        return RayMerging(self._resources, self._make, tell)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Keep one connection over several stages. Raises CpiftError for a cluster without what is asked of it."""
        if not self._resources.on_cluster:
            with ExitStack() as self._session:
                try:
                    yield
                finally:
                    self._session = None  # what comes later connects anew
            return
        with ray_session(self._resources):
            if self._make is not None:
                self._cards()
            yield

    def mark(self, selection: Selection, masks: Masks) -> Mark:
        """Marks ranges in as many processes as the cluster has room for, or GPUs."""

        def mark(ranges: Sequence[Range], brackets: np.ndarray) -> Iterator[Marked]:
            with self._connected():
                if (here := self._alone()) is not None:
                    yield from here.mark(selection, masks)(ranges, brackets)
                    return
                held = ray.put((selection, brackets, None if self._store else masks))
                step = max(1, len(ranges) // (_PIECES_EACH * len(self._slots(self._make))))
                starts = range(0, len(ranges), step)
                works = [Work(at / len(ranges), _marked, (held, ranges[at : at + step])) for at in starts]
                with closing(self._ended(works, self._make)) as ended:
                    for call in _in_order(ended):
                        marked, words = _result(call)
                        for number, k, tensor, first, part in words:
                            masks.store(number, k, tensor, first, part.copy())  # what Ray hands out is read-only
                        yield from marked

        return mark

    def merge_shards(
        self, method: MergeMethod, shards: Sequence[Shard], out: Path, made_from: str, budget: int, progress: OnElements
    ) -> dict[str, ShardRecord]:
        """`merging.engine.merge_shards`, a file at a time each."""
        with self._connected():
            merge = self._merge_all if (here := self._alone()) is None else here.merge_shards
            return merge(method, shards, out, made_from, budget, progress)

    def placing(self, method: MergeMethod) -> Place:
        """On the GPU of whoever computes it, if that is asked for. A user's method or conflict rule goes to workers as
        it was loaded here."""
        for module in modules_beside():
            ray.cloudpickle.register_pickle_by_value(module)
        return _itself if self._make is None else partial(on_own_gpu, None)

    def publish(self, folder: Path, fingerprint: str) -> None:
        """Add what a finished model has beside its shards to those in the object store, if there is one."""
        if self._store is not None:
            publish(self._place(self._store, fingerprint), folder)

    def _merge_all(
        self, method: MergeMethod, shards: Sequence[Shard], out: Path, made_from: str, budget: int, progress: OnElements
    ) -> dict[str, ShardRecord]:
        position = _positions(method)
        store = self._place(self._store, made_from) if self._store is not None else None
        self.placing(method)
        held = ray.put(method if store is None else with_stored_masks(method, store))
        target = out if store is None else store
        works = [
            Work(position[shard.tensors[0].name], _merged, (held, shard, target, made_from, budget)) for shard in shards
        ]
        records: dict[str, ShardRecord] = {}
        failed: CpiftError | None = None
        with closing(self._ended(works, self._make if method.leaves_host else None)) as ended:
            for number, call in ended:
                shard = shards[number]
                try:
                    record = _result(call)[shard.name]
                    records[shard.name] = record if store is None else fetch(store, shard, out, made_from, record)
                    progress(sum(info.numel for info in shard.tensors), shard.name)
                except CpiftError as error:  # the others are finished and kept
                    failed = failed or error
        if failed is not None:
            raise failed
        return records

    def _place(self, store: ObjectStore, fingerprint: str) -> ObjectStore:
        return store.folder(f"fuse-{fingerprint[:12]}")

    # ---- who does it -----------------------------------------------------------------------------------------------

    @contextmanager
    def _connected(self) -> Iterator[None]:
        if self._session is not None:
            self._session.enter_context(ray_session(self._resources))
            yield
            return
        with ray_session(self._resources):
            yield

    def _alone(self) -> Merging | None:
        """What computes on one GPU of this process, where torch sees several and Ray none of them."""
        if self._make is None or self._resources.on_cluster or cards(1):
            return None
        self._tell("resources.device cuda: on one GPU, for Ray sees none of this machine's")
        return self._make()

    def _ended(self, works: Sequence[Work], make: Make | None) -> Ended:
        """Do all of it: the number of each piece, and a reference to what became of it, as soon as it has ended."""
        if make is not None:
            yield from on_cards(works, self._cards(), make, self._tell)
            return
        places = self._places()
        running = {
            self._options(places, work.position).remote(work.function, self._cpus, *work.arguments): number
            for number, work in enumerate(works)
        }
        while running:
            ready = first_ready(list(running))
            yield running.pop(ready), ready

    def _slots(self, make: Make | None) -> Sequence[Any]:
        """What works at once."""
        return self._places() if make is None else self._cards()

    def _cards(self) -> list[Card]:
        """All GPUs. Raises CpiftError if there is none."""
        found = cards(self._cpus)
        if not found:
            named = self._resources.cluster
            where = "of this machine" if named is None else f"at {named}"
            raise CpiftError(
                f"resources.device: is `cuda`, and Ray {where} has no GPU → start its nodes where Ray sees their GPUs "
                "(ray start --num-gpus says so), or use `cpu`"
            )
        return found

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

    def _options(self, places: Sequence[str], position: float) -> Any:
        """A task about what begins at a share `position` of the parameters: on the node of that part if it has room."""
        node = places[int(position * len(places))]
        near = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)
        return _task.options(num_cpus=self._cpus, max_retries=RETRIES, scheduling_strategy=near)


def _itself(method: MergeMethod) -> MergeMethod:
    return method


def _positions(method: MergeMethod) -> dict[str, float]:
    """Share of all elements that come before each tensor, in name order; less than 1, before an empty one too."""
    infos = method.models[0].tensors.values()
    ends = list(accumulate(info.numel for info in infos))
    return {info.name: (end - info.numel) / (ends[-1] + 1) for info, end in zip(infos, ends, strict=True)}


class _Words:
    """Collects the mask words of ranges, for a worker that cannot reach the files."""

    def __init__(self) -> None:
        self.stored: list[tuple[int, int, int, int, np.ndarray]] = []

    def store(self, task: int, k: int, tensor: int, first: int, words: np.ndarray) -> None:
        self.stored.append((task, k, tensor, first, words.copy()))  # a GPU's come in pinned memory, which others want

    def words(self, task: int, k: int, tensor: int) -> np.ndarray:
        raise NotImplementedError("marking writes masks and reads none")


def _marked(
    merging: Merging | None, held: tuple[Selection, np.ndarray, Masks | None], ranges: Sequence[Range]
) -> tuple[list[Marked], list[tuple[int, int, int, int, np.ndarray]]]:
    """What was found in the ranges and, where no masks are given to write to, their words."""
    selection, brackets, masks = held
    words = _Words()
    target = words if masks is None else masks
    with guarded_reads("core regions"):
        if merging is None:
            marked = [selection.mark(part, brackets, target) for part in ranges]
        else:
            marked = list(merging.mark(selection, target)(ranges, brackets))
    return marked, words.stored


def _merged(
    merging: Merging | None, method: MergeMethod, shard: Shard, target: Path | ObjectStore, made_from: str, budget: int
) -> dict[str, ShardRecord] | dict[str, ShardNote]:
    """The shard's record, written into a folder; its note, uploaded to an object store."""
    merge = merge_shards if merging is None else merging.merge_shards
    if isinstance(target, ObjectStore):
        return merge_into(target, method, shard, made_from, budget, merge)
    return merge(method, [shard], target, made_from, budget, lambda elements, name: None)


@ray.remote
def _task(function: Callable[..., Any], threads: int, *arguments: Any) -> Any:
    """A piece of work on processors."""
    import torch

    torch.set_num_threads(threads)
    return function(None, *arguments)


def _in_order(ended: Ended) -> Iterator[Any]:
    """What became of pieces, by their numbers."""
    early: dict[int, Any] = {}
    following = 0
    for number, call in ended:
        early[number] = call
        while following in early:
            yield early.pop(following)
            following += 1


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
        raise StageError(f"a worker was lost {RETRIES + 1} times: {first_line(error)}") from error
