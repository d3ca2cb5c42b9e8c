"""DELLA: drop updates at random, small ones more often than large ones, rescale the rest, and elect signs as TIES."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

import numpy as np

from cpift.config.run import FusionConfig
from cpift.errors import Problem
from cpift.formats.safetensors import TensorInfo
from cpift.merging.forms import UpdateMerge, sum_problems, summed
from cpift.merging.signs import defined_elected, elected
from cpift.merging.updates.dare import drawn

if TYPE_CHECKING:
    import torch


class DellaLinear(UpdateMerge):
    """MagPrune, then a sum. An element of rank r, 0 for the smallest, of the n of its row is kept with probability
    d + window·((2r + 1)/n − 1), so that density d is kept on the whole, and divided by its own probability. Of equal
    magnitudes the first ranks lower. A tensor of one dimension is one row. Rows are sorted as they are merged."""

    formula = (
        "θ0 + λ·Σ w_i·(θi − θ0)·b / p, b ~ Bernoulli(p), p from density − window to density + window by the rank of "
        "|θi − θ0| in its row"
    )
    source = "arXiv 2406.11617"
    fields = ("weight", "weights", "density", "densities", "window", "normalize", "scale")
    seeded = True

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        found = []
        for share in {config.densities.get(task, config.density) for task in tasks}:
            if not config.window < share <= float(1 - Decimal(str(config.window))):
                what = f"is {config.window:g}, and about density {share:g} probabilities leave 0 to 1"
                most = f"at most {float(1 - Decimal(str(share))):g}" if share > 0.5 else f"less than {share:g}"
                found.append(Problem("fusion.window", what, f"give {most}"))
        return found or sum_problems(config, tasks)

    @classmethod
    def row_width(cls, config: FusionConfig, info: TensorInfo) -> int:
        return info.shape[-1] if info.shape else 1

    @property
    def magnifies(self) -> float:
        return max(abs(self.config.scale), 1.0) / (min(self.densities) - self.config.window)

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        factors = torch.tensor(summed(self.weights, self.config))
        return (torch.stack(self.kept(name, start, updates)) * factors[:, None]).sum(0)

    def kept(self, name: str, start: int, updates: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """fp32 [n] a task: what is kept of whole rows, rescaled."""
        import torch

        width = self.row_width(self.config, self.pretrained.tensors[name])
        pruned = []
        for task, density, update in zip(self.tuned, self.densities, updates, strict=True):
            order = update.abs().view(-1, width).argsort(dim=1, stable=True)
            ranks = torch.empty_like(order).scatter_(1, order, torch.arange(width).expand_as(order)).view(-1)
            chances = density + self.config.window * ((2 * ranks.double() + 1) / width - 1)
            draws = torch.from_numpy(drawn(self.seed, task, name, start, start + len(update)).astype(np.int64))
            kept = draws < (chances * 2**32).round().long()
            pruned.append(update * (kept / chances).float())
        return pruned

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        total = sum(self.weights) if self.config.normalize else 1.0
        factors = np.array(self.weights) * self.config.scale / total
        found: np.ndarray = factors @ self.defined_kept(name, start, updates)
        return found

    def defined_kept(self, name: str, start: int, updates: np.ndarray) -> np.ndarray:
        """fp64 [N, n]: the same by the formula."""
        width = self.row_width(self.config, self.pretrained.tensors[name])
        rows = np.abs(updates).reshape(len(updates), -1, width)
        ranks = rows.argsort(2, kind="stable").argsort(2, kind="stable").reshape(len(updates), -1)
        chances = np.array(self.densities)[:, None] + self.config.window * ((2 * ranks + 1) / width - 1)
        draws = np.stack([drawn(self.seed, task, name, start, start + ranks.shape[1]) for task in self.tuned])
        found: np.ndarray = np.where(draws < np.round(chances * 2**32), updates / chances, 0)
        return found


class Della(DellaLinear):
    """MagPrune, then the election of TIES."""

    formula = "θ0 + λ·mean of what MagPrune keeps, rescaled, and that agrees in sign"
    source = "arXiv 2406.11617"

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        return [one for one in super().problems(config, tasks) if one.where == "fusion.window"]

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        kept = torch.stack(self.kept(name, start, updates))
        return elected(kept, self.weights, [1.0] * len(updates), self.config)

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        kept = self.defined_kept(name, start, updates)
        return defined_elected(kept, self.weights, [1.0] * len(kept), self.config)
