"""Regions and fusion in GPU memory: slices are copied there, the kernels run there, masks and results come back.

Core regions and merged models have the CPU's bits, and so its fingerprints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cpift_kernels import stream_cores

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.slices import Piece
from cpift.checkpoints.writing import Shard, ShardRecord
from cpift.config.run import ResourcesConfig, RunConfig
from cpift.devices import current_gpu, visible_gpus
from cpift.errors import Problem, entry
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import Fill, Merged, MergeMethod
from cpift.merging.checks import OnElements
from cpift.merging.conflicts import CONFLICTS
from cpift.merging.engine import Merging, Place, Tell, merge_shards
from cpift.merging.registry import METHODS
from cpift.method.masks import RegionMasks

if TYPE_CHECKING:
    import numpy as np
    import torch
    from cpift_kernels import Mark, Masks, Selection


def check_device(config: RunConfig) -> list[Problem]:
    """Why regions and fusion cannot run where `resources.device` says; empty where it leaves a choice."""
    resources, where = config.resources, "resources.device"
    if resources.device != "cuda":
        return []
    problems = []
    if resources.on_cluster:
        remedy = "leave it out, or run without resources.distributed, resources.address and RAY_ADDRESS"
        problems.append(Problem(where, "is `cuda`, and on a cluster regions and fusion are computed on CPUs", remedy))
    elif lacking := _lacking():
        problems.append(Problem(where, f"is `cuda`, and {lacking[0]}", f"use `cpu`, or {lacking[1]}"))
    problems += [
        Problem(where, f"is `cuda`, and {what}", f"use `cpu`, or {remedy}") for what, remedy in _on_cpus(config)
    ]
    return problems


def _lacking() -> tuple[str, str] | None:
    """What a GPU's work needs and this machine has not; and what would help."""
    if not visible_gpus():
        return "torch sees no GPU here", "a torch for this GPU"
    if find_spec("triton") is None:
        return "its kernels need the package triton", "install it: pip install triton"
    return None


def _on_cpus(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What of a fusion is computed on CPUs alone; and what would help."""
    if config.fusion.slices:
        yield "slices of layers are merged on CPUs alone", "leave fusion.slices out"
    able = {"method": [name for name, method in METHODS.items() if method.on_gpu], "conflict": list(CONFLICTS)}
    for field, words in able.items():  # without what users bring, which was written for the CPU
        if (word := getattr(config.fusion, field)) not in words:
            yield f"fusion.{field} {word} is computed on CPUs alone", f"one of {', '.join(words)}"


def foretold(config: RunConfig) -> str | None:
    """What `resources.device: auto` will come to, as far as that is known before anything is timed."""
    if config.resources.device != "auto":
        return None
    lacking = _lacking()
    if config.resources.on_cluster or lacking:
        why = lacking[0] if lacking and not config.resources.on_cluster else "a cluster's CPUs compute them"
        return f"resources.device auto: regions and fusion on the CPU: {why}"
    timed = "on the GPU or the CPU, whichever is faster on their first elements"
    if said := [what for what, _ in _on_cpus(config)]:
        return f"resources.device auto: regions {timed}; fusion on the CPU: {', '.join(said)}"
    return f"resources.device auto: regions and fusion {timed}"


def device_merging(resources: ResourcesConfig) -> Merging | None:
    """What `resources.device` asks for; None for the CPU. Loads torch where there may be a GPU alone."""
    return entry(DEVICES, resources.device, "resources.device")()


def _faster() -> Merging | None:
    if _lacking():
        return None
    from cpift.merging.gpu.choice import AutoMerging

    return AutoMerging(DeviceMerging(current_gpu()))


class DeviceMerging:
    """How a pipeline selects and merges on one GPU of this process (`merging.engine.Merging`)."""

    in_passing = False

    def __init__(self, device: torch.device):
        self._device = device

    def telling(self, tell: Tell) -> DeviceMerging:
        """It has nothing to tell."""
        return self

    def session(self) -> AbstractContextManager[None]:
        """Nothing is kept open."""
        return nullcontext()

    def mark(self, selection: Selection, masks: Masks) -> Mark:
        """Marks ranges on the device."""
        return stream_cores(selection.models, selection.counts, device=self._device).marking(masks)

    def merge_shards(
        self, method: MergeMethod, shards: Sequence[Shard], out: Path, made_from: str, budget: int, progress: OnElements
    ) -> dict[str, ShardRecord]:
        """`merging.engine.merge_shards`; of a baseline that has no form for GPUs on the host."""
        return merge_shards(self._placed(method), shards, out, made_from, budget, progress)

    def placing(self, method: MergeMethod) -> Place:
        """It computes on the device, where it has such a form."""
        return self._placed

    def _placed(self, method: MergeMethod) -> MergeMethod:
        on_device: Any = _OnDevice(method, self._device) if method.leaves_host else method
        return cast("MergeMethod", on_device)

    def publish(self, folder: Path, fingerprint: str) -> None:
        """It lies where it was written."""


DEVICES: dict[str, Callable[[], Merging | None]] = {
    "auto": _faster,
    "cpu": lambda: None,
    "cuda": lambda: DeviceMerging(current_gpu()),
}


class _OnDevice:
    """A method as `merge_shards` asks for it: computed on a device, written from the host."""

    def __init__(self, method: MergeMethod, device: torch.device):
        self._host, self._placed, self._device = method, method.placed(_Placed(device)), device
        self.models = method.models

    def at(self, name: str) -> MergeMethod:
        return self._host.at(name)

    def pieces(self, info: TensorInfo) -> list[Piece]:
        return self._host.pieces(info)

    def beside(self, info: TensorInfo) -> int:
        return self._host.beside(info)

    def tensor(self, info: TensorInfo) -> Merged:
        if not self._host.merges(info):
            return self._host.tensor(info)
        record, fill = self._placed.tensor(info)
        return record, self._to_host(fill)

    def _to_host(self, fill: Fill) -> Fill:
        def filled(start: int, stop: int, out: torch.Tensor) -> None:
            room = out.new_empty(out.shape, device=self._device)
            fill(start, stop, room)
            out.copy_(room)

        return filled


class _Placed:
    """Models and masks as their slices on a device; the same object again for the same one."""

    def __init__(self, device: torch.device):
        self._device = device
        self._known: dict[int, Checkpoint] = {}

    def model(self, model: Checkpoint) -> Checkpoint:
        return self._known.setdefault(id(model), DeviceCheckpoint(model, self._device))

    def masks(self, masks: RegionMasks) -> RegionMasks:
        return DeviceMasks(masks, self._device)


class DeviceCheckpoint(Checkpoint):
    """A model whose slices are copied to a device as they are asked for."""

    def __init__(self, inner: Checkpoint, device: torch.device):
        self.folder, self.config, self.tensors = inner.folder, inner.config, inner.tensors
        self.ties, self.is_apart, self._maps = inner.ties, inner.is_apart, {}
        self._inner, self._device = inner, device

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._inner, self._device)

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """A copy on the device."""
        return self._inner.slice(name, start, stop).to(self._device)

    def gather(self, name: str, starts: np.ndarray[Any, Any], length: int) -> torch.Tensor:
        return self._inner.gather(name, starts, length)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        self._inner.prefetch(name, start, stop)

    def release(self, name: str, start: int, stop: int) -> None:
        self._inner.release(name, start, stop)

    def require_unchanged(self) -> None:
        self._inner.require_unchanged()

    def unequal_copies(self) -> Iterator[Problem]:
        return self._inner.unequal_copies()


class DeviceMasks(RegionMasks):
    """Masks whose words are copied to a device as they are asked for."""

    def __init__(self, inner: RegionMasks, device: torch.device):
        self._inner, self._device = inner, device

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._inner, self._device)

    def has(self, name: str) -> bool:
        return self._inner.has(name)

    def words(self, task: str, name: str, start: int, stop: int) -> torch.Tensor:
        return self._inner.words(task, name, start, stop).to(self._device)
