"""Regions and fusion in GPU memory: slices are copied there, the kernels run there, masks and results come back.

Core regions and merged models have the CPU's bits, and so its fingerprints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cpift_kernels import SLOT, SLOTS, Placement, Ready, placement_of, stream_cores

from cpift.checkpoints.slices import Piece
from cpift.checkpoints.writing import Shard, ShardRecord
from cpift.config.run import ResourcesConfig, RunConfig
from cpift.devices import assigned_gpus, current_gpu, visible_gpus
from cpift.errors import CpiftError, Problem, entry
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import Destination, Fill, Merged, MergeMethod
from cpift.merging.checks import OnElements
from cpift.merging.conflicts import CONFLICTS
from cpift.merging.engine import Merging, Pinned, Place, Tell, merge_shards
from cpift.merging.gpu.lanes import Lanes, Placed, within_memory
from cpift.merging.registry import METHODS

if TYPE_CHECKING:
    import numpy as np
    import torch
    from cpift_kernels import Mark, Marked, Masks, Range, Selection


def check_device(config: RunConfig) -> list[Problem]:
    """Why regions and fusion cannot run where `resources.device` says; empty where it leaves a choice."""
    resources, where = config.resources, "resources.device"
    if resources.device != "cuda":
        return []
    problems = []
    if resources.cluster is None and (lacking := _lacking()):  # what a cluster has is seen when it is connected to
        problems.append(Problem(where, f"is `cuda`, and {lacking[0]}", f"use `cpu`, or {lacking[1]}"))
    problems += [
        Problem(where, f"is `cuda`, and {what}", f"use `cpu`, or {remedy}") for what, remedy in on_cpus(config)
    ]
    return problems


def _lacking() -> tuple[str, str] | None:
    """What a GPU's work needs and this machine has not; and what would help."""
    if not visible_gpus():
        return "torch sees no GPU here", "a torch for this GPU"
    if find_spec("triton") is None:
        return "its kernels need the package triton", "install it: pip install triton"
    return None


def on_cpus(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What of a fusion is computed on CPUs alone; and what would help."""
    if config.fusion.slices:
        yield "slices of layers are merged on CPUs alone", "leave fusion.slices out"
    if config.fusion.into:
        yield "text models of a part of θ0 are merged on CPUs alone", "leave fusion.into out"
    able = {"method": [name for name, method in METHODS.items() if method.on_gpu], "conflict": list(CONFLICTS)}
    for field, words in able.items():  # without what users bring, which was written for the CPU
        if (word := getattr(config.fusion, field)) not in words:
            yield f"fusion.{field} {word} is computed on CPUs alone", f"one of {', '.join(words)}"


def foretold(config: RunConfig) -> str | None:
    """What `resources.device` will come to, as far as that is known before anything is timed, and not plain from it."""
    resources = config.resources
    if resources.device == "cpu":
        return None
    if resources.device == "cuda":
        if resources.cluster is not None:
            return "resources.device cuda: regions and fusion on all GPUs of the cluster, a process of Ray for each"
        several = f"all {visible_gpus()} GPUs, a process of Ray for each" if shared_out(resources) else None
        return several and f"resources.device cuda: regions and fusion on {several}"
    lacking = _lacking()
    if resources.on_cluster or lacking:
        why = "a cluster's CPUs compute them (`cuda` takes its GPUs)"
        if lacking and not resources.on_cluster:
            why = lacking[0]
        return f"resources.device auto: regions and fusion on the CPU: {why}"
    gpu = one_of_several() or "on the GPU"
    timed = f"{gpu} or the CPU, whichever is faster on their first elements"
    if said := [what for what, _ in on_cpus(config)]:
        return f"resources.device auto: regions {timed}; fusion on the CPU: {', '.join(said)}"
    return f"resources.device auto: regions and fusion {timed}"


def shared_out(resources: ResourcesConfig) -> bool:
    """Whether this machine has several GPUs for regions and fusion: a process of Ray takes each."""
    return resources.device == "cuda" and visible_gpus() > 1


def one_of_several() -> str | None:
    """Where a process computes that is to take no more than one of several GPUs; None where there are no others."""
    gpus = visible_gpus()
    return f"on one of {gpus} GPUs (`cuda` takes all of them)" if gpus > 1 else None


def own_gpu() -> DeviceMerging:
    """On the GPU of this process. Raises CpiftError for what its work needs and is not there."""
    if lacking := _lacking():
        raise CpiftError(f"resources.device: is `cuda`, and {lacking[0]} → use `cpu`, or {lacking[1]}")
    return DeviceMerging(current_gpu())


def device_merging(resources: ResourcesConfig) -> Merging | None:
    """What `resources.device` asks for; None for the CPU. Loads torch where there may be a GPU alone."""
    return entry(DEVICES, resources.device, "resources.device")()


def _faster() -> Merging | None:
    if _lacking():
        return None
    from cpift.merging.gpu.choice import AutoMerging

    return AutoMerging(DeviceMerging(current_gpu()), where=one_of_several() or "on the GPU")


_SAID: set[int] = set()  # by this process: of so many GPUs that one of them is used


def on_own_gpu(here: DeviceMerging | None, method: MergeMethod) -> MergeMethod:
    """A method as the process computes it that this is called in: of a worker of Ray's on its GPU, and without one on
    its processors, for the bits are the same. here: of a process that is none."""
    assigned = assigned_gpus()
    if assigned:
        return own_gpu()._placed(method)
    return here._placed(method) if here is not None and assigned is None else method


class DeviceMerging:
    """How a pipeline selects and merges on one GPU of this process (`merging.engine.Merging`)."""

    in_passing = False

    def __init__(
        self,
        device: torch.device,
        place: Callable[[torch.device], Placement] = placement_of,
        tell: Tell | None = None,
    ):
        """place: makes queues of the device's own for whoever uses it, see `cpift_kernels.Placement`."""
        self._device, self._queues, self._tell = device, place, tell

    def telling(self, tell: Tell) -> DeviceMerging:
        """The same; once a process it tells where it is one of several GPUs that is used."""
        return DeviceMerging(self._device, self._queues, tell)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, in which nobody is told."""
        return self.__dict__ | {"_tell": None}

    def _place(self) -> Placement:
        return self._queues(self._device)

    def _say(self) -> None:
        gpus = visible_gpus() if self._tell is not None and not _SAID else 0
        if self._tell is not None and gpus > 1:
            _SAID.add(gpus)
            self._tell(f"resources.device cuda: on one of {gpus} GPUs, for it is all this process that computes")

    def session(self) -> AbstractContextManager[None]:
        """Nothing is kept open."""
        return nullcontext()

    def mark(self, selection: Selection, masks: Masks) -> Mark:
        """Marks ranges on the device. Raises GpuMemoryError where it has too little memory."""

        def mark(ranges: Sequence[Range], brackets: np.ndarray) -> Iterator[Marked]:
            self._say()
            there = stream_cores(selection.models, selection.counts, place=self._place())
            with within_memory():
                yield from there.marking(masks)(ranges, brackets)

        return mark

    def merge_shards(
        self, method: MergeMethod, shards: Sequence[Shard], out: Path, made_from: str, budget: int, progress: OnElements
    ) -> dict[str, ShardRecord]:
        """`merging.engine.merge_shards`; of a baseline that has no form for GPUs on the host."""
        self._say()
        placed, pinned = self._placed(method), Pinned(self._place().pinned, 2 * SLOTS * SLOT)
        on_gpu = pinned if placed is not method else None
        return merge_shards(placed, shards, out, made_from, budget, progress, pinned=on_gpu)

    def placing(self, method: MergeMethod) -> Place:
        """It computes on the device, where it has such a form."""
        return partial(on_own_gpu, self)

    def _placed(self, method: MergeMethod) -> MergeMethod:
        on_device: Any = OnDevice(method, self._place) if method.leaves_host else method
        return cast("MergeMethod", on_device)

    def publish(self, folder: Path, fingerprint: str) -> None:
        """It lies where it was written."""


DEVICES: dict[str, Callable[[], Merging | None]] = {
    "auto": _faster,
    "cpu": lambda: None,
    "cuda": own_gpu,
}


class OnDevice:
    """A method as `merge_shards` asks for it: computed on a device, written from the host.

    What writes a piece returns before it is on the host."""

    def __init__(self, method: MergeMethod, place: Callable[[], Placement], at: Destination | None = None):
        """at: where models and masks are read to; their slices are copied there as they are asked for if not given."""
        self._lanes = Lanes(place(), place())
        self._host, self._placed = method, method.placed(at or Placed(self._lanes))
        self.models = self._placed.models

    def at(self, name: str) -> Any:
        info = self._host.rest[1].tensors[name]
        return self if self._host.merges(info) else self._host.at(name)

    def pieces(self, info: TensorInfo) -> list[Piece]:
        return self._host.pieces(info)

    def beside(self, info: TensorInfo) -> int:
        return self._host.beside(info)

    def tensor(self, info: TensorInfo) -> Merged:
        if not self._host.merges(info):
            return self._host.tensor(info)
        with within_memory(), self._lanes.looking_ahead() as lane, lane.place.computing():
            record, fill = self._placed.tensor(info)
        return record, self._to_host(fill)

    def _to_host(self, fill: Fill) -> Fill:
        def filled(start: int, stop: int, out: torch.Tensor) -> Ready:
            lane = self._lanes.current.lane
            with within_memory(), lane.place.computing():
                room = lane.place.room(out.nbytes, "compute").view(out.dtype)
                fill(start, stop, room)
            return lane.fetch(room, out)

        return filled
