"""What a worker asks Ray for, and which fine-tunes fit a cluster at once: whole worker groups, packed onto nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cpift.config.run import ResourcesConfig

# What a worker may take: Ray's name of it, and the field of `resources` that says how much. What is scarce comes last.
KINDS: Mapping[str, str] = {"CPU": "cpus_per_worker", "GPU": "gpus_per_worker"}
Demand = dict[str, float]  # by Ray's name of a resource
Placement = list[tuple[int, Demand]]  # a worker each: its node, and what it takes there
_SLACK = 1e-6  # fractions of a CPU are added and taken away in floating point


def demand(resources: ResourcesConfig, cpus: float | None = None) -> Demand:
    """What one worker takes. cpus: in place of `cpus_per_worker`. What it takes none of is left out."""
    demanded = {kind: float(getattr(resources, field)) for kind, field in KINDS.items()}
    demanded |= {} if cpus is None else {"CPU": cpus}
    return {kind: amount for kind, amount in demanded.items() if amount}


def task_options(worker: Demand) -> dict[str, Any]:
    """A demand as Ray's tasks and actors take it."""
    others = {kind: amount for kind, amount in worker.items() if kind not in ("CPU", "GPU")}
    named = {"num_cpus": worker.get("CPU", 0), "num_gpus": worker.get("GPU")}
    return named | ({"resources": others} if others else {})


def train_options(worker: Demand) -> dict[str, Any]:
    """A demand as Ray Train's ScalingConfig takes it."""
    return {"use_gpu": "GPU" in worker, "resources_per_worker": worker}


def tune_options(worker: Demand) -> Demand:
    """A demand as Ray Tune takes it for a trial."""
    return {kind.lower() if kind in ("CPU", "GPU") else kind: amount for kind, amount in worker.items()}


def in_words(worker: Demand) -> str:
    """A demand in words."""
    return ", ".join(f"{worker.get(kind, 0):g} {kind}s" for kind in KINDS)


class Nodes:
    """What each node of the cluster has free. A worker lies on one node, a group's workers anywhere."""

    def __init__(self, nodes: Sequence[Mapping[str, float]]):
        self._free = [{kind: node.get(kind, 0.0) for kind in KINDS} for node in nodes]

    def place(self, need: ResourcesConfig) -> Placement | None:
        """A node for each worker, the fullest that has room first; None if they don't all fit now.

        Of an elastic fine-tune as many as fit, if that is enough.
        """
        worker = demand(need)
        free = [dict(node) for node in self._free]
        placement: Placement = []
        for _ in range(need.workers):
            fitting = [at for at, node in enumerate(free) if _fits(worker, node)]
            if not fitting:
                return placement if len(placement) >= (need.min_workers or need.workers) else None
            best = min(fitting, key=lambda at: [free[at][kind] for kind in reversed(list(KINDS))])
            free[best] |= {kind: free[best][kind] - amount for kind, amount in worker.items()}
            placement.append((best, worker))
        return placement

    def has_room(self, worker: Demand) -> bool:
        """Whether some node has room for a worker."""
        return any(_fits(worker, node) for node in self._free)

    def take(self, placement: Placement) -> None:
        self._add(placement, -1)

    def give_back(self, placement: Placement) -> None:
        self._add(placement, 1)

    def _add(self, placement: Placement, sign: int) -> None:
        for node, worker in placement:
            for kind, amount in worker.items():
                self._free[node][kind] += sign * amount

    def __str__(self) -> str:
        each = (" and ".join(f"{node[kind]:g} {kind}s" for kind in KINDS) for node in self._free)
        return ", ".join(f"a node of {resources}" for resources in each)


def _fits(worker: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(node[kind] + _SLACK >= worker[kind] for kind in worker)
