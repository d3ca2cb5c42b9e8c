"""The shards of one process: which device has which tensors, and which models they hold.

A model's tensors are cut into as many runs of about equal size, in name order, as there are shards. A tensor is whole,
so its sums are made in one place in one order: neither masks nor merged bytes depend on the number of shards. These
may be of several processes (`holders`), each of which then has some of the runs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Room:
    """What models take where they stay. on_device: a GPU's memory; whole: files are copied; scored: a model that is
    scored lies there too."""

    on_device: bool = False
    whole: bool = False
    scored: bool = False

    def needs(self, models: Sequence[Checkpoint], tasks: int) -> int:
        """Bytes of these models and of what is kept of so many tasks' cores."""
        held, elements = sum(self.size(model) for model in models), models[0].numel
        masks = (tasks + 1) * elements // 8
        made = self.size(models[0]) if self.on_device else 0  # a fused model, until it is fetched
        return held + (2 if self.on_device else 1) * masks + (_SCORED_AS * elements if self.scored else made)

    def size(self, model: Checkpoint) -> int:
        nbytes = sum(info.nbytes for info in model.tensors.values())
        return nbytes if self.whole or copied(model) else 0


MAPPED = Room()  # a process's memory, beside the files' pages
OWN_COPIES = Room(whole=True)
GPUS = Room(on_device=True, whole=True)


class Residents:
    """Shards that hold models between the merges of one process.

    places: make queues of the device of each; None stands for this process's memory. limit: bytes that all shards of
    all processes may hold. A model that is needed no more makes room for others. room: how models lie there; of a
    device, or this process's memory, as it is alone, if not given. first, width: the number of the first one of the
    shards that are here, and how many there are in all processes.
    """

    def __init__(
        self,
        places: Sequence[Callable[[], Placement] | None],
        limit: int,
        room: Room | None = None,
        first: int = 0,
        width: int = 0,
    ):
        self.limit, self.on_device = limit, places[0] is not None
        self.room = room or (replace(GPUS, scored=True) if self.on_device else MAPPED)
        self._shards = [ResidentShard(place, identity, self.room.whole) for place in places]
        self._first, self._width = first, width or len(places)
        self._order: dict[Hashable, int] = {}  # bytes by model, the one that was used last at the end
        self._reused: tuple[Any, dict[Any, Any]] = None, {}

    def needs(self, models: Sequence[Checkpoint], tasks: int) -> int:
        """See `Room.needs`."""
        return self.room.needs(models, tasks)

    # ---- merges ------------------------------------------------------------------------------------------------------

    def placed(self, method: MergeMethod, reuse: bool = True) -> MergeMethod | None:
        """The method over the models here; None where it cannot be, or they have no room. reuse: whether what merges
        that share their statistics have in common may be kept.

        Raises GpuMemoryError where a device has less room than it seemed to have."""
        if not able(method, self.on_device) or not self._admits(method.models, len(method.tuned), method.with_masks):
            return None
        method.reused = self._reused_by(method) if reuse else None
        infos = method.rest[1].tensors
        merged = [name for name, info in infos.items() if method.merges(info)]
        mine = [[infos[name] for name in merged[first:last]] for first, last in self._runs(infos, merged)]
        shards = [_at(shard, method, run) for shard, run in zip(self._shards, mine, strict=True)]
        if self._width == 1 and not self.on_device:
            return cast(MergeMethod, shards[0])
        if self.on_device:
            self._load(method, shards, mine)
        return on_shards(method, dict(enumerate(shards, self._first)), self._width)

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
            self._order[name] = self.room.size(model)
        room = self.limit - self.needs(models, tasks) + sum(map(self.room.size, models))
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

    def _load(self, method: MergeMethod, placed: Sequence[Any], infos: Sequence[Sequence[TensorInfo]]) -> None:
        for shard, there, mine in zip(self._shards, placed, infos, strict=True):
            if isinstance(there, FusedWhole):
                there.load()
            for model in map(shard.model, method.models):
                for info in mine:
                    model.slice(info.name, 0, 0)

    def _runs(self, infos: Mapping[str, TensorInfo], names: Sequence[str]) -> list[Piece]:
        """Of the shards that are here."""
        return runs(infos, names, self._width)[self._first : self._first + len(self._shards)]

    # ---- selection ---------------------------------------------------------------------------------------------------

    def select(self, models: Models, counts: Sequence[int], masks: Masks, budget: int) -> list[list[Core]] | None:
        """See `merging.engine.Selects`."""
        if not isinstance(models, Update) or not self.selects(models):
            return None
        with ExitStack() as stack:
            return select_over([stack.enter_context(one) for one in self.shards(models, counts, masks, budget)], counts)

    def selects(self, models: Update) -> bool:
        """Whether it can select from these models, and they have room; then others that have to are gone."""
        return not (self.on_device and models.moments) and self._admits(models.models, 0, lambda read: None)

    def here(self, models: Update) -> Piece:
        """The tensors [first, last) of a selection that are here."""
        parts = self._runs(models.models[0].tensors, models.names)
        return parts[0][0], parts[-1][1]

    def shards(
        self, models: Update, counts: Sequence[int], masks: Masks, budget: int
    ) -> list[AbstractContextManager[SelectionShard]]:
        """The shards that are here, of models that it `selects` from; masks: of the tensors of all shards."""
        found = []
        for shard, (first, last) in zip(self._shards, self._runs(models.models[0].tensors, models.names), strict=True):
            here = replace(
                models,
                models=[shard.model(model) for model in models.models],
                names=models.names[first:last],
                passing=None if self.on_device else models.passing,
            )
            place = shard.place() if shard.place else None
            held = flats_of(here) if self.on_device and type(here) is Update else self.on_device
            selection = stream_cores(here, [0] * len(counts), place=place, held=held)
            found.append(selection.shard(MasksFrom(masks, first), selection.ranges_within(budget)))
        return found


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


def runs(infos: Mapping[str, TensorInfo], names: Sequence[str], parts: int) -> list[Piece]:
    """Of some of a model's tensors, in name order, those [first, last) of each part: whichever are asked for, a tensor
    belongs to the same one."""
    owners = _owners(infos, parts)
    mine = [owners[name] for name in names]
    return [(bisect_left(mine, part), bisect_right(mine, part)) for part in range(parts)]


def _owners(infos: Mapping[str, TensorInfo], parts: int) -> dict[str, int]:
    """By tensor the number of its part."""
    names, edges = list(infos), cut([info.numel for info in infos.values()], parts)
    return {name: part for part, (first, last) in enumerate(edges) for name in names[first:last]}


def able(method: MergeMethod, on_device: bool) -> bool:
    """Whether a method merges models that stay."""
    return method.leaves_host if on_device else type(method) in METHODS.values()


def on_shards(method: MergeMethod, shards: Mapping[int, Any], width: int) -> MergeMethod:
    """A method as `engine.fill_shard` asks for it: each tensor is merged where it lies. shards: the method at some of
    the `width` shards, by their number."""
    infos = method.rest[1].tensors
    where = {name: part for name, part in _owners(infos, width).items() if method.merges(infos[name])}
    return cast(MergeMethod, _OnShards(method, shards, where))


class _OnShards:
    """A method whose tensors lie in shards; those of no shard are merged as they would be without any."""

    def __init__(self, method: MergeMethod, shards: Mapping[int, Any], where: Mapping[str, int]):
        self._host, self._shards, self._where = method, shards, where

    @cached_property
    def models(self) -> list[Checkpoint]:
        return self._host.models

    def at(self, name: str) -> Any:
        return self._shards[self._where[name]].at(name) if name in self._where else self._host.at(name)

    def pieces(self, info: TensorInfo) -> list[Piece]:
        return self._host.pieces(info)

    def beside(self, info: TensorInfo) -> int:
        return self._host.beside(info)

    def tensor(self, info: TensorInfo) -> Merged:
        merged: Merged = (self._shards[self._where[info.name]] if info.name in self._where else self._host).tensor(info)
        return merged
