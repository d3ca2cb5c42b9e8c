"""Held elements on the GPU: a launch a tensor, queued without waiting for any."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..held import HeldElements


def hold_masked(values: Sequence[Tensor], words: Sequence[Tensor]) -> HeldElements:
    """See `cpift_kernels.hold_masked`."""
    return HeldElements(values, words, "triton")
