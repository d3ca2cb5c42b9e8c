"""Checkpoints of sharded training, read without trusting them: torch pickles their index and what is beside tensors."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from cpift.errors import CheckpointError, Problem

_METADATA = (
    *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "ChunkStorageMetadata"),
    *("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
)
_LAYOUT_CLASSES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA),
    *(("pathlib", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


class _Layout(pickle.Unpickler):
    """Reads the index of a sharded checkpoint, which torch pickles: the classes it consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _LAYOUT_CLASSES or dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a sharded checkpoint")


class _Reader(FileSystemReader):
    """torch's own, but for how the index is read."""

    def read_metadata(self, *args: Any, **rest: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Layout(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    """torch's own, but for values beside the tensors: numbers, texts and lists alone."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            plain = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL (\S+)", str(error))
            what = name[1] if name else "a pickle"
            raise pickle.UnpicklingError(f"{what} has no place in a sharded checkpoint") from error
        super().load_bytes(read_item, _pickled(plain))


def read_state(state: dict[str, Any], folder: Path) -> None:
    """Fill `state` from a sharded checkpoint, in place: tensors and plain values. Raises CheckpointError."""
    try:
        load(state, storage_reader=_Reader(folder), planner=_Planner())
    except CheckpointException as error:  # of every worker that failed
        causes = dict.fromkeys(f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values())
        problem = Problem(str(folder), "; ".join(causes), "delete this folder: the stage starts again")
        raise CheckpointError("sharded checkpoint", [problem]) from error


def _pickled(value: Any) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream
