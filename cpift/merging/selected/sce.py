"""SCE: select where fine-tunes differ most, calculate weights from what is selected, erase what disagrees in sign."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from cpift_kernels import unpack_mask

from cpift.config.run import FusionConfig
from cpift.config.settings import varies
from cpift.errors import Problem
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import FusionInputs, Materials
from cpift.merging.selected.scores import Origin, Scores
from cpift.merging.selected.trimmed import kept_share
from cpift.merging.settings import Largest
from cpift.merging.signs import in_turn
from cpift.merging.updates.measured import MeasuredMerge
from cpift.method.masks import RegionMasks

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

_MASK = "spread"


def spread(name: str, updates: torch.Tensor) -> torch.Tensor:
    """fp32 [n]: the standard deviation of an element over the tasks, which orders as the variance does."""
    return updates.double().std(0, correction=0).float()


class Sce(MeasuredMerge):
    """Elements where all tasks agree exactly are never selected, but with `density` 1 all are. Signs are elected by the
    sum of updates, in fp64. One pass selects, one finds the weights, one merges."""

    formula = (
        "θ0 + λ·Σ w_i·u_i / Σ w_i over the u_i that have the sign of Σ u_i; u = θ − θ0 where its variance over tasks "
        "is among the largest density, else 0; w_i = Σ u_i² of the tensor"
    )
    source = "arXiv 2408.07990"
    fields = ("density", "trim", "scale")
    reads = 2

    def __init__(self, inputs: FusionInputs, config: FusionConfig, masks: Path | None):
        super().__init__(inputs, config)
        self._selected = None if masks is None else RegionMasks(masks, [_MASK])

    @classmethod
    def make(cls, materials: Materials) -> Self:
        inputs, config = materials.inputs, materials.config
        if not varies(config.density) and config.density == 1:
            return cls(inputs, config, None)
        models = [inputs.pretrained, *inputs.tuned.values()]
        wanted = Largest(Origin(inputs.pretrained), {_MASK: Scores(models, spread)}, (kept_share,))
        return cls(inputs, config, materials.trimmed(wanted)[0])

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        if len(tasks) > 1 or config.density == 1:
            return []
        return [Problem("tasks", "sce selects where fine-tunes differ, and there is one", "name another")]

    def with_masks(self, read: Callable[[RegionMasks], RegionMasks]) -> Self:
        other = super().with_masks(read)
        other._selected = None if self._selected is None else read(self._selected)
        return other

    def selected(self, name: str, start: int, stop: int) -> torch.Tensor:
        """bool [stop − start]"""
        import torch

        if self._selected is None or self.config.density == 1:
            return torch.ones(stop - start, dtype=torch.bool)
        return unpack_mask(self._selected.words(_MASK, name, start, stop), stop - start)

    def measured(self, info: TensorInfo) -> torch.Tensor:
        """fp64 [N]: the weights."""
        import torch

        total = torch.zeros(len(self.tuned), dtype=torch.float64)
        for start, updates in self.updates_of(info):
            total += (updates * self.selected(info.name, start, start + updates.shape[1])).double().square().sum(1)
        return total

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        kept = torch.stack(list(updates)).double() * self.selected(name, start, stop)
        agrees = kept.sign() == torch.where(in_turn(kept) >= 0, 1.0, -1.0)
        weights = self.known[:, None] * agrees
        total = weights.sum(0)
        found: torch.Tensor = self.config.scale * (kept * weights).sum(0) / torch.where(total > 0, total, 1.0)
        return found.float()

    def defined(self, info: TensorInfo) -> np.ndarray:
        squares = [
            np.einsum("ij,ij,j->i", updates, updates, self._chosen(info.name, start, updates.shape[1]))
            for start, updates in self.defined_updates_of(info)
        ]
        found: np.ndarray = np.sum(squares, axis=0) if squares else np.zeros(len(self.tuned))
        return found

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        kept = updates * self._chosen(name, start, stop - start)
        up = in_turn(kept) >= 0
        weights = np.where(up, kept > 0, kept < 0) * self.known[:, None]
        total = weights.sum(0)
        found: np.ndarray = self.config.scale * np.einsum("ij,ij->j", kept, weights) / np.where(total > 0, total, 1)
        return found

    def _chosen(self, name: str, start: int, count: int) -> np.ndarray:
        chosen: np.ndarray = self.selected(name, start, start + count).numpy()
        return chosen
