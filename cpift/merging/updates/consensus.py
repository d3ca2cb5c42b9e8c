"""Consensus merging: task arithmetic of the elements that several tasks need, by their TALL masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpift.config.run import FusionConfig
from cpift.errors import Problem
from cpift.merging.forms import UpdateMerge

if TYPE_CHECKING:
    import torch


class Consensus(UpdateMerge):
    """A task needs an element where its update is not small beside all that the others add to it. What fewer than
    `agreement` tasks need is left as θ0 has it. One pass, element by element; comparisons are in fp64."""

    formula = "θ0 + Σ λ_i·(θi − θ0) where at least k tasks have |τi| ≥ s·|Σ τj − τi|, τ = θ − θ0"
    source = "arXiv 2405.07813"
    fields = ("weight", "weights", "selectivity", "agreement")

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        if config.agreement <= len(tasks):
            return []
        what = f"is {config.agreement}, of {len(tasks)} tasks: no element would move"
        return [Problem("fusion.agreement", what, f"give at most {len(tasks)}")]

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        exact = [update.double() for update in updates]
        total = sum(exact[1:], exact[0])
        needed = sum((one.abs() >= self.config.selectivity * (total - one).abs()).int() for one in exact)
        moved = sum(weight * one for weight, one in zip(self.weights, exact, strict=True))
        return (torch.as_tensor(moved) * (needed >= self.config.agreement)).float()

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        total = sum(updates[1:], updates[0])
        masks = np.abs(updates) >= self.config.selectivity * np.abs(total - updates)
        found: np.ndarray = (np.array(self.weights) @ updates) * (masks.sum(0) >= self.config.agreement)
        return found
