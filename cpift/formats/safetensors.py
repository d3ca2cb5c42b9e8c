"""The safetensors format: a file's header, its tensors as views of a memory map, and a file written in any order.

A file is 8 bytes (the header's length, little-endian), a JSON header, and the tensors' bytes without gaps.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import struct
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.disk.direct_io import DirectStream, write_at
from cpift.disk.files import file_identity
from cpift.disk.read_back import lost, sha256_of
from cpift.errors import CpiftError, naming
from cpift.untrusted.json import TENSOR_HEADER, UnreadableError, opened, parse_json, shown

if TYPE_CHECKING:
    import torch

# The format's names of dtypes, and torch's; whoever only reads a config's folders does not wait for torch.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_NAMES = {name: kind for kind, name in DTYPES.items()}
_ITEMSIZE = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}  # bytes


_SETTLED = 2 * 10**9  # ns after its last change, from which on a further one shows in a file's times
_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}  # the file system cannot reserve room


class FormatError(CpiftError, ValueError):
    """A file that is no whole safetensors file. What it says goes on from the file's name."""


class DtypeError(FormatError):
    """A file with a tensor of a dtype that is not computed with; `dtype` as the header has it."""

    def __init__(self, name: str, dtype: Any):
        self.dtype = str(dtype)
        super().__init__(f"{shown(name)} has dtype {shown(dtype)}: convert the checkpoint to bf16, fp16 or fp32")


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor; `start`: where its bytes begin in the file."""

    name: str
    shape: tuple[int, ...]
    kind: str  # the format's name of its dtype, a key of DTYPES
    file: Path
    start: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return _dtype(self.kind)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return _ITEMSIZE[self.kind]

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    @property
    def floating(self) -> bool:
        return "F" in self.kind


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of a file, in the header's order. Nothing but the header is read, and once while the file stays as it
    is.

    Raises FormatError for anything but a whole file: no header, a dtype that is not known here, a tensor named twice,
    bytes that are missing, left over or shared between tensors. OSError if it cannot be opened.
    """
    identity = file_identity(path)
    settled = time.time_ns() - identity[-1] > _SETTLED
    return list(_header(path, identity) if settled else _header.__wrapped__(path, identity))


@lru_cache(maxsize=256)
def _header(path: Path, identity: tuple[int, ...]) -> tuple[TensorInfo, ...]:
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else TENSOR_HEADER.size + 1
            if length > min(TENSOR_HEADER.size, size - 8):
                raise FormatError(f"no header fits its {size} bytes")
            header = parse_json(file.read(length), TENSOR_HEADER)
    except UnreadableError as error:
        raise FormatError(f"its header {error}" if error.subject == "" else error.what) from error
    if not isinstance(header, dict):
        raise FormatError(f"its header is {shown(header)}, not an object")
    _check_metadata(header.pop("__metadata__", None))
    infos = [_info(path, name, entry, 8 + length) for name, entry in header.items()]
    _check_layout(infos, 8 + length, size)
    return tuple(infos)


def read_tensors_of(path: Path, kind: str) -> dict[str, TensorInfo]:
    """The tensors by name of a file that cpift wrote, all of one `kind` (`I32`).

    Raises FormatError naming it, and OSError.
    """
    remedy = "delete its folder, and the same command makes it again"
    try:
        infos = {info.name: info for info in read_header(path)}
    except FormatError as error:
        raise FormatError(f"{path}: {error} → {remedy}") from error
    if other := next((info for info in infos.values() if info.kind != kind), None):
        raise FormatError(f"{path}: {shown(other.name)} is {other.dtype}, not torch.{DTYPES[kind]} → {remedy}")
    return infos


def dtype_name(dtype: torch.dtype) -> str:
    """As headers have it: `BF16`."""
    return _NAMES[str(dtype).removeprefix("torch.")]


@cache
def _dtype(name: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, DTYPES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def _check_metadata(metadata: Any) -> None:
    fits = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not fits:
        raise FormatError(f"its metadata is {shown(metadata)}, not texts by name")


def _info(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise FormatError(f"{shown(name)} is {shown(entry)}, not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise DtypeError(name, dtype)
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise FormatError(f"{shown(name)} has shape {shown(shape)} and offsets {shown(offsets)}, not whole numbers")
    info = TensorInfo(name, tuple(shape), dtype, path, data + offsets[0])
    if offsets[1] - offsets[0] != info.nbytes or math.prod(max(size, 1) for size in shape) >= 1 << 60:
        raise FormatError(
            f"{shown(name)} has {offsets[1] - offsets[0]} bytes, its shape {shown(shape)} needs {info.nbytes}"
        )
    return info


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_layout(infos: Iterable[TensorInfo], data: int, size: int) -> None:
    end = data
    for info in sorted(infos, key=lambda info: (info.start, info.nbytes)):
        if info.start != end:
            raise FormatError(f"{info.name} begins at byte {info.start}, the tensor before it ends at {end}")
        end += info.nbytes
    if end != size:
        raise FormatError(f"it has {size} bytes, its header describes {end}")


def laid_out(path: Path, infos: Sequence[TensorInfo]) -> tuple[bytes, list[TensorInfo]]:
    """The header of a file that holds these tensors in this order, and where each of them lies in it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in infos:
        header[info.name] = {
            "dtype": info.kind,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start on an 8-byte boundary
    starts = _running(8 + len(encoded), [info.nbytes for info in infos])
    placed = [TensorInfo(i.name, i.shape, i.kind, path, start) for i, start in zip(infos, starts, strict=True)]
    return struct.pack("<Q", len(encoded)) + encoded, placed


def _running(start: int, sizes: Iterable[int]) -> Iterator[int]:
    for size in sizes:
        yield start
        start += size


class FileWriter:
    """A safetensors file of known tensors, whose elements may be written in any order and from several threads.

    Every OSError names the file, so that it is told apart from one of a file that is read meanwhile.

    in_order: they come in the order of the file, from one thread at a time, and the file is large: what is written
    bypasses the page cache, and the file's sha256 is known at its end if `absorb` is told of the same elements.
    read_back: `flush` then reads all of such a file back from the disk and compares it.
    """

    def __init__(self, path: Path, infos: Sequence[TensorInfo], in_order: bool = False, read_back: bool = False):
        header, placed = laid_out(path, infos)
        self.path = path
        self.tensors = {info.name: info for info in placed}
        self.nbytes = len(header) + sum(info.nbytes for info in infos)
        self._read_back = read_back
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            with naming(path, self.nbytes):
                _reserve(self._descriptor, self.nbytes)
                self._stream = DirectStream(path, self._descriptor, read_back) if in_order else None
                self._hash, self._hashed = hashlib.sha256(header), len(header)
                self._put(header, 0)
        except OSError:
            os.close(self._descriptor)
            path.unlink()
            raise

    @classmethod
    def attach(cls, path: Path) -> FileWriter:
        """A file that another process has created and that several write to. Closed when it is forgotten."""
        file = cls.__new__(cls)
        file.path, file.tensors, file.nbytes = path, {i.name: i for i in read_header(path)}, path.stat().st_size
        file._descriptor, file._stream, file._read_back = os.open(path, os.O_RDWR), None, False
        weakref.finalize(file, os.close, file._descriptor)
        return file

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Write elements start.. of a tensor."""
        self._put(raw_bytes(values), self._place(name, start))

    def _place(self, name: str, start: int) -> int:
        info = self.tensors[name]
        return info.start + start * info.itemsize

    def _put(self, data: Any, at: int) -> None:
        if self._stream is not None and at != self._stream.position:
            raise ValueError(f"{self.path}: byte {at} was written after byte {self._stream.position}, not in order")
        with naming(self.path, self.nbytes):
            if self._stream is None:
                write_at(self._descriptor, data, at)
            else:
                self._stream.write(data)

    def absorb(self, name: str, start: int, values: torch.Tensor) -> None:
        """Take elements start.. of a tensor into the file's sha256; one after another in the order of the file."""
        if self._place(name, start) == self._hashed:
            data = raw_bytes(values)
            self._hash.update(data)
            self._hashed += len(data)

    @property
    def sha256(self) -> str | None:
        """Of the whole file (hex), None unless `absorb` was told of all of it."""
        return self._hash.hexdigest() if self._hashed == self.nbytes else None

    def flush(self) -> None:
        """Wait until what was written so far is on the disk; of a file written in order: until all is.

        Raises OSError where that is read back as something else than was written."""
        with naming(self.path, self.nbytes):
            if self._stream is not None:
                self._stream.finish()
            os.fsync(self._descriptor)
            in_parts = self._stream is None or not self._read_back or self._stream.is_on_disk()
            if not in_parts and sha256_of(self._descriptor) != self.sha256:
                raise lost(0, self.nbytes)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        os.close(self._descriptor)


def _reserve(descriptor: int, size: int) -> None:
    """Give the file its length now: a full disk is then met before the work, not after it."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_FALLOCATE:
            raise
        os.ftruncate(descriptor, size)


def raw_bytes(values: torch.Tensor) -> Any:
    """The bytes of a contiguous CPU tensor, without a copy."""
    import torch

    return values.reshape(-1).view(torch.uint8).numpy().data
