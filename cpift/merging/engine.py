"""Merging: a method, applied to every tensor slice by slice, written as shards that survive a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol, runtime_checkable

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.finite import all_finite, require_finite
from cpift.checkpoints.slices import DEFAULT_BUDGET, sweep
from cpift.checkpoints.writing import (
    Room,
    Shard,
    ShardRecord,
    TensorRecord,
    WriteBehind,
    copy_companions,
    kept_record,
    plan_shards,
    require_room,
    write_index,
    write_shard,
)
from cpift.devices import reusing_memory
from cpift.disk.files import file_sha256
from cpift.disk.guarded import guarded_reads
from cpift.errors import CpiftError
from cpift.formats.safetensors import FileWriter, TensorInfo
from cpift.merging.base import Merged, MergeMethod
from cpift.merging.checks import CheckedFile, OnElements, Tally

if TYPE_CHECKING:
    import torch
    from cpift_kernels import Core, Mark, Masks, Models, Ready, Selection

_DEEPEST = 6  # buffers in flight; more would not make a disk faster


Place = Callable[[MergeMethod], MergeMethod]
MergeShards = Callable[[MergeMethod, Sequence[Shard], Path, str, int, OnElements], dict[str, ShardRecord]]
Tell = Callable[[str], None]  # takes a sentence worth knowing


def merge(
    method: MergeMethod,
    like: Checkpoint,
    out: Path,
    made_from: str,
    *,
    shard_size: int,
    budget: int = DEFAULT_BUDGET,
    progress: OnElements = lambda elements, name: None,
    shards_by: MergeShards | None = None,
    checked: dict[str, CheckedFile] | None = None,
) -> list[TensorRecord]:
    """Write the merged checkpoint into the folder `out`: names, shapes and dtypes as `like`, its small files copied.

    made_from: the fingerprint of inputs and settings; shards that `out` already has of it are kept. shards_by: what
    does the work of `merge_shards` where it is not this process. checked: where given, slices are looked at while they
    are merged, each file is read back from the disk, and what was found of a file is kept there by its name; not of
    files that were there already or are merged elsewhere. Returns the records of all tensors. Raises CheckpointError
    for a model that does not fit or is not finite, CpiftError for a budget in which not one slice fits.
    """
    shards = plan_shards(like.tensors.values(), shard_size)
    records = {shard.name: kept_record(shard, out, made_from) for shard in shards}
    missing = [shard for shard in shards if records[shard.name] is None]
    require_room(out, sum(info.nbytes for shard in missing for info in shard.tensors))
    with method.named("prepare"):
        of_model = method.prepare() if missing else []
    for shard in shards:
        if records[shard.name] is not None:
            progress(sum(info.numel for info in shard.tensors), shard.name)
    if shards_by:
        records |= shards_by(method, missing, out, made_from, budget, progress)
    else:
        records |= merge_shards(method, missing, out, made_from, budget, progress, checked)
    write_index(shards, out)
    copy_companions(like, out)
    return [*of_model, *(record for shard in shards for record in _kept(records[shard.name])["tensors"])]


@dataclass(frozen=True)
class Pinned:
    """What a GPU copies through. room: makes buffers, uint8 [bytes]; nbytes: held beside those of the output."""

    room: Room
    nbytes: int


def merge_shards(
    method: MergeMethod,
    shards: Sequence[Shard],
    out: Path,
    made_from: str,
    budget: int,
    progress: OnElements,
    checked: dict[str, CheckedFile] | None = None,
    pinned: Pinned | None = None,
) -> dict[str, ShardRecord]:
    """Write some shards; their records by name. `checked` as for `merge`; pinned: of a method on a GPU."""
    if not shards:
        return {}
    infos = [info for shard in shards for info in shard.tensors]
    pieces = ((info, piece) for info in infos for piece in method.pieces(info)[:1])  # an empty tensor has none
    largest = max(((stop - start) * info.itemsize for info, (start, stop) in pieces), default=0)
    most = max(infos, key=method.beside)
    held = pinned.nbytes if pinned else 0
    depth = buffers_within(budget, largest, len(method.models), method.beside(most), most.name, held)
    with WriteBehind(largest, depth, pinned.room if pinned else None) as writing:

        def write(shard: Shard) -> ShardRecord:
            checking = _Checking(method) if checked is not None else None

            def fill(file: FileWriter) -> ShardRecord:
                return fill_shard(method, shard, _ToFile(method, file, writing, checking), progress)

            record = write_shard(shard, out, made_from, fill, checking is not None)
            if checked is not None and checking is not None:
                checked[shard.name] = checking.of(out / shard.name)
            return record

        return {shard.name: write(shard) for shard in shards}


class Target(Protocol):
    """Where the slices of a merged file go, in the order of the file."""

    def buffer(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Room [stop - start] for elements of a tensor, to be filled and given to `write`."""

    def write(self, info: TensorInfo, start: int, values: torch.Tensor, after: Ready | None) -> None:
        """Take a buffer that is filled, some time before `drain` returns. after: waits until it is."""

    def drain(self) -> None:
        """Wait until all is taken; raises what went wrong."""


class _Checking:
    """What the slices of one file show while they are in memory."""

    def __init__(self, method: MergeMethod):
        self._method = method
        self._tallies: dict[str, Tally] = {}
        self._starts: dict[str, int] = {}

    def look(self, placed: TensorInfo, start: int, values: torch.Tensor) -> None:
        """At elements start.. of a tensor, which is at its place in the file."""
        found = self._method.tally(placed, start, values)
        if not found.finite:
            refuse_not_finite(self._method, placed)
        self._tallies[placed.name] = self._tallies.get(placed.name, Tally()) + found
        self._starts[placed.name] = placed.start

    def of(self, file: Path) -> CheckedFile:
        return CheckedFile(file_sha256(file), self._starts, self._tallies)


def require_finite_slice(method: MergeMethod, info: TensorInfo, values: torch.Tensor) -> None:
    """Raise what `refuse_not_finite` does for merged elements of a tensor that are not finite."""
    if info.floating and not all_finite(values):
        refuse_not_finite(method, info)


def refuse_not_finite(method: MergeMethod, info: TensorInfo) -> NoReturn:
    """Raise CheckpointError naming the model in which a tensor is not finite, CpiftError where all models' are."""
    tasks = {id(model): task for task, model in method.tuned.items()}
    for model in (one for one in method.at(info.name).models if info.name in one.tensors):
        require_finite(tasks.get(id(model), "base model"), model, [info.name])
    what = f"merge method {method.config.method_name}: tensor {info.name}"
    raise CpiftError(f"{what}: gives NaN or Inf of finite models → give smaller weights")


class _ToFile:
    """A file that is written behind the merge."""

    def __init__(self, method: MergeMethod, file: FileWriter, writing: WriteBehind, checking: _Checking | None):
        self._method, self._file, self._writing, self._checking = method, file, writing, checking

    def buffer(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        return self._writing.buffer(stop - start, info.dtype)

    def write(self, info: TensorInfo, start: int, values: torch.Tensor, after: Ready | None) -> None:
        look = partial(require_finite_slice, self._method, info, values)
        if self._checking is not None:
            look = partial(self._checking.look, self._file.tensors[info.name], start, values)
        self._writing.write(self._file, info.name, start, values, look, after)

    def drain(self) -> None:
        self._writing.drain()


def fill_shard(method: MergeMethod, shard: Shard, target: Target, progress: OnElements) -> ShardRecord:
    """Merge every tensor of a shard into `target`."""
    records: list[TensorRecord] = []
    with reusing_memory(), guarded_reads(shard.name), drained(target):
        for info, (record, fill) in _looked_ahead(method, shard.tensors):
            records += [] if record is None else [record]
            for start, stop in sweep(method.at(info.name).models, info, method.pieces(info)):
                out = target.buffer(info, start, stop)
                target.write(info, start, out, fill(start, stop, out))
                progress(stop - start, info.name)
        target.drain()
        for model in {id(one): one for info in shard.tensors for one in method.at(info.name).models}.values():
            model.require_unchanged()
    return {"tensors": records}


@contextmanager
def drained(target: Target) -> Iterator[None]:
    """Wait for what is being written, after an error too: the file is about to be closed."""
    try:
        yield
    finally:
        target.drain()


def _looked_ahead(method: MergeMethod, infos: Sequence[TensorInfo]) -> Iterator[tuple[TensorInfo, Merged]]:
    """Every tensor with what `method` says of it: its statistics are made while the tensor before it is written, for
    writing alone (one hash, one disk) does not keep the processors busy."""
    with ThreadPoolExecutor(1, thread_name_prefix="cpift-ahead") as ahead:
        coming = ahead.submit(method.tensor, infos[0])
        for info, following in zip(infos, (*infos[1:], None), strict=True):
            prepared = coming.result()
            if following is not None:
                coming = ahead.submit(method.tensor, following)
            yield info, prepared


def buffers_within(budget: int, nbytes: int, models: int, held: int = 0, name: str = "", pinned: int = 0) -> int:
    """Output buffers that fit beside what a slice takes otherwise: values of adapters, and masks of every model; and
    what is held of the largest tensor and its like, two at a time; and what is pinned.

    Raises CpiftError if it is less than two.
    """
    beside = 2 * models * nbytes + nbytes + 2 * held + pinned
    depth = (budget - beside) // max(nbytes, 1)
    if depth < 2:
        needed = (beside + 2 * nbytes + (1 << 20) - 1) >> 20
        raise CpiftError(
            f"resources.memory_budget: {budget >> 20} MiB is too little to merge {models} models "
            f"{f'by whole tensors, of which {name} takes {held >> 20} MiB' if held else 'slice by slice'} → "
            f"give at least {needed} MiB"
        )
    return min(depth, _DEEPEST)


def _kept(record: ShardRecord | None) -> ShardRecord:
    assert record is not None  # every shard has been kept or written
    return record


class Merging(Protocol):
    """Where selection and merging run; `None` in place of one is this process."""

    @property
    def in_passing(self) -> bool:
        """Whether models may be read by this process's processors, which then measure changes in passing."""

    def telling(self, tell: Tell) -> Merging:
        """The same, which tells what it finds out about where it runs."""

    def session(self) -> AbstractContextManager[None]:
        """Keep one connection over several stages."""

    def mark(self, selection: Selection, masks: Masks) -> Mark:
        """What marks ranges of a selection (`cpift_kernels.Mark`)."""

    def merge_shards(
        self, method: MergeMethod, shards: Sequence[Shard], out: Path, made_from: str, budget: int, progress: OnElements
    ) -> dict[str, ShardRecord]:
        """`merge_shards`."""

    def placing(self, method: MergeMethod) -> Place:
        """What makes of this method, once it is prepared, one that computes as merges here do and fills tensors in
        memory. Both may be sent to another process."""

    def publish(self, folder: Path, fingerprint: str) -> None:
        """The finished model is in `folder`: what was merged elsewhere can be completed there."""


@runtime_checkable
class Selects(Protocol):
    """A `Merging` that may select by itself, all phases."""

    def select(self, models: Models, counts: Sequence[int], masks: Masks, budget: int) -> list[list[Core]] | None:
        """The regions as [task][k], their masks in `masks`; None where it does not have these models.

        budget: in bytes, for buffers. Raises ValueError for a NaN or Inf in θi − θ0."""
