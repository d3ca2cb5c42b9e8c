"""DARE, then the election of TIES: drop updates at random, rescale, and average what agrees in sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpift.merging.forms import UpdateMerge
from cpift.merging.methods.dare import survives

if TYPE_CHECKING:
    import torch


class DareTies(UpdateMerge):
    """What DARE keeps takes the place of what TIES trims. Signs are elected by the sum over tasks, in fp64."""

    formula = "θ0 + λ·mean of (θi − θ0)·b / d that agree in sign, b ~ Bernoulli(d)"
    source = "arXiv 2311.03099, 2306.01708"
    fields = ("weight", "weights", "density")
    seeded = True

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        kept = torch.stack(
            [
                torch.where(torch.from_numpy(self._survives(task, name, start, stop)), update, 0.0)
                for task, update in zip(self.tuned, updates, strict=True)
            ]
        )
        elected = torch.where(kept.double().sum(0) >= 0, 1.0, -1.0)
        agrees = kept.sign() == elected
        weights = torch.tensor(self.weights)[:, None] / self.config.density
        return (kept * weights * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        dropped = updates * np.stack([self._survives(task, name, start, stop) for task in self.tuned])
        rescaled, up = dropped / self.config.density, dropped.sum(0) >= 0
        agrees = np.where(up, rescaled > 0, rescaled < 0)
        sums = np.einsum("i,ij,ij->j", np.array(self.weights), rescaled, agrees)
        found: np.ndarray = sums / np.maximum(agrees.sum(0), 1)
        return found

    def _survives(self, task: str, name: str, start: int, stop: int) -> np.ndarray:
        return survives(self.seed, task, name, start, stop, self.config.density)
