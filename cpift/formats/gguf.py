"""The head of a GGUF file, read before a library trusts it: what it says of itself has to fit the file.

A file is the magic, a version, two counts, metadata by name, tensors by name (shape, type, offset), and their bytes,
aligned: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from cpift.untrusted.json import UnreadableError, opened, shown

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_NAME, _DIMENSIONS, _LEVELS = 1 << 16, 4, 4
_KEPT = 64  # elements of an array of metadata that are of interest: sizes by layer


@dataclass(frozen=True)
class GgufHead:
    """metadata: scalars, texts, and short arrays by name; shapes: of each tensor, by name."""

    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def model(self) -> dict[str, Any]:
        """The metadata of its architecture, by their names without it: `block_count` and so on."""
        prefix = f"{self.metadata.get('general.architecture')}."
        return {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}


def read_gguf(path: Path) -> GgufHead:
    """The head of a file. Raises UnreadableError naming it for anything but a whole file, OSError as `open` does."""
    state = path.stat()
    return _head(path, state.st_ino, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4)
def _head(path: Path, *state: int) -> GgufHead:
    try:
        with opened(path) as file:
            return _Reader(file).head()
    except UnreadableError as error:
        raise UnreadableError(error.what, "download it again", str(path)) from None


class _Reader:
    def __init__(self, file: BinaryIO):
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._at = 0

    def head(self) -> GgufHead:
        if self._read(4) != b"GGUF":
            raise UnreadableError("does not begin as a GGUF file does")
        version = self._number("I")
        if version not in (2, 3):
            raise UnreadableError(f"has version {version} of the format, or another byte order; 2 and 3 can be read")
        tensors, fields = self._number("Q"), self._number("Q")
        # The least that a tensor and a field take bounds their number.
        if tensors * 32 + fields * 13 > self._size:
            raise UnreadableError(f"states {tensors:,} tensors and {fields:,} fields, more than fit {self._size} bytes")
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            name = self._text("the name of a field", _LONGEST_NAME)
            if name in metadata:
                raise UnreadableError(f"has the field {shown(name)} twice")
            metadata[name] = self._value(self._number("I"), name, 0)
        placed = [self._tensor() for _ in range(tensors)]
        self._check_layout(placed, metadata.get("general.alignment", 32))
        return GgufHead(metadata, {name: shape for name, shape, _, _ in placed})

    def _read(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self._size - self._at else b""
        if len(data) != count:
            raise UnreadableError(f"ends within its head: byte {self._at:,} of {self._size:,}")
        self._at += count
        return data

    def _number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self._read(struct.calcsize(f"<{kind}")))[0]

    def _text(self, what: str, longest: int) -> str:
        length = self._number("Q")
        if length > longest:
            raise UnreadableError(f"has {what} of {length:,} bytes")
        return self._read(length).decode("utf-8", "replace")

    def _value(self, kind: int, name: str, level: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text(f"a text in {shown(name)}", self._size)
        if kind != _ARRAY or level > _LEVELS:
            raise UnreadableError(f"has the field {shown(name)} of kind {kind}, level {level}, which no reader knows")
        kind, count = self._number("I"), self._number("Q")
        if kind in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[kind]}")
            data = self._read(count * width) if count * width <= self._size else self._read(self._size + 1)
            return list(struct.unpack(f"<{min(count, _KEPT)}{_SCALARS[kind]}", data[: min(count, _KEPT) * width]))
        if count * 8 > self._size:
            raise UnreadableError(f"has {count:,} values in {shown(name)}, more than fit {self._size} bytes")
        for _ in range(count):
            if kind == _STRING:  # a vocabulary: the texts are of no interest
                self._read(int.from_bytes(self._read(8), "little"))
            else:
                self._value(kind, name, level + 1)
        return None

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape as the file has it, bytes and offset."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._text("the name of a tensor", _LONGEST_NAME)
        dimensions = self._number("I")
        if not 1 <= dimensions <= _DIMENSIONS:
            raise UnreadableError(f"has {dimensions} dimensions in {shown(name)}")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        kind, offset = self._number("I"), self._number("Q")
        if kind not in {int(known) for known in GGMLQuantizationType}:
            raise UnreadableError(f"has {shown(name)} of type {kind}, which the installed gguf does not know")
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if min(shape) < 1 or shape[0] % block or math.prod(shape) >= 1 << 60:
            raise UnreadableError(f"has the shape {list(shape)} in {shown(name)}, in blocks of {block}")
        return name, shape, math.prod(shape) // block * width, offset

    def _check_layout(self, placed: list[tuple[str, tuple[int, ...], int, int]], alignment: Any) -> None:
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise UnreadableError(f"has the alignment {shown(alignment)}")
        start = -(-self._at // alignment) * alignment
        seen: set[str] = set()
        end = 0
        for name, _, count, offset in sorted(placed, key=lambda tensor: tensor[3]):
            if name in seen:
                raise UnreadableError(f"has the tensor {shown(name)} twice")
            if offset < end or offset % alignment:
                raise UnreadableError(f"has {shown(name)} at byte {offset:,} of its data, where none can begin")
            if start + offset + count > self._size:
                raise UnreadableError(f"ends at byte {self._size:,}, within {shown(name)}")
            seen.add(name)
            end = offset + count
