"""A trained model as a checkpoint: narrowed to the dtypes of the files before it moves, and written by all who hold it.

Of a sharded model each worker writes its own rows into files that all of them see; nothing is gathered. Only what the
file has in another layout (experts in one parameter) is, and where the folder is on one node's own disk, everything.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.layout import Layout
from cpift.checkpoints.writing import Shard, copy_companions, write_index
from cpift.formats.safetensors import FileWriter, TensorInfo
from cpift.training.weights.workers import full_tensor, in_step, own_rows, rank_here, workers_here

_PIECE = 1 << 24  # elements that are narrowed and moved at once
_BEHIND = 4  # pieces that wait for the disk, at most


def write_trained(
    model: torch.nn.Module, layout: Layout, origin: Checkpoint, out: Path, main: bool, kind: str | None = None
) -> None:
    """Write a model, sharded or not, with the names and files of `origin`, which has this layout. Collective.

    Tensors that the class does not take are the origin's. kind: the format's name of the dtype that numbers are
    written in; default: of each tensor the origin's. The model is whole when every worker has come back.
    """
    state = model.state_dict()
    infos = [replace(info, kind=kind) if kind and info.floating else info for info in origin.tensors.values()]
    shards = [Shard(file.name, tuple(info for info in infos if info.file == file)) for file in origin.files]
    if main:
        out.mkdir(parents=True, exist_ok=True)
        _create(shards, out)
    sharded = any(isinstance(tensor, DTensor) for tensor in model.parameters())
    together = sharded and _seen_by_all(out, main)
    parts, written = _Gathered(state, sharded), [info for shard in shards for info in shard.tensors]
    with _Files(out, shards if together or main else ()) as files:
        _write_tensors(parts, layout, origin, written, files, together)
    if together:
        in_step()
    if main:
        write_index(shards, out)
        copy_companions(origin, out)


def _seen_by_all(folder: Path, main: bool) -> bool:
    """Whether every worker sees what the first one puts into a folder. Collective."""
    name: list[str | None] = [f".{uuid.uuid4().hex}" if main else None]
    torch.distributed.broadcast_object_list(name)
    mark = folder / str(name[0])
    if main:
        mark.touch()
    in_step()
    seen = [False] * workers_here()
    torch.distributed.all_gather_object(seen, mark.exists())
    if main:
        mark.unlink()
    return all(seen)


def _create(shards: Sequence[Shard], folder: Path) -> None:
    for shard in shards:
        (folder / shard.name).unlink(missing_ok=True)  # a lost worker of an attempt before may still write to it
        FileWriter(folder / shard.name, shard.tensors).close()


def _write_tensors(
    parts: _Gathered,
    layout: Layout,
    origin: Checkpoint,
    infos: Sequence[TensorInfo],
    files: _Files,
    together: bool,
) -> None:
    """Write what this worker has to. together: all write, what is gathered in turn; else the first one alone."""
    rank, writers = rank_here(), workers_here() if together else 1
    for number, info in enumerate(infos):
        holders = [holder for holder, _ in layout.places.get(info.name, ())]
        same = parts.sharded(holders[0]) if holders and layout.same(holders[0]) == info.name else None
        if together and same is not None:
            files.put(info, own_rows(same).start * (info.numel // max(info.shape[0], 1)), same.to_local())
            continue
        shared = parts.gather(holders, info.dtype)
        if rank == (number % writers if shared else 0):
            files.put(info, 0, layout.tensor(info.name, parts.whole) if holders else origin.mapped(info.name))


class _Gathered:
    """Whole parameters; of those that are sharded the last two that were asked for. sharded: whether any is; of a model
    that is not none is looked at before it is written, for some are computed then."""

    def __init__(self, state: Mapping[str, torch.Tensor], sharded: bool):
        self._state, self._any = state, sharded
        self._whole = lru_cache(maxsize=2)(lambda name, dtype: full_tensor(state[name].to(dtype)).cpu())
        self._dtype = torch.float32

    def sharded(self, name: str) -> DTensor | None:
        """A parameter of which each worker has its rows; None for one that all have."""
        held = self._state[name] if self._any else None
        return held if isinstance(held, DTensor) else None

    def gather(self, names: Sequence[str], dtype: torch.dtype) -> bool:
        """Have `whole` of these, in `dtype` where they are sharded; whether one is. Collective."""
        self._dtype = dtype
        shared = [name for name in names if self.sharded(name) is not None]
        for name in shared:
            self._whole(name, dtype)
        return bool(shared)

    def whole(self, name: str) -> torch.Tensor:
        held = self._state[name]
        return self._whole(name, self._dtype) if isinstance(held, DTensor) else held


class _Files:
    """Files that exist, written to while the caller goes on. Leaving waits until all is on the disk."""

    def __init__(self, folder: Path, shards: Sequence[Shard]):
        self._files = {shard.name: FileWriter.attach(folder / shard.name) for shard in shards}
        self._pool, self._pending = ThreadPoolExecutor(_BEHIND), deque[Future[None]]()

    def put(self, info: TensorInfo, start: int, values: torch.Tensor) -> None:
        """Write values of any dtype as elements start.. of a tensor."""
        flat = values.reshape(-1)
        if start + len(flat) > info.numel:
            raise ValueError(f"{info.name}: {len(flat)} elements from {start} on are more than its {info.numel}")
        for first in range(0, len(flat), _PIECE):
            piece = flat[first : first + _PIECE].to(info.dtype).cpu()
            while len(self._pending) >= _BEHIND:
                self._pending.popleft().result()
            self._pending.append(self._pool.submit(self._files[info.file.name].write, info.name, start + first, piece))

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._pending:
                future.result()
            for file in self._files.values():
                file.flush()
