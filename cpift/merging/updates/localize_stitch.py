"""Localize-and-Stitch without data: of every task its largest updates, averaged where they meet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from cpift_kernels import unpack_mask

from cpift.config.run import FusionConfig
from cpift.merging.base import FusionInputs, Materials
from cpift.merging.forms import UpdateMerge
from cpift.method.masks import RegionMasks

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self


class LocalizeStitch(UpdateMerge):
    """The dataless variant: a task is localised in its largest updates. The paper takes 5 % of the whole model,
    `density: 0.05, trim: global`. One pass finds the regions, one merges."""

    formula = "θ0 + λ·mean of the θi − θ0 whose region has the element, the largest |θi − θ0|"
    source = "arXiv 2408.13656"
    fields = ("density", "densities", "trim", "scale")
    reads = 1
    masks: RegionMasks

    def __init__(self, inputs: FusionInputs, config: FusionConfig, trimmed: Path):
        super().__init__(inputs, config)
        self.masks = RegionMasks(trimmed, list(self.tuned))

    @classmethod
    def make(cls, materials: Materials) -> Self:
        return cls(materials.inputs, materials.config, materials.trimmed())

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        held = torch.stack(
            [unpack_mask(self.masks.words(task, name, start, stop), stop - start) for task in self.tuned]
        )
        total = (torch.stack(list(updates)).double() * held).sum(0)
        return (self.config.scale * total / held.sum(0).clamp(min=1)).float()

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        words = [self.masks.words(task, name, start, stop) for task in self.tuned]
        held = np.stack([unpack_mask(mask, stop - start).numpy() for mask in words])
        shares = held / np.maximum(held.sum(0), 1)
        found: np.ndarray = self.config.scale * np.einsum("ij,ij->j", shares, updates)
        return found
