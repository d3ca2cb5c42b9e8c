"""A low-rank update added to values, in threads."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .compiled import in_threads, kernel

RUN = 1 << 18  # elements that one thread computes at a time
TILE = 1 << 11  # columns whose sums stay in the L1 cache while k passes by


def add_low_rank(values: Tensor, left: Tensor, right: Tensor, start: int, scaling: float) -> Tensor:
    """See `cpift_kernels.add_low_rank`."""
    out, factors = torch.empty_like(values), (left.numpy(), right.numpy())

    def compute(first: int) -> None:
        part = slice(first, min(first + RUN, len(values)))
        delta = torch.empty(part.stop - first, dtype=torch.float32)
        _elements(*factors, start + first, delta.numpy())
        out[part] = delta.mul_(scaling).add_(values[part].float()).to(values.dtype)

    in_threads(compute, range(0, len(values), RUN))
    return out


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
