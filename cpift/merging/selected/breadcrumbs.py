"""Model breadcrumbs: of every update neither its largest elements nor its small ones, added up."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

import numpy as np

from cpift.config.run import FusionConfig
from cpift.errors import Problem
from cpift.merging.forms import sum_problems, summed
from cpift.merging.selected.trimmed import TrimmedMerge, kept_share

if TYPE_CHECKING:
    import torch


def outliers(config: FusionConfig, task: str) -> float:
    """γ, or what `density` leaves of it."""
    return min(config.gamma, float(1 - Decimal(str(kept_share(config, task)))))


def with_outliers(config: FusionConfig, task: str) -> float:
    """γ and the share that is kept, in decimals as they are written: 0.1 + 0.7 is 0.8."""
    return float(Decimal(str(kept_share(config, task))) + Decimal(str(outliers(config, task))))


class Breadcrumbs(TrimmedMerge):
    """The outliers are left out, of the rest the largest are kept: `density` of all. Where the two are more than
    everything, fewer outliers are left out. One pass finds both, one merges."""

    formula = "θ0 + λ·Σ w_i·(θi − θ0) where |θi − θ0| is among the largest density + γ, and not among the largest γ"
    source = "arXiv 2312.06795"
    fields = ("weight", "weights", "density", "densities", "gamma", "trim", "normalize", "scale")
    shares = (with_outliers, outliers)

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        return sum_problems(config, tasks)

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        kept = torch.where(self.kept(name, start, stop), torch.stack(list(updates)), 0.0)
        return (kept * torch.tensor(summed(self.weights, self.config))[:, None]).sum(0)

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        total = sum(self.weights) if self.config.normalize else 1.0
        factors = np.array(self.weights) * self.config.scale / total
        found: np.ndarray = factors @ (updates * self.kept(name, start, stop).numpy())
        return found
