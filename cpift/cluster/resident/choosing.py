"""Where the models of a sweep's points stay: in each worker, in some processes that all workers ask, or nowhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from cpift.cluster.resident.actors import Actors, gpu_room
from cpift.cluster.session import alive_nodes, free_resources
from cpift.config.run import ResourcesConfig
from cpift.console.view import View
from cpift.merging.resident.holders import Holders
from cpift.merging.resident.residents import GPUS, MAPPED, OWN_COPIES, Room, copied
from cpift.pipeline.run import Run
from cpift.pipeline.stages.handover import Kept, kept_between_points, room_here
from cpift.text.units import show_size

_SECONDS = 60.0  # for a GPU to be free, or for all that hold models to be there
_STAY = "Models stay in memory from point to point"
_ANEW = "Models are read anew for every point"


@dataclass(frozen=True)
class _Choice:
    """So many processes that hold models, or none; said: what is taken, and why. limit: bytes of all of them."""

    said: str
    count: int = 0
    room: Room = MAPPED
    limit: int = 0
    gpus: bool = False
    memory: int = 0  # of its node, that each asks Ray for


@contextmanager
def staying_between(runs: Sequence[Run], workers: int, apart: bool, view: View) -> Iterator[int | Holders]:
    """What so many workers may keep of the models of all points, in bytes each, or what holds these for them; says
    which, and why. runs: of each seed. apart: points are merged in tasks of Ray's, which keep nothing."""
    kept, resources = kept_between_points(runs, workers), runs[0].config.resources
    choice = _choice(kept, resources, workers, apart) or _Choice("" if apart else kept.why)
    actors = _started(choice, resources) if choice.count else None
    if choice.count and actors is None:
        choice = _Choice(kept.why or f"{_ANEW}: {_processes(choice.count)} for them found no room in {_SECONDS:g} s")
    if choice.said:
        view.note(choice.said)
    if actors is None:
        yield 0 if apart else kept.held
        return
    try:
        yield actors.holders
    finally:
        if lost := actors.lost():
            view.warn(f"{_processes(lost)} that held models ended; what they had was read anew, and is the same")
        actors.close()


def _started(choice: _Choice, resources: ResourcesConfig) -> Actors | None:
    """None where they find no room within a while."""
    asks = {"num_gpus": 1} if choice.gpus else {"memory": choice.memory} if choice.memory else {}
    actors = Actors(choice.count, choice.room, choice.limit, asks, resources.most_threads)
    if actors.there(_SECONDS):
        return actors
    actors.close()
    return None


def _choice(kept: Kept, resources: ResourcesConfig, workers: int, apart: bool) -> _Choice | None:
    """None: what `kept` says."""
    if not kept.models:
        return None
    own = resources.gpus_per_worker > 0 and not resources.on_cluster
    if (resources.device == "cuda" or (resources.device == "auto" and own)) and _gpus():
        return _on_gpus(kept, resources, apart)
    if apart and len(nodes := free_resources()) > 1:
        return _on_nodes(kept, resources, workers, nodes)
    if not any(map(copied, kept.models)) if apart else kept.held:
        return None  # mapped files are all there is to hold, or each worker may hold what there is
    return _beside(kept, resources, workers, apart)


def _beside(kept: Kept, resources: ResourcesConfig, workers: int, apart: bool) -> _Choice | None:
    """In processes of this machine."""
    need, budget, free = MAPPED.needs(kept.models, kept.tasks), resources.memory_budget, room_here()
    count = math.ceil(need / budget)
    if count > workers or need > free:
        return None
    why = "" if apart else f"; {kept.short}"
    said = f"{_STAY}: {show_size(need)} in {_processes(count)} that all workers ask, beside mapped files{why}"
    return _Choice(said, count, MAPPED, count * budget)


def _on_nodes(kept: Kept, resources: ResourcesConfig, workers: int, nodes: Sequence[Mapping[str, float]]) -> _Choice:
    """In the memory of a cluster's nodes, which read files from storage that all see: one process on each at least."""
    need, budget = OWN_COPIES.needs(kept.models, kept.tasks), resources.memory_budget
    count = max(math.ceil(need / budget), min(len(nodes), workers))
    share = math.ceil(need / count)
    fit = sum(int(node.get("memory", 0) // share) for node in nodes)
    would = f"{_ANEW}: they would take {show_size(need)}"
    if count > workers:
        each = f"more than resources.memory_budget ({show_size(budget)}) in each of {workers} processes"
        return _Choice(f"{would}, {each}")
    if fit < count:
        return _Choice(f"{would} in {_processes(count)}, and the nodes have free memory for {fit}")
    said = f"{_STAY}: {show_size(need)} in {_processes(count)} of the cluster"
    return _Choice(said, count, OWN_COPIES, count * budget, memory=share)


def _on_gpus(kept: Kept, resources: ResourcesConfig, apart: bool) -> _Choice | None:
    """On GPUs that trials leave, where those of a trial alone have no room."""
    each, asked = gpu_room(_SECONDS), resources.gpus_per_worker
    if not each:
        return None
    alone = replace(GPUS, scored=True).needs(kept.models, kept.tasks)
    if not apart and asked and alone <= each * max(1, int(asked)):
        return None
    need = GPUS.needs(kept.models, kept.tasks)
    count, gpus, left = math.ceil(need / each), _gpus(), max(1, math.ceil(asked))
    if count > gpus - left:
        have = f"{gpus} GPUs, of which trials need {left}, have room for {show_size(each)} each"
        return _Choice(f"{_ANEW}: they would take {show_size(need)}, and {have}")
    said = f"Models stay on {count} of {gpus} GPUs from point to point, {show_size(need)}; trials have the others"
    return _Choice(said, count, GPUS, count * each, gpus=True)


def _gpus() -> int:
    return sum(int(node["Resources"].get("GPU", 0)) for node in alive_nodes())


def _processes(count: int) -> str:
    return "a process" if count == 1 else f"{count} processes"
