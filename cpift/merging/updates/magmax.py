"""MagMax: every element moves as the task moved it that moved it most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpift.config.run import FusionConfig
from cpift.merging.forms import UpdateMerge

if TYPE_CHECKING:
    import torch


class MagMax(UpdateMerge):
    """The largest update of an element, of equally large ones the first task's. One pass, element by element."""

    formula = "θ0 + λ·(θj − θ0), j the task of the largest |θj − θ0|"
    source = "arXiv 2407.06322"
    fields = ("scale",)

    @classmethod
    def described(cls, config: FusionConfig) -> str:
        return f"λ {config.scale:g}"

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        largest, *others = updates
        for update in others:
            # What is not finite is taken too, so that its model is named.
            largest = torch.where((update.abs() > largest.abs()) | update.isnan(), update, largest)
        return self.config.scale * largest

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        first = np.abs(updates).argmax(0)
        found: np.ndarray = np.take_along_axis(updates, first[None], 0)[0]
        return self.config.scale * found
