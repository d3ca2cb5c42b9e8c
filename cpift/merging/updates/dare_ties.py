"""DARE, then the election of TIES: drop updates at random, rescale, and average what agrees in sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpift.merging.forms import UpdateMerge
from cpift.merging.signs import defined_elected, elected
from cpift.merging.updates.dare import survives

if TYPE_CHECKING:
    import torch


class DareTies(UpdateMerge):
    """What DARE keeps takes the place of what TIES trims. Signs are elected by the sum over tasks, in fp64."""

    formula = "θ0 + λ·mean of (θi − θ0)·b / d that agree in sign, b ~ Bernoulli(d)"
    source = "arXiv 2311.03099, 2306.01708"
    fields = ("weight", "weights", "density", "densities", "normalize", "scale")
    seeded = True

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        pairs = zip(self.tuned, self.densities, strict=True)
        dropped = [~survives(self.seed, task, name, start, stop, density) for task, density in pairs]
        kept = torch.stack(list(updates)).masked_fill_(torch.from_numpy(np.stack(dropped)), 0.0)
        return elected(kept, self.weights, self.densities, self.config)

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        pairs = zip(self.tuned, self.densities, strict=True)
        kept = updates * np.stack([survives(self.seed, task, name, start, stop, density) for task, density in pairs])
        return defined_elected(kept, self.weights, self.densities, self.config)
