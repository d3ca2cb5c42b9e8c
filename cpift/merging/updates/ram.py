"""RAM: what one task alone changed stays whole, what several changed is averaged over these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpift.merging.forms import UpdateMerge
from cpift.merging.signs import in_turn

if TYPE_CHECKING:
    import torch


class Ram(UpdateMerge):
    """An element that one task changed is unique and moves as that task moved it; one that several changed is shared
    and moves by their mean; a task that left it alone does not dilute it. One pass, element by element."""

    formula = "θ0 + λ·mean of the θi − θ0 with |θi − θ0| > threshold"
    source = "arXiv 2601.13572, without the rescaling of RAM+"
    fields = ("threshold", "scale")

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        stacked = torch.stack(list(updates)).double()
        changed = stacked.abs() > self.config.threshold
        return (self.config.scale * in_turn(stacked * changed) / changed.sum(0).clamp(min=1)).float()

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        changed = np.abs(updates) > self.config.threshold
        found: np.ndarray = np.where(changed, updates, 0).sum(0) / np.maximum(np.count_nonzero(changed, axis=0), 1)
        return self.config.scale * found
