"""Merges of the largest of each task's updates: which these are is found by a pass of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cpift_kernels import unpack_mask

from cpift.config.run import FusionConfig
from cpift.merging.base import FusionInputs, Materials
from cpift.merging.forms import UpdateMerge
from cpift.method.masks import RegionMasks

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self


class TrimmedMerge(UpdateMerge):
    """What is kept of each update is its core region for p = `density`."""

    reads = 1

    def __init__(self, inputs: FusionInputs, config: FusionConfig, trimmed: Path):
        super().__init__(inputs, config)
        self._masks = RegionMasks(trimmed, list(self.tuned))

    @classmethod
    def make(cls, materials: Materials) -> Self:
        return cls(materials.inputs, materials.config, materials.trimmed())

    def kept(self, name: str, start: int, stop: int) -> torch.Tensor:
        """bool [N, stop − start]: the elements that are kept of each task's update."""
        import torch

        words = [self._masks.words(task, name, start, stop) for task in self.tuned]
        return torch.stack([unpack_mask(mask, stop - start) for mask in words])
