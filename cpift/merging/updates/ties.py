"""TIES: trim, elect a sign, average what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from cpift_kernels import unpack_mask

from cpift.config.run import FusionConfig
from cpift.merging.base import Contender, FusionInputs, Materials
from cpift.merging.forms import UpdateMerge
from cpift.merging.signs import defined_elected, elected
from cpift.method.masks import RegionMasks

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self


class Ties(UpdateMerge):
    """Trim, elect a sign, average what agrees. What is kept of each update is its core region for p = `density`."""

    formula = "θ0 + λ·mean of the largest updates that agree in sign"
    source = "arXiv 2306.01708"
    fields = ("weight", "weights", "density", "densities", "trim", "normalize", "scale")
    reads = 1
    contender = Contender("TIES (density 0.2)", {"density": 0.2})
    masks: RegionMasks

    def __init__(self, inputs: FusionInputs, config: FusionConfig, trimmed: Path):
        super().__init__(inputs, config)
        self.masks = RegionMasks(trimmed, list(self.tuned))

    @classmethod
    def make(cls, materials: Materials) -> Self:
        return cls(materials.inputs, materials.config, materials.trimmed())

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        kept = [
            torch.where(unpack_mask(self.masks.words(task, name, start, stop), stop - start), update, 0.0)
            for task, update in zip(self.tuned, updates, strict=True)
        ]
        return elected(kept, self.weights, [1.0] * len(kept), self.config)

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        words = [self.masks.words(task, name, start, stop) for task in self.tuned]
        trimmed = updates * np.stack([unpack_mask(mask, stop - start).numpy() for mask in words])
        return defined_elected(trimmed, self.weights, [1.0] * len(trimmed), self.config)
