"""What was written is read back from the disk while more is written, and compared byte for byte."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import numpy as np

_BLOCKS = 3  # that are being filled, or written and not yet compared
_READERS = 2  # reads at once: a disk answers one after another more slowly
_CHUNK = 1 << 22


class ReadBack:
    """Blocks of a file that went past the page cache, read the same way: what is compared comes from the disk.

    A block is kept until it was compared, so that no second hash is needed."""

    def __init__(self, path: Path, nbytes: int):
        """nbytes: of a block. Raises OSError or AttributeError where files cannot be read past the page cache."""
        self._file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self._free: SimpleQueue[mmap.mmap] = SimpleQueue()
        self._rooms: SimpleQueue[mmap.mmap] = SimpleQueue()
        for blocks, count in ((self._free, _BLOCKS), (self._rooms, _READERS)):
            for _ in range(count):
                blocks.put(mmap.mmap(-1, nbytes))  # starts at a page, as direct reading and writing ask
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="cpift-read-back")
        self._pending: deque[Future[None]] = deque()

    def block(self) -> mmap.mmap:
        """A block to be filled, written and given to `compare`; waits until one has been compared.

        Raises OSError where the disk gave back something else."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        return self._free.get()

    def compare(self, block: mmap.mmap, at: int) -> None:
        """Compare a block that was written at byte `at`, some time before `finish` returns."""
        self._pending.append(self._readers.submit(self._compare, block, at))

    def _compare(self, block: mmap.mmap, at: int) -> None:
        room = self._rooms.get()
        try:
            if os.preadv(self._file, [room], at) != len(block) or not np.array_equal(_words(room), _words(block)):
                raise lost(at, at + len(block))
        finally:
            self._rooms.put(room)
            self._free.put(block)

    def finish(self) -> None:
        """Wait until everything was compared. Raises OSError where the disk gave back something else."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Compare no more."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        os.close(self._file)


def lost(start: int, stop: int) -> OSError:
    """The error of bytes that are not those that were written."""
    return OSError(errno.EIO, f"bytes {start} to {stop - 1} are read back as others than were written")


def same_bytes(descriptor: int, data: memoryview, at: int) -> bool:
    """Whether these bytes lie at a place of a file that is on the disk."""
    _forget(descriptor)
    return os.pread(descriptor, len(data), at) == data


def sha256_of(descriptor: int) -> str:
    """sha256 (hex) of a file that is on the disk."""
    _forget(descriptor)
    state, at = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, _CHUNK, at):
        state.update(chunk)
        at += len(chunk)
    return state.hexdigest()


def _forget(descriptor: int) -> None:
    """Have the page cache give up what is on the disk, so that this is what is read."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _words(block: mmap.mmap) -> np.ndarray:
    return np.frombuffer(block, np.uint64)
