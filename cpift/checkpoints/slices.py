"""Models walked in pieces: slices of one tensor.

Memory that counts is what this process allocates. Mapped pages of checkpoints are the system's cache: they are read
ahead, given back after use, and dropped by the system when somebody needs the room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.formats.safetensors import TensorInfo

DEFAULT_BUDGET = 1 << 30  # bytes
SLICE = 1 << 22  # elements of one tensor that are merged together; part of what fixes the bits of a sum
_ROWS = 32  # rows a slice holds a multiple of, so that its mask starts with a whole word
_AHEAD = 2  # slices that are read ahead

Piece = tuple[int, int]  # elements [start, stop) of a tensor, row-major


def pieces(numel: int, width: int = 0) -> list[Piece]:
    """A tensor cut into slices of SLICE elements or, given the width of a row, of about as many in whole rows."""
    step = SLICE if not width else max(SLICE // width // _ROWS, 1) * _ROWS * width
    return [(start, min(start + step, numel)) for start in range(0, numel, step)]


def sweep(models: Sequence[Checkpoint], info: TensorInfo, parts: Sequence[Piece]) -> Iterator[Piece]:
    """The pieces of a tensor in order; the next ones are read ahead, and what has been used is given back."""
    for number, (start, stop) in enumerate(parts):
        for first, last in parts[number + _AHEAD : number + _AHEAD + 1] if number else parts[: _AHEAD + 1]:
            for model in models:
                model.prefetch(info.name, first, last)
        yield start, stop
        for model in models:
            model.release(info.name, start, stop)
