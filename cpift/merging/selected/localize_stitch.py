"""Localize-and-Stitch without data: of every task its largest updates, averaged where they meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpift.merging.selected.trimmed import TrimmedMerge
from cpift.merging.signs import in_turn

if TYPE_CHECKING:
    import torch


class LocalizeStitch(TrimmedMerge):
    """The dataless variant: a task is localised in its largest updates. The paper takes 5 % of the whole model,
    `density: 0.05, trim: global`. One pass finds the regions, one merges."""

    formula = "θ0 + λ·mean of the θi − θ0 whose region has the element, the largest |θi − θ0|"
    source = "arXiv 2408.13656"
    fields = ("density", "densities", "trim", "scale")

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        held = self.kept(name, start, stop)
        total = in_turn(torch.stack(list(updates)).double() * held)
        return (self.config.scale * total / held.sum(0).clamp(min=1)).float()

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        held = self.kept(name, start, stop).numpy()
        shares = held / np.maximum(held.sum(0), 1)
        found: np.ndarray = self.config.scale * np.einsum("ij,ij->j", shares, updates)
        return found
