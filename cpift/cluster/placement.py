"""Which fine-tunes fit a cluster at once: whole worker groups, packed onto nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cpift.config.run import ResourcesConfig

Placement = list[tuple[int, dict[str, float]]]  # a worker each: its node, and what it takes there
_SLACK = 1e-6  # fractions of a CPU are added and taken away in floating point


class Nodes:
    """What each node of the cluster has free: CPUs and GPUs. A worker lies on one node, a group's workers anywhere."""

    def __init__(self, nodes: Sequence[Mapping[str, float]]):
        self._free = [{kind: node.get(kind, 0.0) for kind in ("CPU", "GPU")} for node in nodes]

    def place(self, need: ResourcesConfig) -> Placement | None:
        """A node for each worker, the fullest that has room first; None if they don't all fit now.

        Of an elastic fine-tune as many as fit, if that is enough.
        """
        worker = {"CPU": need.cpus_per_worker, "GPU": need.gpus_per_worker}
        free = [dict(node) for node in self._free]
        placement: Placement = []
        for _ in range(need.workers):
            fitting = [at for at, node in enumerate(free) if _fits(worker, node)]
            if not fitting:
                return placement if len(placement) >= (need.min_workers or need.workers) else None
            best = min(fitting, key=lambda at: (free[at]["GPU"], free[at]["CPU"]))
            free[best] = {kind: free[best][kind] - worker[kind] for kind in worker}
            placement.append((best, worker))
        return placement

    def has_room(self, cpus: float, gpus: float) -> bool:
        """Whether some node has room for a worker."""
        return any(_fits({"CPU": cpus, "GPU": gpus}, node) for node in self._free)

    def take(self, placement: Placement) -> None:
        self._add(placement, -1)

    def give_back(self, placement: Placement) -> None:
        self._add(placement, 1)

    def _add(self, placement: Placement, sign: int) -> None:
        for node, worker in placement:
            for kind, amount in worker.items():
                self._free[node][kind] += sign * amount

    def __str__(self) -> str:
        return ", ".join(f"a node of {node['CPU']:g} CPUs and {node['GPU']:g} GPUs" for node in self._free)


def _fits(worker: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(node[kind] + _SLACK >= worker[kind] for kind in worker)
