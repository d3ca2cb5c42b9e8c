"""Merges of the largest of each task's updates: which these are is found by a pass of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cpift_kernels import unpack_mask

from cpift.config.run import FusionConfig
from cpift.merging.base import FusionInputs, Materials
from cpift.merging.forms import UpdateMerge
from cpift.merging.settings import Largest, Share
from cpift.method.masks import RegionMasks

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self


def kept_share(config: FusionConfig, task: str) -> float:
    """`density` of a task."""
    return config.densities.get(task, config.density)


class TrimmedMerge(UpdateMerge):
    """What is kept of each update is its core region for p = `density`; of two shares the first without the second."""

    reads = 1
    shares: ClassVar[tuple[Share, ...]] = (kept_share,)

    def __init__(self, inputs: FusionInputs, config: FusionConfig, trimmed: Sequence[Path]):
        super().__init__(inputs, config)
        self._masks = [RegionMasks(folder, list(self.tuned)) for folder in trimmed]

    @classmethod
    def make(cls, materials: Materials) -> Self:
        inputs = materials.inputs
        wanted = Largest(inputs.pretrained, inputs.tuned, cls.shares)
        return cls(inputs, materials.config, materials.trimmed(wanted))

    def with_masks(self, read: Callable[[RegionMasks], RegionMasks]) -> Self:
        other = super().with_masks(read)
        other._masks = [read(masks) for masks in self._masks]
        return other

    def kept(self, name: str, start: int, stop: int) -> torch.Tensor:
        """bool [N, stop − start]: the elements that are kept of each task's update."""
        first, *without = (self._marked(masks, name, start, stop) for masks in self._masks)
        for marked in without:
            first &= ~marked
        return first

    def _marked(self, masks: RegionMasks, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        return torch.stack([unpack_mask(masks.words(task, name, start, stop), stop - start) for task in self.tuned])
