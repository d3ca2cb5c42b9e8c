"""The rate at which this machine's threads read memory: the ceiling of every kernel that only reads."""

from __future__ import annotations

import numpy as np
import torch
from cpift_kernels.cpu.compiled import in_threads, kernel
from torch import Tensor

BLOCK = 1 << 22  # bytes of one call


def read_all(tensors: list[Tensor]) -> int:
    """Read every 8 bytes of the tensors, on torch.get_num_threads() threads; their OR."""
    views = [tensor.view(torch.uint8).numpy() for tensor in tensors]
    views = [view[: view.size // 8 * 8].view(np.int64) for view in views]
    step = BLOCK // 8
    parts = [view[start : start + step] for view in views for start in range(0, view.size, step)]
    return int(np.bitwise_or.reduce([0, *in_threads(_read, parts)]))


@kernel
def _read(values):  # type: ignore[no-untyped-def]
    """The OR of an int64 array, in one vector loop."""
    total = 0
    for value in values:
        total |= value
    return total
