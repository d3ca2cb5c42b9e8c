"""An object store (s3://, gs://) in place of a folder that all nodes see: files put and got whole, or read in parts.

An object is there only when its upload has ended, so nothing needs a temporary name. An upload that is cut short may
still leave an object: who wants to know whether one is whole keeps its size and sha256 in another, put after it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cpift.errors import StageError, first_line
from cpift.untrusted.json import RECORD, parse_json

_BLOCK = 1 << 24  # bytes moved at once


@dataclass(frozen=True)
class ObjectStore:
    """The objects below a URI, by name. Every failure of the store is a StageError that names the object."""

    place: str  # s3://bucket/folder?endpoint_override=..., gs://bucket/folder

    def folder(self, name: str) -> ObjectStore:
        """What lies below `name` there."""
        place, mark, options = self.place.partition("?")
        return ObjectStore(f"{place.rstrip('/')}/{name}{mark}{options}")

    def size(self, name: str) -> int | None:
        """Bytes of an object, None if it is not there."""
        with self._opened_at(name) as (filesystem, path):
            info = filesystem.get_file_info(path)
            return info.size if info.is_file else None

    def put(self, file: Path, name: str) -> None:
        """Upload a file. Raises StageError if the store then has not as many bytes."""
        with file.open("rb") as source, self._opened_at(name) as (filesystem, path):
            if filesystem.type_name == "local":  # file://, for trying things out; a store has no folders
                filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            with filesystem.open_output_stream(path) as target:
                while block := source.read(_BLOCK):
                    target.write(block)
        if self.size(name) != file.stat().st_size:
            raise StageError(f"{self._uri(name)}: has {self.size(name)} bytes, {file} has {file.stat().st_size}")

    def get(self, name: str, file: Path, sha256: str) -> None:
        """Download an object. Raises StageError if its bytes have another hash; `file` is then not there."""
        partial, state = file.with_name(f".{file.name}.{os.getpid()}.partial"), hashlib.sha256()
        with partial.open("wb") as target:
            for block in self._blocks(name):
                state.update(block)
                target.write(block)
            target.flush()
            os.fsync(target.fileno())
        if state.hexdigest() != sha256:
            partial.unlink()
            raise StageError(f"{self._uri(name)}: its bytes are not those that were uploaded → delete it and run again")
        os.replace(partial, file)

    def read(self, name: str, start: int, count: int) -> bytes:
        """`count` bytes of an object from byte `start` on."""
        with self._opened_at(name):
            content: bytes = _opened_file(self.place, name).read_at(count, start)
        if len(content) != count:
            raise StageError(f"{self._uri(name)}: ends before byte {start + count} → delete it and run again")
        return content

    def read_json(self, name: str) -> Any | None:
        """The content of an object, None if it is not there."""
        return None if self.size(name) is None else parse_json(b"".join(self._blocks(name)), RECORD)

    def _blocks(self, name: str) -> Iterator[bytes]:
        with self._opened_at(name) as (filesystem, path):
            source = filesystem.open_input_stream(path)
        with source:
            while True:
                with self._opened_at(name):
                    block: bytes = source.read(_BLOCK)
                if not block:
                    return
                yield block

    def _uri(self, name: str) -> str:
        return self.folder(name).place.partition("?")[0]

    @contextmanager
    def _opened_at(self, name: str) -> Iterator[tuple[Any, str]]:
        """The file system and the object's path in it."""
        try:
            filesystem, path = _opened(self.place)
            yield filesystem, f"{path}/{name}"
        except (OSError, ValueError) as error:
            remedy = "check the URI, and that every node has credentials for it (AWS_ENDPOINT_URL for another store)"
            raise StageError(f"{self._uri(name)}: {first_line(error)} → {remedy}") from error


@lru_cache(maxsize=8)
def _opened(place: str) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem

    filesystem, path = FileSystem.from_uri(place)
    return filesystem, path.rstrip("/")


@lru_cache(maxsize=32)
def _opened_file(place: str, name: str) -> Any:
    filesystem, path = _opened(place)
    return filesystem.open_input_file(f"{path}/{name}")
