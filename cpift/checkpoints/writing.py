"""Checkpoints written: names, dtypes and shards decided beforehand, small files copied byte for byte.

A shard has a temporary name until it is whole and on the disk; a note beside it says what it was made from, so that an
interrupted merge goes on with the shards that are missing and never takes one of other inputs.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypedDict, cast

from cpift.checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from cpift.disk.files import digest, file_sha256, read_json, remember_sha256, write_json
from cpift.errors import StageError
from cpift.formats.safetensors import FileWriter, TensorInfo
from cpift.pretrained.architecture import tied_names
from cpift.pretrained.tying import untied_config
from cpift.text.units import show_size

if TYPE_CHECKING:
    import torch

_RECORDS = {
    "fusion.json",
    "inputs.json",
    "training.json",
}  # what a run says of a model, which another is not to inherit


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint to be written."""

    name: str
    tensors: tuple[TensorInfo, ...]

    def key(self, made_from: str) -> str:
        """What identifies its content, given the fingerprint of inputs and settings."""
        layout = [(info.name, list(info.shape), info.kind) for info in self.tensors]
        return digest([made_from, self.name, layout])


def plan_shards(tensors: Iterable[TensorInfo], limit: int) -> list[Shard]:
    """Tensors in name order, packed into files of at most `limit` bytes (more where one tensor alone is larger)."""
    groups: list[list[TensorInfo]] = []
    room = 0
    for info in sorted(tensors, key=lambda info: info.name):
        if not groups or info.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(info)
        room -= info.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE_FILE, tuple(groups[0]))]
    names = (f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1))
    return [Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


class TensorRecord(TypedDict, total=False):
    """What a merge says of a tensor, or of the whole `(model)`: the first three always, others by the method."""

    tensor: str
    numel: int
    core: int  # elements that are a core's
    angles: list[float]  # radians, one a fold
    lerp: list[float]  # the share of vectors that were interpolated in a line, one a fold
    cosine: float  # of the updates, on average
    share: float  # of the pretrained model


class ShardRecord(TypedDict):
    tensors: list[TensorRecord]


class ShardNote(TypedDict):
    """Lies beside a shard that is whole."""

    key: str  # of what it was made from
    bytes: int
    mtime_ns: int
    sha256: str | None
    record: ShardRecord


def write_index(shards: Sequence[Shard], folder: Path, of_one: bool = False) -> None:
    """The index that transformers finds tensors by; a checkpoint of one file has none but `of_one`."""
    if of_one or [shard.name for shard in shards] != [SINGLE_FILE]:
        total = sum(info.nbytes for shard in shards for info in shard.tensors)
        places = {info.name: shard.name for shard in shards for info in shard.tensors}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})


def kept_record(shard: Shard, folder: Path, made_from: str) -> ShardRecord | None:
    """The record of a shard that was finished before from the same inputs, None if it has to be written."""
    note, file = note_of(shard, folder), folder / shard.name
    if not (note.is_file() and file.is_file()):
        return None
    try:
        content = read_json(note)
        same = content["key"] == shard.key(made_from) and content["bytes"] == file.stat().st_size
        record, sha256 = content["record"], content["sha256"]
        sound = same and isinstance(record, dict) and sha256 in (None, file_sha256(file))
        return cast(ShardRecord, record) if sound else None
    except (ValueError, KeyError, TypeError):  # half a note, of a machine that lost power: the shard is made again
        return None


def write_shard(
    shard: Shard, folder: Path, made_from: str, fill: Callable[[FileWriter], ShardRecord], read_back: bool = False
) -> ShardRecord:
    """Write one shard into `folder`; `fill` writes every tensor and returns what is to be kept beside it.

    read_back: read it back from the disk and compare it with what was written, before it has its name.
    Raises StageError where the disk is full or cannot be written, or an input not be read, or the disk gives back
    something else; nothing half-written stays.
    """
    partial = folder / f".{shard.name}.{os.getpid()}.partial"
    try:
        record, sha256 = _filled(partial, shard, fill, read_back)
    except OSError as error:
        ours = error.filename in (None, str(partial))
        what = f"{folder / shard.name} could not be written" if ours else f"{error.filename} could not be read"
        remedy = "mend that, then the same command goes on with the files that are missing"
        raise StageError(f"{what}: {error.strerror or error} → {remedy}") from error
    os.replace(partial, folder / shard.name)
    write_note(shard, folder, made_from, sha256, record)
    return record


def write_note(shard: Shard, folder: Path, made_from: str, sha256: str | None, record: ShardRecord) -> None:
    """Say beside a shard, which is whole and in `folder`, what it was made from: `kept_record` then finds it."""
    file = folder / shard.name
    status = file.stat()
    note: ShardNote = {
        "key": shard.key(made_from),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": sha256,
        "record": record,
    }
    _remember(file, note)
    write_json(note_of(shard, folder), note)


def _remember(file: Path, note: ShardNote) -> None:
    """A shard is hashed as it is written; its note tells other processes, as long as nobody touched the file."""
    if note["sha256"] and note["mtime_ns"] == file.stat().st_mtime_ns:
        remember_sha256(file, note["sha256"])


def _filled(
    partial: Path, shard: Shard, fill: Callable[[FileWriter], ShardRecord], read_back: bool
) -> tuple[ShardRecord, str | None]:
    writer = FileWriter(partial, shard.tensors, in_order=True, read_back=read_back)
    try:
        record = fill(writer)
        writer.flush()
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        writer.close()
    return record, writer.sha256


def require_room(folder: Path, nbytes: int) -> None:
    """Raise StageError if the disk has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise StageError(
            f"{folder}: the disk has {show_size(free)} free, the merged model takes {show_size(nbytes)} → free some, "
            "or write to another folder"
        )


def note_of(shard: Shard, folder: Path) -> Path:
    """The file that says what a shard was made from."""
    return folder / f".{shard.name}.json"


Room = Callable[[int], "torch.Tensor"]  # makes uint8 [bytes]


def _room(nbytes: int) -> torch.Tensor:
    import torch

    return torch.empty(nbytes, dtype=torch.uint8)


class WriteBehind:
    """Writes and hashes buffers while the next ones are computed; `depth` buffers of `nbytes` are all it holds."""

    def __init__(self, nbytes: int, depth: int, room: Room | None = None):
        """room: makes the buffers, if they are to be in memory of a kind."""
        self._free: SimpleQueue[torch.Tensor] = SimpleQueue()
        self._buffers = {buffer.data_ptr(): buffer for buffer in ((room or _room)(nbytes) for _ in range(depth))}
        for buffer in self._buffers.values():
            self._free.put(buffer)
        self._writer, self._hasher, self._checker = (ThreadPoolExecutor(1) for _ in range(3))
        self._pending: list[Future[None]] = []

    def buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """An output buffer [numel]; waits until one has been written. Give it to `write`."""
        self._raise_failed()
        return self._free.get()[: numel * dtype.itemsize].view(dtype)

    def write(
        self,
        file: FileWriter,
        name: str,
        start: int,
        values: torch.Tensor,
        check: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Write a buffer as elements start.. of a tensor, some time before `drain` returns; `check` looks at it too.
        after: waits until the buffer is filled."""

        def filled(work: Callable[[], None]) -> None:
            if after is not None:
                after()
            work()

        beside = [self._hasher.submit(filled, partial(file.absorb, name, start, values))]
        beside += [] if check is None else [self._checker.submit(filled, check)]
        writing = partial(file.write, name, start, values)
        self._pending.append(self._writer.submit(self._write, partial(filled, writing), values, beside))

    def _write(self, work: Callable[[], None], values: torch.Tensor, beside: list[Future[None]]) -> None:
        try:
            work()
        finally:
            wait(beside)
            self._free.put(self._buffers[values.data_ptr()])
        for future in beside:
            future.result()

    def drain(self) -> None:
        """Wait until everything has been written; raises what went wrong."""
        pending, self._pending = self._pending, []
        wait(pending)
        for future in pending:
            future.result()

    def _raise_failed(self) -> None:
        done = [future for future in self._pending if future.done()]
        self._pending = [future for future in self._pending if not future.done()]
        for future in done:
            future.result()

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, *error: Any) -> None:
        for pool in (self._writer, self._hasher, self._checker):
            pool.shutdown(wait=True, cancel_futures=True)


def write_plain(model: Checkpoint, like: Checkpoint, out: Path, shard_size: int = 5 * 10**9) -> None:
    """Write any checkpoint as the folder of a full model, one tensor at a time; small files are those of `like`."""
    shards = plan_shards(model.tensors.values(), shard_size)
    for shard in shards:
        writer = FileWriter(out / shard.name, shard.tensors)
        for info in shard.tensors:
            writer.write(info.name, 0, model.tensor(info.name).contiguous())
        writer.flush()
        writer.close()
    write_index(shards, out)
    copy_companions(like, out)


def companions(folder: Path) -> Iterator[Path]:
    """Everything of a model folder that is not weights or their index: config, tokenizer, chat template, licence."""
    weights = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack)$")
    skipped = {"manifest.json", "README.md", INDEX_FILE, *_RECORDS}
    for path in sorted(folder.iterdir()):
        if (
            path.is_file()
            and not weights.match(path.name)
            and not path.name.startswith(".")
            and path.name not in skipped
        ):
            yield path


def copy_companions(model: Checkpoint, out: Path) -> None:
    """Copy a model's small files, but for those that it has `rewritten`; where its tied tensors are apart, the copy's
    config.json ties them no longer."""
    for path in companions(model.folder):
        if path.name not in model.rewritten:
            shutil.copyfile(path, out / path.name)
    for name, content in model.rewritten.items():
        if isinstance(content, str):
            (out / name).write_text(content, encoding="utf-8")
        elif content is not None:
            write_json(out / name, content)
    if model.is_apart and model.ties:
        write_json(out / "config.json", untied_config(model.config))
        if tied := tied_names(out):
            names = ", ".join(tied)
            raise StageError(f"{out / 'config.json'}: its class ties {names} whatever its configuration says")
