"""A merge whose workers share an object store instead of a folder: masks fetched slice by slice, shards uploaded.

    <storage>/fuse-<fingerprint>/masks/0/<task>.safetensors  uploaded before the first shard, its hash after it; sets of
                                                             masks are numbered
    <storage>/fuse-<fingerprint>/<shard>                     by the worker that made it; its note after it
    <storage>/fuse-<fingerprint>/…                           config, tokenizer, index, and the manifest last

A worker writes a shard to its own disk, uploads it and deletes it; the driver downloads it and checks its hash, so the
run's folder holds the model too. What is in the store from an interrupted run is not made again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch

from cpift.checkpoints.checkpoint import INDEX_FILE
from cpift.checkpoints.writing import Shard, ShardNote, ShardRecord, note_of, write_note
from cpift.disk.files import MANIFEST, file_sha256, read_json, write_json
from cpift.disk.object_store import ObjectStore
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import MergeMethod
from cpift.merging.engine import merge_shards
from cpift.method.masks import NoCores, RegionMasks

_MASKS = "masks"


class StoredMasks(RegionMasks):
    """Masks that were uploaded, read from the store slice by slice."""

    def __init__(self, store: ObjectStore, infos: Mapping[str, Mapping[str, TensorInfo]], empty: bool):
        """infos: every task's mask tensors by name, as they lie in the files; empty: cores are left out (`NoCores`)."""
        self.infos = {task: dict(tensors) for task, tensors in infos.items()}
        self._store, self._empty = store, empty

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._store, self.infos, self._empty)

    def words(self, task: str, name: str, start: int, stop: int) -> torch.Tensor:
        first, last = start // 32, (stop + 31) // 32
        if self._empty or first == last:
            return torch.zeros(last - first, dtype=torch.int32)
        at, nbytes = self.infos[task][name].start + 4 * first, 4 * (last - first)
        return torch.frombuffer(bytearray(self._store.read(f"{task}.safetensors", at, nbytes)), dtype=torch.int32)


def with_stored_masks(method: MergeMethod, store: ObjectStore) -> MergeMethod:
    """The method as workers get it: its masks, if it has any, uploaded to the store and read from there."""
    numbers = count()

    def stored(masks: RegionMasks) -> RegionMasks:
        place = store.folder(f"{_MASKS}/{next(numbers)}")
        for file in masks.files.values():
            _put_once(place, file)
        return StoredMasks(place, masks.infos, isinstance(masks, NoCores))

    return method.with_masks(stored)


def _put_once(place: ObjectStore, file: Path) -> None:
    """Upload a file, unless these very bytes are there. Its hash is put after it: what was cut short has none."""
    note, name = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}, f"{file.name}.json"
    if place.size(file.name) == note["bytes"] and place.read_json(name) == note:
        return
    place.put(file, file.name)
    with tempfile.TemporaryDirectory(prefix="cpift-masks-") as scratch:
        write_json(Path(scratch) / name, note)
        place.put(Path(scratch) / name, name)


def merge_into(
    store: ObjectStore,
    method: MergeMethod,
    shard: Shard,
    made_from: str,
    budget: int,
    merge: Callable[..., Any] = merge_shards,
) -> dict[str, ShardNote]:
    """One shard that goes to the store, unless it is there; returns its note. merge: `merging.engine.merge_shards`, or
    what does the same on a GPU."""
    note = store.read_json(note_of(shard, Path()).name)
    if note is not None and note["key"] == shard.key(made_from) and store.size(shard.name) == note["bytes"]:
        return {shard.name: note}
    with tempfile.TemporaryDirectory(prefix="cpift-shard-") as scratch:
        folder = Path(scratch)
        merge(method, [shard], folder, made_from, budget, lambda elements, name: None)
        store.put(folder / shard.name, shard.name)
        store.put(note_of(shard, folder), note_of(shard, folder).name)  # after it: what has a note is whole
        return {shard.name: read_json(note_of(shard, folder))}


def fetch(store: ObjectStore, shard: Shard, out: Path, made_from: str, note: ShardNote) -> ShardRecord:
    """Download a shard into `out` and keep its note there; returns its record."""
    store.get(shard.name, out / shard.name, note["sha256"] or "")
    write_note(shard, out, made_from, note["sha256"], note["record"])
    return note["record"]


def publish(store: ObjectStore, folder: Path) -> None:
    """Upload what a finished model has beside its shards: the index last but one, the manifest last."""
    if store.size(MANIFEST) is not None:
        return
    small = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix != ".safetensors"]
    for file in sorted(small, key=lambda file: (file.name == MANIFEST, file.name == INDEX_FILE)):
        store.put(file, file.name)
