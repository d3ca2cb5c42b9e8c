"""Models read in float32: updates of models in bf16 and fp16 without the rounding of θ0 + update to their dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.lora import LoraCheckpoint
from cpift.errors import Problem

if TYPE_CHECKING:
    import torch


class WidenedCheckpoint(Checkpoint):
    """A model with every floating tensor in float32, converted slice by slice: the same values."""

    def __init__(self, inner: Checkpoint):
        self.inner, self.folder, self.config = inner, inner.folder, inner.config
        self.ties, self.is_apart, self._maps = inner.ties, inner.is_apart, {}
        self.tensors = {
            name: replace(info, kind="F32") if info.floating else info for name, info in inner.tensors.items()
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.inner,)

    def apart(self) -> Checkpoint:
        return WidenedCheckpoint(self.inner.apart())

    def require_unchanged(self) -> None:
        self.inner.require_unchanged()

    def unequal_copies(self) -> Iterator[Problem]:
        return self.inner.unequal_copies()

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop-1, float32 where they are floats."""
        return self.inner.slice(name, start, stop).to(self.tensors[name].dtype)

    def gather(self, name: str, starts: np.ndarray, length: int) -> torch.Tensor:
        return self.inner.gather(name, starts, length)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        self.inner.prefetch(name, start, stop)

    def release(self, name: str, start: int, stop: int) -> None:
        self.inner.release(name, start, stop)


def in_float32(model: Checkpoint, base: Checkpoint) -> Checkpoint:
    """A model in float32; an adapter is added to `base`, which is θ0 widened."""
    if isinstance(model, LoraCheckpoint):
        return LoraCheckpoint(model.folder, base)
    return WidenedCheckpoint(model)
