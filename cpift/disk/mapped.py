"""Files as memory: nothing is copied, and one that changes while it is read is refused."""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cpift.errors import ChangedInput, Problem

if TYPE_CHECKING:
    import torch

# A private map of a file larger than the memory must not be counted as if every page would be written.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def file_version(path: Path) -> tuple[int, ...]:
    """What tells a file from another, and from itself before it was written to: device, inode, size and time."""
    return _identity(path.stat())


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class MappedFile:
    """A file's bytes as tensors that share the page cache: nothing is copied, and pages can be given back."""

    def __init__(self, path: Path, expected: tuple[int, ...] | None = None):
        """`expected`: the identity of the file when its header was read. Raises ChangedInput if this is another."""
        with path.open("rb") as file:
            self._path, self._descriptor = path, os.dup(file.fileno())
            weakref.finalize(self, os.close, self._descriptor)
            self._identity = _identity(os.fstat(self._descriptor))
            if expected not in (None, self._identity):
                raise self._changed("is another file than the one whose header was read")
            self._map = mmap.mmap(
                file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )  # writable, for torch warns of memory that is not; what would be written stays private

    def view(self, start: int, dtype: torch.dtype, count: int) -> torch.Tensor:
        """`count` elements from byte `start` on. For reading only."""
        import torch

        if count == 0:
            return torch.empty(0, dtype=dtype)
        if _identity(os.fstat(self._descriptor)) != self._identity:
            raise self._changed("was written to or cut short while it was read")
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)

    def require_unchanged(self) -> None:
        """Raise ChangedInput unless the file that was opened is still there and as it was."""
        try:
            now = _identity(self._path.stat())
        except FileNotFoundError:
            raise self._changed("was deleted while it was read") from None
        if now != self._identity:
            raise self._changed("was replaced or written to while it was read")

    def _changed(self, how: str) -> ChangedInput:
        remedy = "put it back; the same command goes on with what it has finished"
        return ChangedInput("what is made of it", [Problem(str(self._path), how, remedy)], resumable=True)

    def prefetch(self, start: int, stop: int) -> None:
        """Ask the system to read bytes start..stop-1 from the disk, without waiting for them."""
        self._advise(mmap.MADV_WILLNEED, start // mmap.PAGESIZE * mmap.PAGESIZE, stop)

    def release(self, start: int, stop: int) -> None:
        """Unmap whole pages of bytes start..stop-1; they stay in the page cache as long as there is room."""
        self._advise(
            mmap.MADV_DONTNEED, -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        )

    def _advise(self, advice: int, start: int, stop: int) -> None:
        if stop > start:
            with suppress(OSError):  # advice only: a file system may not take it
                self._map.madvise(advice, start, stop - start)
