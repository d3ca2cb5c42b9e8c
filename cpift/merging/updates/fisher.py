"""Fisher-weighted mean: every element of a task counts by how much the task's loss depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.run import FusionConfig
from cpift.errors import Problem
from cpift.merging.base import FusionInputs
from cpift.merging.definition import in_fp64
from cpift.merging.forms import UpdateMerge
from cpift.merging.settings import no_shares
from cpift.method.moments import moments_of, require_moments

if TYPE_CHECKING:
    import torch


class Fisher(UpdateMerge):
    """vi are AdamW's second moments in the fine-tune i, kept by `probe.keep_moments` or given: means of g², which stand
    for the diagonal of the Fisher matrix, and √v for the preconditioner that the fine-tune moved by. Moments of a short
    fine-tune are small, for they begin at 0: fine-tunes of other lengths count otherwise, and `weights` puts it right.
    An element that no task has a moment of gets the tasks' weighted mean.

    One pass, element by element; it reads the moments of every task beside its model, half as much again in bf16 of
    models in fp32, as much again of models in bf16."""

    formula = "θ0 + λ·Σ w_i·√vi·(θi − θ0) / Σ w_i·√vi; where all vi are 0: θ0 + λ·Σ w_i·(θi − θ0) / Σ w_i"
    source = "arXiv 2509.11167 (OTA); arXiv 2111.09832 has v itself"
    fields = ("weight", "weights", "scale")
    needs_moments = True

    def __init__(self, inputs: FusionInputs, config: FusionConfig, seed: int = 0):
        super().__init__(inputs, config, seed)
        self.moments = moments_of(inputs.moments, inputs.tuned)

    @property
    def models(self) -> list[Checkpoint]:
        return [*super().models, *self.moments]

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        return no_shares(config, tasks, "a mean takes none below 0, and not all 0")

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        total, mean, moved = (torch.zeros_like(updates[0]) for _ in range(3))
        for weight, moments, update in zip(self.weights, self.moments, updates, strict=True):
            root = moments.slice(name, start, stop).float().sqrt().mul_(weight)
            total += root
            moved.addcmul_(root, update)
            mean.add_(update, alpha=weight / sum(self.weights))
        if not bool((total >= 0).all() and total.isfinite().all()):
            require_moments(dict(zip(self.tuned, self.moments, strict=True)), [name])
        return self.config.scale * torch.where(total > 0, moved / total, mean)

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        weights = np.array(self.weights)[:, None]
        roots = weights * np.sqrt([in_fp64(moments, name, start, stop) for moments in self.moments])
        total = roots.sum(0)
        of_all = (weights * updates).sum(0) / weights.sum()
        found: np.ndarray = np.where(total > 0, (roots * updates).sum(0) / np.where(total > 0, total, 1.0), of_all)
        return self.config.scale * found
