"""Checked memory: every access must lie inside one mapped buffer and be aligned to its size."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tests.ptx.parser import PtxError

PAGE = 1 << 16
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Buffer(Protocol):
    """Bytes addressed from 0."""

    size: int

    def load(self, offsets: NDArray[np.uint64], width: int) -> NDArray[Any]: ...

    def store(self, offsets: NDArray[np.uint64], values: NDArray[Any]) -> None: ...


class Dense:
    """A buffer over existing bytes."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data, self.size = data, data.nbytes
        self._views = {w: data[: data.nbytes // w * w].view(t) for w, t in _UNSIGNED.items()}

    def load(self, offsets: NDArray[np.uint64], width: int) -> NDArray[Any]:
        found: NDArray[Any] = self._views[width][offsets // np.uint64(width)]
        return found

    def store(self, offsets: NDArray[np.uint64], values: NDArray[Any]) -> None:
        width = values.dtype.itemsize
        self._views[width][offsets // np.uint64(width)] = values


class Sparse:
    """A buffer of any size that keeps the touched pages only; untouched bytes are 0."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pages: dict[int, Dense] = {}

    def _page(self, number: int) -> Dense:
        return self.pages.setdefault(number, Dense(np.zeros(PAGE, np.uint8)))

    def load(self, offsets: NDArray[np.uint64], width: int) -> NDArray[Any]:
        values = np.empty(len(offsets), _UNSIGNED[width])
        for number in np.unique(offsets // np.uint64(PAGE)):
            here = offsets // np.uint64(PAGE) == number
            values[here] = self._page(int(number)).load(offsets[here] % np.uint64(PAGE), width)
        return values

    def store(self, offsets: NDArray[np.uint64], values: NDArray[Any]) -> None:
        for number in np.unique(offsets // np.uint64(PAGE)):
            here = offsets // np.uint64(PAGE) == number
            self._page(int(number)).store(offsets[here] % np.uint64(PAGE), values[here])


@dataclass
class Memory:
    """An address space. Every buffer has its own window, with nothing mapped between two windows.

    Windows lie above every address of this process, so a buffer may also keep the address that it has here, as kernels
    find it in tables. Two of these may be neighbours; an access past one's end can then reach the next.
    """

    name: str
    window: int = 1 << 44
    first: int = 1 << 54
    starts: list[int] = field(default_factory=list)  # in order
    buffers: list[Buffer] = field(default_factory=list)

    def map(self, buffer: Buffer, at: int | None = None) -> int:
        """The address of the buffer's first byte."""
        start = self.first + len(self.buffers) * self.window if at is None else at
        place = bisect(self.starts, start)
        self.starts.insert(place, start)
        self.buffers.insert(place, buffer)
        return start

    def load(self, addresses: NDArray[np.uint64], width: int) -> NDArray[Any]:
        """`width` bytes from each address, as unsigned integers."""
        values = np.empty(len(addresses), _UNSIGNED[width])
        for buffer, here, offsets in self._resolve(addresses, width):
            values[here] = buffer.load(offsets, width)
        return values

    def store(self, addresses: NDArray[np.uint64], values: NDArray[Any]) -> None:
        """One value to each address; of two values to one address the later thread's stays."""
        for buffer, here, offsets in self._resolve(addresses, values.dtype.itemsize):
            buffer.store(offsets, values[here])

    def _resolve(
        self, addresses: NDArray[np.uint64], width: int
    ) -> Iterator[tuple[Buffer, NDArray[np.bool_], NDArray[np.uint64]]]:
        if misaligned := addresses[addresses % np.uint64(width) != 0].tolist():
            raise PtxError(f"{self.name}: misaligned access of {width} bytes at {misaligned[0]:#x}")
        starts = np.array(self.starts, np.uint64)
        places = np.searchsorted(starts, addresses, side="right") - 1
        for index in np.unique(places).tolist():
            here = places == index
            start, size = (self.starts[index], self.buffers[index].size) if index >= 0 else (0, 0)
            offsets = addresses[here] - np.uint64(start)
            if int(offsets.max()) + width > size:
                raise PtxError(
                    f"{self.name}: access of {width} bytes out of bounds at offset {int(offsets.max())} "
                    f"of buffer {index} ({size} bytes)"
                )
            yield self.buffers[index], here, offsets
