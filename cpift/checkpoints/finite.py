"""Whether tensors are finite: NaN or Inf in a checkpoint is an error that names the tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cpift.checkpoints.checkpoint import Checkpoint, first_problems
from cpift.errors import CheckpointError, Problem

if TYPE_CHECKING:
    import torch

_SCAN = 1 << 22  # elements looked at together


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
    """Whether every element is finite: one pass and no memory, unlike `isfinite().all()`; a NaN is both extremes."""
    import torch

    return values.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(values))
