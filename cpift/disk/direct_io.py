"""Large files written past the page cache, where the file system allows it.

What a merge writes is not read again soon. Through the page cache it would push out the checkpoints that are being
read, and on a machine with little free memory most of the time goes into finding pages for it.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from cpift.disk.read_back import ReadBack, lost, same_bytes

Buffer = Any  # anything that numpy and memoryview take; typing has a name for it from Python 3.12 on
_BLOCK = 1 << 22  # bytes written at once, a multiple of every disk's sectors
_SYNC_BYTES = 1 << 28  # written bytes after which the disk is made to follow, where they do go through the page cache


class DirectStream:
    """The bytes of one file in order, from its start on; whole blocks go straight to the disk.

    descriptor: the file, open for ordinary writing; it takes the last bytes, and all of them where the file system
    refuses direct writing. read_back: blocks are read back while others are written, for `is_on_disk`.
    """

    def __init__(self, path: Path, descriptor: int, read_back: bool = False):
        self._plain, self._direct = descriptor, _open_direct(path)
        self._back = _open_back(path) if read_back and self._direct is not None else None
        self._begin_block(self._back.block() if self._back else mmap.mmap(-1, _BLOCK))
        self._start = self._held = 0  # of the block in the file; bytes in it
        self._last = (0, 0)  # where the block lies that was written last
        self._unsynced = 0

    def _begin_block(self, block: mmap.mmap) -> None:
        self._block = block  # starts at a page, as direct writing asks
        self._bytes = np.frombuffer(block, np.uint8)

    @property
    def position(self) -> int:
        """Bytes that were given so far."""
        return self._start + self._held

    def write(self, data: Buffer) -> None:
        """Append bytes. Raises OSError where the disk is full."""
        source = np.frombuffer(data, np.uint8)
        while len(source):
            taken = min(len(source), _BLOCK - self._held)
            self._bytes[self._held : self._held + taken] = source[:taken]
            self._held += taken
            source = source[taken:]
            if self._held == _BLOCK:
                self._put()

    def _put(self) -> None:
        """Write what the block holds."""
        block = memoryview(self._block)[: self._held]
        written = self._put_directly(block) if self._direct is not None and self._held == _BLOCK else 0
        self._put_plainly(block[written:], self._start + written)
        self._last = (self._start, self.position)
        self._start, self._held = self.position, 0
        if self._direct is None:
            self._end_back()  # nothing of it would come from the disk
        elif self._back is not None and len(block) == _BLOCK:
            self._back.compare(self._block, self._last[0])
            self._begin_block(self._back.block())

    def _put_directly(self, block: memoryview) -> int:
        assert self._direct is not None
        try:
            return os.pwrite(self._direct, block, self._start)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            os.close(self._direct)  # opened, and yet not possible on this file system or disk
            self._direct = None
            return 0

    def _put_plainly(self, block: memoryview, at: int) -> None:
        write_at(self._plain, block, at)
        self._unsynced += len(block)
        if self._unsynced >= _SYNC_BYTES:
            os.fsync(self._plain)
            self._unsynced = 0

    def finish(self) -> None:
        """Write what is left. All is on the disk only after an fsync of the descriptor."""
        self._put()
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def is_on_disk(self) -> bool:
        """Whether all was read back, after `finish` and an fsync; False where the file system has no direct reading.

        Raises OSError where the disk gave back something else than was written."""
        if self._back is None:
            return False
        self._back.finish()
        start, stop = self._last
        if not same_bytes(self._plain, memoryview(self._block)[: stop - start], start):
            raise lost(start, stop)
        return True

    def close(self) -> None:
        """Let go of the file; what was not finished is lost."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None
        self._end_back()

    def _end_back(self) -> None:
        if self._back is not None:
            self._back.close()
            self._back = None


def _open_direct(path: Path) -> int | None:
    """A descriptor that bypasses the page cache, None where there is no such thing."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except (AttributeError, OSError):
        return None


def _open_back(path: Path) -> ReadBack | None:
    try:
        return ReadBack(path, _BLOCK)
    except (AttributeError, OSError):
        return None


def write_at(descriptor: int, data: Buffer, offset: int) -> None:
    """Write all of `data` at a place of a file."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
