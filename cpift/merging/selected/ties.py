"""TIES: trim, elect a sign, average what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cpift.merging.base import Contender
from cpift.merging.selected.trimmed import TrimmedMerge
from cpift.merging.signs import defined_elected, elected

if TYPE_CHECKING:
    import torch


class Ties(TrimmedMerge):
    """Trim, elect a sign, average what agrees. What is kept of each update is its core region for p = `density`."""

    formula = "θ0 + λ·mean of the largest updates that agree in sign"
    source = "arXiv 2306.01708"
    fields: ClassVar[tuple[str, ...]] = ("weight", "weights", "density", "densities", "trim", "normalize", "scale")
    contender: ClassVar[Contender | None] = Contender("TIES (density 0.2)", {"density": 0.2})

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        kept = torch.stack(list(updates)).masked_fill_(~self.kept(name, start, stop), 0.0)
        return elected(kept, self.weights, [1.0] * len(kept), self.config)

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        trimmed = updates * self.kept(name, start, stop).numpy()
        return defined_elected(trimmed, self.weights, [1.0] * len(trimmed), self.config)
