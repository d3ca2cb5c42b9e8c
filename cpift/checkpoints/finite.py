"""Whether tensors are finite: NaN or Inf in a checkpoint is an error that names the tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpift.checkpoints.checkpoint import Checkpoint, first_problems
from cpift.errors import CheckpointError, Problem
from cpift.formats.safetensors import raw_bytes

if TYPE_CHECKING:
    import torch

_SCAN = 1 << 22  # elements looked at together
_RUN = 1 << 18  # bytes of these that stay in a processor's own cache


def require_finite(label: str, checkpoint: Checkpoint, names: Sequence[str] | None = None) -> None:
    """Raise CheckpointError naming the tensors that hold NaN or Inf."""
    bad = [
        Problem(name, "holds NaN or Inf", "its training diverged: use an earlier checkpoint or a lower learning rate")
        for name in names or checkpoint.names
        if checkpoint.tensors[name].floating and not is_finite(checkpoint, name)
    ]
    if bad:
        raise CheckpointError(f"{label} ({checkpoint.folder})", first_problems(bad, 20))


def is_finite(checkpoint: Checkpoint, name: str) -> bool:
    """Whether every element of a tensor is finite; read in slices."""
    numel = checkpoint.tensors[name].numel
    for start in range(0, numel, _SCAN):
        stop = min(start + _SCAN, numel)
        if not all_finite(checkpoint.slice(name, start, stop)):
            return False
        checkpoint.release(name, start, stop)
    return True


def all_finite(values: torch.Tensor) -> bool:
    """Whether every element is finite: one pass and no memory, unlike `isfinite().all()`.

    On the CPU by the bits of short runs: this looks on beside a merge, and torch would have threads of its own do it,
    which wait for their next work by turning round and so take the cores from the merge."""
    import torch

    if values.numel() == 0:
        return True
    if values.element_size() == 1:  # of such numbers not all kinds have an Inf
        values = values.float()
    if values.device.type != "cpu":
        return all(bool(extreme.isfinite()) for extreme in torch.aminmax(values))  # a NaN is both
    bits, infinity = bits_of(values), bits_of(torch.tensor(torch.inf, dtype=values.dtype))[0]
    magnitude = bits.dtype.type(2 ** (8 * bits.itemsize - 1) - 1)
    run = _RUN // bits.itemsize
    return all((bits[start : start + run] & magnitude).max() < infinity for start in range(0, len(bits), run))


def bits_of(values: torch.Tensor) -> np.ndarray:
    """The bits of every element as an unsigned number of its size, [n], on the CPU: of floating-point numbers without
    the sign, NaN and Inf are those from Inf's on."""
    return np.asarray(raw_bytes(values.contiguous())).view(f"u{values.element_size()}")
