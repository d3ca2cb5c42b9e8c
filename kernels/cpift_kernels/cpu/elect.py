"""The election of signs in one pass over the updates, in threads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..elect import NONE
from .compiled import in_threads, kernel

RUN = 1 << 16  # elements that one thread computes at a time
TILE = 1 << 10  # elements whose sums stay in the L1 cache while the tasks pass by


def elect_signs(
    updates: Tensor, weights: Sequence[float], densities: Sequence[float], normalize: bool | None, scale: float
) -> Tensor:
    """See `cpift_kernels.elect_signs`."""
    values, out = updates.contiguous().numpy(), torch.empty(updates.shape[1], dtype=torch.float32)
    exact = np.array([list(weights), list(densities)], np.float64)
    elect = _mean if normalize is None else _weighted

    def compute(start: int) -> None:
        part = slice(start, min(start + RUN, len(out)))
        elect(values, start, exact[0], exact[1], bool(normalize), np.float32(scale), out[part].numpy())

    in_threads(compute, range(0, len(out), RUN))
    return out


@kernel
def _mean(updates, start, weights, densities, divided, scale, out):  # type: ignore[no-untyped-def]
    """`normalize` None; `divided` has no meaning."""
    sums, counts, found = np.empty(TILE), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for first in range(0, len(out), TILE):
        size = min(TILE, len(out) - first)
        for task in range(len(weights)):
            moved, density = updates[task, start + first : start + first + size], densities[task]
            for i in range(size):
                one = np.float64(moved[i]) / density
                sums[i] = one if task == 0 else sums[i] + one
        for task in range(len(weights)):
            moved = updates[task, start + first : start + first + size]
            factor = np.float32(weights[task]) / np.float32(densities[task])
            for i in range(size):
                agrees = np.float32(1) if (moved[i] > 0 if sums[i] >= 0 else moved[i] < 0) else np.float32(0)
                one = moved[i] * factor * agrees
                found[i] = one if task == 0 else found[i] + one
                counts[i] = agrees if task == 0 else counts[i] + agrees
        for i in range(size):
            out[first + i] = found[i] / max(counts[i], np.float32(1)) * scale


@kernel
def _weighted(updates, start, weights, densities, divided, scale, out):  # type: ignore[no-untyped-def]
    """`normalize` true or false, which `divided` is."""
    sums, totals, found = np.empty(TILE), np.empty(TILE), np.empty(TILE)
    for first in range(0, len(out), TILE):
        size = min(TILE, len(out) - first)
        for task in range(len(weights)):
            moved, density, weight = updates[task, start + first : start + first + size], densities[task], weights[task]
            for i in range(size):
                one = np.float64(moved[i]) / density * weight
                sums[i] = one if task == 0 else sums[i] + one
        for task in range(len(weights)):
            moved, density, weight = updates[task, start + first : start + first + size], densities[task], weights[task]
            for i in range(size):
                one = np.float64(moved[i]) / density * weight
                agrees = 1.0 if (one > 0 if sums[i] >= 0 else one < 0) else 0.0
                found[i] = one * agrees if task == 0 else found[i] + one * agrees
                totals[i] = weight * agrees if task == 0 else totals[i] + weight * agrees
        for i in range(size):
            total = totals[i] if divided and not abs(totals[i]) < NONE else 1.0
            out[first + i] = np.float32(found[i] / total) * scale
