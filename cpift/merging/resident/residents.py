"""The shards of one process: which device has which tensors, and which models they hold.

Tensors are cut into as many runs of about equal size, in name order, as there are shards. A tensor is whole, so its
sums are made in one place in one order: neither masks nor merged bytes depend on the number of shards.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, cast

from cpift_kernels import Placement, SelectionShard, select_over, stream_cores

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.lora import LoraCheckpoint
from cpift.checkpoints.relaid import RelaidCheckpoint
from cpift.checkpoints.slices import Piece
from cpift.checkpoints.vocabulary import FittedCheckpoint
from cpift.disk.mapped import file_version
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import Merged, MergeMethod
from cpift.merging.gpu.whole import FusedWhole, groups_to_fuse
from cpift.merging.methods.cpift import Fusion
from cpift.merging.on_device import OnDevice
from cpift.merging.registry import METHODS
from cpift.merging.resident.flat import flats_of
from cpift.merging.resident.shard import ResidentShard, mask_key
from cpift.method.masks import MasksFrom
from cpift.method.measures import Update

if TYPE_CHECKING:
    from cpift_kernels import Core, Masks, Models

_SCORED_AS = 4  # bytes an element: float32
# Kinds of models that are what their folders' files make of them, and nothing else.
_KNOWN = (Checkpoint, LoraCheckpoint, FittedCheckpoint, RelaidCheckpoint)


def identity(model: Checkpoint) -> Hashable | None:
    """What names a model's values: its files, as they are now, and those of the models that it is opened with. None
    where more than files decide them."""
    if type(model) not in _KNOWN:
        return None
    parts = [part for part in model.__reduce__()[1] if isinstance(part, Checkpoint)]
    inner = tuple(identity(part) for part in parts)
    if any(part is None for part in inner):
        return None
    files = tuple((str(file), file_version(file)) for file in sorted(model.folder.glob("*.safetensors")))
    small = tuple((str(file), file_version(file)) for file in sorted(model.folder.glob("*config.json")))
    return type(model).__name__, files, small, model.is_apart, model.prefix, inner


def copied(model: Checkpoint) -> bool:
    """Whether a process that holds a model in its own memory needs room for it, besides the page cache."""
    return type(model) is not Checkpoint


class Residents:
    """Shards that hold models between the merges of one process.

    places: make queues of the device of each; None stands for this process's memory. limit: bytes that all of them may
    hold. A model that is needed no more makes room for others.
    """

    def __init__(self, places: Sequence[Callable[[], Placement] | None], limit: int):
        self.limit, self.on_device = limit, places[0] is not None
        self._shards = [ResidentShard(place, identity) for place in places]
        self._order: dict[Hashable, int] = {}  # bytes by model, the one that was used last at the end
        self._reused: tuple[Any, dict[Any, Any]] = None, {}

    def needs(self, models: Sequence[Checkpoint], tasks: int) -> int:
        """Bytes of these models and of what is kept of so many tasks' cores; on GPUs also of a model that is scored."""
        held, elements = sum(self._size(model) for model in models), models[0].numel
        masks = (tasks + 1) * elements // 8
        return held + (2 * masks + _SCORED_AS * elements if self.on_device else masks)

    def _size(self, model: Checkpoint) -> int:
        nbytes = sum(info.nbytes for info in model.tensors.values())
        return nbytes if self.on_device or copied(model) else 0

    # ---- merges ------------------------------------------------------------------------------------------------------

    def placed(self, method: MergeMethod) -> MergeMethod | None:
        """The method over the models here; None where it cannot be, or they have no room.

        Raises GpuMemoryError where a device has less room than it seemed to have."""
        able = method.leaves_host if self.on_device else type(method) in METHODS.values()
        if not able or not self._admits(method.models, len(method.tuned), method.with_masks):
            return None
        method.reused = self._reused_by(method)
        merged = [info for info in method.rest[1].tensors.values() if method.merges(info)]
        runs = self._runs(merged)
        shards = [_at(shard, method, run) for shard, run in zip(self._shards, runs, strict=True)]
        if len(shards) == 1 and not self.on_device:
            return cast(MergeMethod, shards[0])
        if self.on_device:
            for one in shards:
                if isinstance(one, FusedWhole):
                    one.load()
            self._load(method.models, merged)
        return cast(MergeMethod, _OnShards(method, shards, self._cut(merged)))

    def _reused_by(self, method: MergeMethod) -> dict[Any, Any] | None:
        """Of merges that share their statistics, those of the last method."""
        if method.statistics is None:
            return None
        if self._reused[0] is not method.statistics:
            self._reused = method.statistics, {}
        return self._reused[1]

    def _admits(self, models: Sequence[Checkpoint], tasks: int, masks: Callable[..., Any]) -> bool:
        """Whether these models fit; then others that have to are gone."""
        names = {identity(model): model for model in models}
        if None in names or self.needs(models, tasks) > self.limit:
            return False
        for name, model in names.items():
            self._order.pop(name, None)
            self._order[name] = self._size(model)
        room = self.limit - self.needs(models, tasks) + sum(self._size(model) for model in models)
        for name in list(self._order):
            if sum(self._order.values()) > room and name not in names:
                del self._order[name]
        files: set[Hashable] = set()

        def noted(read: Any) -> Any:
            files.update(mask_key(file) for file in read.files.values())
            return read

        masks(noted)
        for shard in self._shards:
            shard.forget(set(self._order) | files)
        return True

    def _load(self, models: Sequence[Checkpoint], infos: Sequence[TensorInfo]) -> None:
        for shard, mine in zip(self._shards, self._runs(infos), strict=True):
            for model in models:
                there = shard.model(model)
                for info in mine:
                    there.slice(info.name, 0, 0)

    def _cut(self, infos: Sequence[TensorInfo]) -> dict[str, int]:
        """By tensor the number of its shard."""
        return {info.name: number for number, run in enumerate(self._runs(infos)) for info in run}

    def _runs(self, infos: Sequence[TensorInfo]) -> list[Sequence[TensorInfo]]:
        edges = cut([info.numel for info in infos], len(self._shards))
        return [infos[first:last] for first, last in edges]

    # ---- selection ---------------------------------------------------------------------------------------------------

    def select(self, models: Models, counts: Sequence[int], masks: Masks, budget: int) -> list[list[Core]] | None:
        """See `merging.engine.Selects`."""
        if not isinstance(models, Update) or (self.on_device and models.moments):
            return None
        if not self._admits(models.models, 0, lambda read: None):
            return None
        with ExitStack() as stack:
            shards: list[SelectionShard] = []
            for shard, (first, last) in zip(self._shards, cut(models.sizes, len(self._shards)), strict=True):
                here = replace(
                    models,
                    models=[shard.model(model) for model in models.models],
                    names=models.names[first:last],
                    passing=None if self.on_device else models.passing,
                )
                place = shard.place() if shard.place else None
                held = flats_of(here) if self.on_device and type(here) is Update else self.on_device
                selection = stream_cores(here, [0] * len(counts), place=place, held=held)
                part = selection.shard(MasksFrom(masks, first), selection.ranges_within(budget))
                shards.append(stack.enter_context(part))
            return select_over(shards, counts)


def _at(shard: ResidentShard, method: MergeMethod, infos: Sequence[TensorInfo]) -> Any:
    """The method over what is here of the models; infos: of the tensors that are merged here."""
    if shard.place is None:
        return method.placed(shard)
    if groups := groups_to_fuse(method, infos):
        return FusedWhole(cast(Fusion, method), shard.place, shard, groups)
    return OnDevice(method, shard.place, shard)


def cut(sizes: Sequence[int], parts: int) -> list[Piece]:
    """Tensors [first, last) of each part, of about equal size; a part may have none."""
    ends, total = list(accumulate(sizes)), max(sum(sizes), 1)
    number = [min(parts * (end - size // 2) // total, parts - 1) for end, size in zip(ends, sizes, strict=True)]
    edges = [sum(one < part for one in number) for part in range(parts + 1)]
    return list(pairwise(edges))


class _OnShards:
    """A method as `engine.fill_shard` asks for it: each tensor is merged where it lies."""

    def __init__(self, method: MergeMethod, shards: Sequence[Any], cut: dict[str, int]):
        self._host, self._shards, self._cut = method, shards, cut

    @cached_property
    def models(self) -> list[Checkpoint]:
        return self._host.models

    def at(self, name: str) -> Any:
        return self._shards[self._cut[name]].at(name) if name in self._cut else self._host.at(name)

    def pieces(self, info: TensorInfo) -> list[Piece]:
        return self._host.pieces(info)

    def beside(self, info: TensorInfo) -> int:
        return self._host.beside(info)

    def tensor(self, info: TensorInfo) -> Merged:
        merged: Merged = (self._shards[self._cut[info.name]] if info.name in self._cut else self._host).tensor(info)
        return merged
