"""Elements of a low-rank product, any run of them, with bits that do not depend on which run is asked for.

    out[j] = Σ_k left[row(j), k] · right[k, column(j)]      fp32: every product rounded, then added, k ascending

A matrix library chooses its order of summation by the shape; a model that is streamed in slices needs one order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .compiled import kernel

TILE = 1 << 11  # columns whose sums stay in the L1 cache while k passes by


def low_rank_elements(
    left: NDArray[np.float32], right: NDArray[np.float32], start: int, out: NDArray[np.float32]
) -> None:
    """Write elements start.. of left [R, K] @ right [K, C], row-major, to out [n]."""
    _elements(left, right, start, out)


@kernel
def _elements(left, right, start, out):  # type: ignore[no-untyped-def]
    width, rank, done = right.shape[1], left.shape[1], 0
    while done < len(out):
        row, first = (start + done) // width, (start + done) % width
        last = min(first + TILE, width, first + len(out) - done)
        sums = out[done : done + last - first]
        sums[:] = np.float32(0)
        for k in range(rank):
            factor, values = left[row, k], right[k, first:last]
            for i in range(last - first):
                sums[i] += factor * values[i]
        done += last - first
