"""TIES: trim, elect a sign, average what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from cpift_kernels import unpack_mask

from cpift.config.run import FusionConfig
from cpift.merging.base import Contender, FusionInputs, Materials
from cpift.merging.forms import UpdateMerge, agreed, defined_agreed
from cpift.merging.peft_formulas import merge_utilities
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
    extra = "peft"
    contender = Contender("TIES (density 0.2)", {"density": 0.2})
    masks: RegionMasks

    def __init__(self, inputs: FusionInputs, config: FusionConfig, trimmed: Path):
        super().__init__(inputs, config)
        self.masks = RegionMasks(trimmed, list(self.tuned))
        self._formulas = merge_utilities()

    @classmethod
    def make(cls, materials: Materials) -> Self:
        return cls(materials.inputs, materials.config, materials.trimmed())

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        kept = [
            torch.where(unpack_mask(self.masks.words(task, name, start, stop), stop - start), update, 0.0)
            for task, update in zip(self.tuned, updates, strict=True)
        ]
        stacked = torch.stack(kept)
        if self.config.normalize is not None:
            exact = torch.tensor(self.weights, dtype=torch.float64)[:, None]
            return self.config.scale * agreed(stacked.double(), exact, self.config.normalize)
        weights = torch.tensor(self.weights)
        agreeing = self._formulas.calculate_majority_sign_mask(stacked, method="total")
        merged: torch.Tensor = self._formulas.disjoint_merge(stacked * weights[:, None], agreeing)
        return merged if self.config.scale == 1 else merged * self.config.scale

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        words = [self.masks.words(task, name, start, stop) for task in self.tuned]
        trimmed = updates * np.stack([unpack_mask(mask, stop - start).numpy() for mask in words])
        if self.config.normalize is not None:
            return self.config.scale * defined_agreed(trimmed, np.array(self.weights), self.config.normalize)
        agrees = np.sign(trimmed) == np.where(trimmed.sum(0) >= 0, 1, -1)
        sums = (trimmed * np.array(self.weights)[:, None] * agrees).sum(0)
        found: np.ndarray = self.config.scale * sums / np.maximum(agrees.sum(0), 1)
        return found
