"""Model directories as named lazy tensors, and the writer of new ones.

A checkpoint is a folder with safetensors (one file, or shards with an index) beside `config.json` and the tokenizer.
Tensors are read one at a time through a memory map; a model is never whole in memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cpift.errors import CheckpointError, Problem

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def floating(self) -> bool:
        return self.dtype.is_floating_point


class Checkpoint:
    """A model folder opened for reading. Only headers are read until a tensor is asked for.

    Raises CheckpointError, with every problem of the folder: no safetensors, a missing or truncated shard, a tensor
    that the index names but no shard has, a tensor in two shards, an unsupported dtype.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        problems: list[Problem] = []
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._files(problems):
            self._read_header(file, problems)
        self._check_index(problems)
        if problems:
            raise CheckpointError(f"checkpoint {folder}", problems)
        self.tensors = dict(sorted(self.tensors.items()))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Tensor names in sorted order: the *name order* that linear indices and ties refer to, whatever the shards."""
        return tuple(self.tensors)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({info.file for info in self.tensors.values()}))

    @property
    def numel(self) -> int:
        return sum(info.numel for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, contiguous, in the file's dtype."""
        with safe_open(self.tensors[name].file, framework="pt") as opened:
            return opened.get_tensor(name)

    def _index(self) -> dict[str, str] | None:
        path = self.folder / INDEX_FILE
        return json.loads(path.read_text(encoding="utf-8"))["weight_map"] if path.is_file() else None

    def _files(self, problems: list[Problem]) -> list[Path]:
        index = self._index()
        names = sorted(set(index.values())) if index is not None else [SINGLE_FILE]
        if index is None and not (self.folder / SINGLE_FILE).is_file():
            problems.append(_no_weights(self.folder))
            return []
        for name in names:
            if Path(name).name != name:
                problems.append(Problem(INDEX_FILE, f"names {name!r}, which is not in the folder", "mend the index"))
            elif not (self.folder / name).is_file():
                problems.append(
                    Problem(name, "is named in the index but not there", "download or copy this shard again")
                )
        return [self.folder / name for name in names if Path(name).name == name and (self.folder / name).is_file()]

    def _read_header(self, file: Path, problems: list[Problem]) -> None:
        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
                slices = {name: opened.get_slice(name) for name in names}
                headers = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            problems.append(
                Problem(file.name, f"cannot be read ({error})", "the file is damaged: download or copy it again")
            )
            return
        for name, (shape, dtype) in headers.items():
            if name in self.tensors:
                first = self.tensors[name].file.name
                problems.append(Problem(name, f"is in {first} and in {file.name}", "remove the stale shard"))
            elif dtype not in _DTYPES:
                problems.append(Problem(name, f"has dtype {dtype}", "convert the checkpoint to bf16, fp16 or fp32"))
            else:
                self.tensors[name] = TensorInfo(name, shape, _DTYPES[dtype], file)

    def _check_index(self, problems: list[Problem]) -> None:
        readable = {info.file.name for info in self.tensors.values()}
        for name, shard in (self._index() or {}).items():
            if shard in readable and name not in self.tensors:
                problems.append(Problem(name, f"is not in {shard}, where the index has it", "mend the index"))


def _no_weights(folder: Path) -> Problem:
    if not folder.is_dir():
        return Problem(str(folder), "is no folder", "check the path")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        convert = "load it with transformers and call save_pretrained, which writes safetensors"
        return Problem(str(folder), "holds pickled weights only, which can run code when loaded", convert)
    return Problem(str(folder), "holds no model.safetensors and no index of shards", "check the path")


def differences(base: Checkpoint, other: Checkpoint) -> list[Problem]:
    """What keeps `other` from being a fine-tune of `base`: missing or extra tensors, other shapes."""
    problems = [
        Problem(name, "is missing", "use fine-tunes of one model") for name in base.names if name not in other.tensors
    ]
    problems += [
        Problem(name, "is not in the pre-trained model", "") for name in other.names if name not in base.tensors
    ]
    for name in base.names:
        mine, theirs = base.tensors[name], other.tensors.get(name)
        if theirs is not None and theirs.shape != mine.shape:
            what = f"has shape {list(theirs.shape)}, in the pre-trained model {list(mine.shape)}"
            problems.append(Problem(name, what, "use fine-tunes of one model"))
    return problems


def require_same_layout(base: Checkpoint, others: Mapping[str, Checkpoint]) -> None:
    """Raise CheckpointError naming every model and tensor that does not fit `base`."""
    found = [
        Problem(f"{label}: {problem.where}", problem.what, problem.remedy)
        for label, other in others.items()
        for problem in differences(base, other)
    ]
    if found:
        raise CheckpointError(f"models that do not fit {base.folder}", _first(found, 20))


def require_finite(label: str, checkpoint: Checkpoint, names: Sequence[str] | None = None) -> None:
    """Raise CheckpointError naming the tensors that hold NaN or Inf."""
    bad = [
        Problem(name, "holds NaN or Inf", "its training diverged: use an earlier checkpoint or a lower learning rate")
        for name in names or checkpoint.names
        if checkpoint.tensors[name].floating and not bool(checkpoint.tensor(name).isfinite().all())
    ]
    if bad:
        raise CheckpointError(f"{label} ({checkpoint.folder})", _first(bad, 20))


def _first(problems: list[Problem], count: int) -> list[Problem]:
    more = len(problems) - count
    return problems if more <= 0 else [*problems[:count], Problem("and", f"{more} more", "")]


class _ShardWriter:
    """A safetensors file written tensor by tensor; its header is known before any data."""

    def __init__(self, path: Path, infos: Sequence[TensorInfo]):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for info in infos:
            size = info.numel * info.dtype.itemsize
            shape = list(info.shape)
            header[info.name] = {
                "dtype": _DTYPE_NAMES[info.dtype],
                "shape": shape,
                "data_offsets": [offset, offset + size],
            }
            offset += size
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # tensors start on an 8-byte boundary
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(encoded)) + encoded)

    def append(self, tensor: torch.Tensor) -> None:
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def write_like(model: Checkpoint, out: Path, produce: Callable[[TensorInfo], torch.Tensor]) -> None:
    """Write a checkpoint with the names, shapes, dtypes and shards of `model`, one tensor at a time.

    `produce` gives each tensor; another shape or dtype than announced is an error. Config, tokenizer and all other
    small files are copied byte for byte. `out` must exist (a stage's partial folder).
    """
    for file in model.files:
        infos = [info for info in model.tensors.values() if info.file == file]
        writer = _ShardWriter(out / file.name, infos)
        for info in infos:
            tensor = produce(info)
            if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
                raise ValueError(f"{info.name}: got {tensor.dtype} {list(tensor.shape)}, announced {info}")
            writer.append(tensor.cpu())
        writer.close()
    copy_companions(model.folder, out)


def companions(folder: Path) -> Iterator[Path]:
    """Everything of a model folder that is not weights: config, tokenizer, chat template, licence."""
    weights = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack)$")
    skipped = {"manifest.json", "README.md"}
    for path in sorted(folder.iterdir()):
        if (
            path.is_file()
            and not weights.match(path.name)
            and not path.name.startswith(".")
            and path.name not in skipped
        ):
            yield path


def copy_companions(source: Path, out: Path) -> None:
    for path in companions(source):
        shutil.copyfile(path, out / path.name)
