"""DARE, then the election of TIES: drop updates at random, rescale, and average what agrees in sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpift.merging.forms import UpdateMerge, agreed, defined_agreed
from cpift.merging.methods.dare import survives

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

        kept = torch.stack(
            [
                torch.where(torch.from_numpy(survives(self.seed, task, name, start, stop, density)), update, 0.0)
                for task, density, update in zip(self.tuned, self.densities, updates, strict=True)
            ]
        )
        exact = torch.tensor([self.weights, self.densities], dtype=torch.float64)[:, :, None]
        if self.config.normalize is not None:
            return self.config.scale * agreed(kept.double() / exact[1], exact[0], self.config.normalize)
        weights, densities = exact.float()
        # One density for all changes no sign: dropped updates are elected as they are.
        alike = len(set(self.densities)) == 1
        elected = torch.where((kept.double() if alike else kept.double() / exact[1]).sum(0) >= 0, 1.0, -1.0)
        agrees = kept.sign() == elected
        found: torch.Tensor = (kept * (weights / densities) * agrees).sum(0) / agrees.sum(0).clamp(min=1)
        return found if self.config.scale == 1 else found * self.config.scale

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        pairs = list(zip(self.tuned, self.densities, strict=True))
        dropped = updates * np.stack([survives(self.seed, task, name, start, stop, density) for task, density in pairs])
        rescaled = dropped / np.array(self.densities)[:, None]
        if self.config.normalize is not None:
            return self.config.scale * defined_agreed(rescaled, np.array(self.weights), self.config.normalize)
        up = (dropped if len(set(self.densities)) == 1 else rescaled).sum(0) >= 0
        agrees = np.where(up, rescaled > 0, rescaled < 0)
        sums = np.einsum("i,ij,ij->j", np.array(self.weights), rescaled, agrees)
        found: np.ndarray = self.config.scale * sums / np.maximum(agrees.sum(0), 1)
        return found
