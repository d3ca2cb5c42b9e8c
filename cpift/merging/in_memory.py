"""A merge that writes nothing: the tensors of a model that is only to be scored, made where it is scored.

They have the bits that its files would have, whose hashes are taken as they are made: a model that is written later is
known to be the one that was scored, or not to be.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from cpift_kernels import Ready

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.writing import Shard, TensorRecord, plan_shards
from cpift.errors import StageError
from cpift.formats.safetensors import TensorInfo, laid_out, raw_bytes
from cpift.merging.base import MergeMethod
from cpift.merging.checks import Check, OnElements, failures
from cpift.merging.engine import Place, fill_shard, require_finite_slice
from cpift.merging.state_dicts import TensorsInMemory
from cpift.merging.verify import verify_values


@dataclass(frozen=True)
class MergeRecord:
    """What is to be kept of a merge in memory."""

    files: Mapping[str, tuple[int, str]]  # what each file would be: bytes, sha256
    tensors: Sequence[TensorRecord]
    checks: Sequence[Check]
    seconds: float


@dataclass(frozen=True)
class MergeInMemory:
    """A merge to be made where its result is used: another process may be given it.

    place: see `Merging.placing`. like: whose layout the result has. shard_size: in bytes, of the files that it would be
    written to.
    """

    method: MergeMethod
    place: Place | None
    like: Checkpoint
    shard_size: int
    checked: bool

    @property
    def nbytes(self) -> int:
        """What it holds."""
        return sum(info.nbytes for info in self.like.tensors.values())

    def shards(self) -> list[Shard]:
        """The files that it would be written to."""
        return plan_shards(self.like.tensors.values(), self.shard_size)

    def make(self, progress: OnElements = lambda elements, name: None) -> tuple[dict[str, torch.Tensor], MergeRecord]:
        """Tensors by the names that files have, and what is to be kept of them.

        Raises CheckpointError for a model that is not finite, StageError where the result is not what it has to be.
        """
        started = time.time()
        with self.method.named("prepare"):
            records = self.method.prepare()
        placed = self.place(self.method) if self.place else self.method
        tensors: dict[str, torch.Tensor] = {}
        files = {}
        for shard in self.shards():
            target = _ToMemory(self.method, shard)
            records = [*records, *fill_shard(placed, shard, target, progress)["tensors"]]
            files[shard.name] = target.file()
            tensors |= target.tensors
        reads = placed if isinstance(placed, MergeMethod) else self.method  # what was read, if the processors may
        return tensors, MergeRecord(files, records, self._checks(reads, tensors), time.time() - started)

    def _checks(self, method: MergeMethod, tensors: Mapping[str, torch.Tensor]) -> list[Check]:
        checks = []
        if self.checked:
            checks = verify_values(method, self.like, TensorsInMemory("the fused model", tensors, {}))
        if failed := failures(checks):
            raise StageError("\n  - ".join(["the fused model is not what it has to be, and was not scored:", *failed]))
        return checks


class _ToMemory:
    """The tensors of one file, and what that would be (`engine.Target`)."""

    def __init__(self, method: MergeMethod, shard: Shard):
        self._method = method
        self._header, self._infos = laid_out(Path(shard.name), shard.tensors)[0], shard.tensors
        self.tensors = {info.name: torch.empty(info.shape, dtype=info.dtype) for info in shard.tensors}
        self._hash, self._hasher = hashlib.sha256(self._header), ThreadPoolExecutor(1)
        self._hashed: list[Future[None]] = []

    def buffer(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        return self.tensors[info.name].view(-1)[start:stop]

    def write(self, info: TensorInfo, start: int, values: torch.Tensor, after: Ready | None) -> None:
        self._hashed.append(self._hasher.submit(self._absorb, info, values, after))

    def _absorb(self, info: TensorInfo, values: torch.Tensor, after: Ready | None) -> None:
        if after is not None:
            after()
        require_finite_slice(self._method, info, values)
        self._hash.update(raw_bytes(values))

    def drain(self) -> None:
        hashed, self._hashed = self._hashed, []
        for future in hashed:
            future.result()

    def file(self) -> tuple[int, str]:
        """Its size in bytes and sha256."""
        self._hasher.shutdown()
        return len(self._header) + sum(info.nbytes for info in self._infos), self._hash.hexdigest()
