"""RAM+: RAM, where what one task alone changed is enlarged for what the task loses by averaging."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpift.checkpoints.writing import TensorRecord
from cpift.config.run import FusionConfig
from cpift.errors import Problem
from cpift.formats.safetensors import TensorInfo
from cpift.merging.updates.measured import MeasuredMerge

if TYPE_CHECKING:
    import torch


class RamPlus(MeasuredMerge):
    """Shared and unique elements are counted in each tensor or, with granularity `model`, in all of them. One pass
    counts, one merges."""

    formula = (
        "θ0 + λ·mean of the θi − θ0 with |θi − θ0| > threshold; where i is alone, times 1 + r·min(s_i/u_i, a): "
        "s_i elements that i shares, u_i that it alone changed"
    )
    source = "arXiv 2601.13572"
    fields = ("threshold", "rescale", "rescale_limit", "granularity", "scale")
    _of_model: list[float] | None = None

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        if config.granularity != "row":
            return []
        return [Problem("fusion.granularity", "is `row`, and ram_plus counts in tensors or the model", "give `tensor`")]

    @property
    def magnifies(self) -> float:
        return super().magnifies * (1 + self.config.rescale * self.config.rescale_limit)

    def prepare(self) -> list[TensorRecord]:
        if self.config.granularity == "model":
            infos = [info for info in self.pretrained.tensors.values() if self.merges(info)]
            self._of_model = self._factors(sum((self._counted(info) for info in infos), np.zeros(1, int)))
        return []

    def measured(self, info: TensorInfo) -> list[float]:
        return self._of_model or self._factors(self._counted(info))

    def _counted(self, info: TensorInfo) -> np.ndarray:
        """[2, N]: elements that each task shares, and that it alone changed."""
        counts = np.zeros((2, len(self.tuned)), int)
        for _, updates in self.updates_of(info):
            changed = updates.double().abs() > self.config.threshold
            shared = changed.sum(0) > 1
            counts += np.array([(changed & shared).sum(1).tolist(), (changed & ~shared).sum(1).tolist()])
        return counts

    def _factors(self, counts: np.ndarray) -> list[float]:
        """By task what its unique elements are multiplied by."""
        r, most = self.config.rescale, self.config.rescale_limit
        return [1 + r * min(shared / max(unique, 1), most) for shared, unique in counts.T.tolist()]

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        stacked = torch.stack(list(updates)).double()
        changed = stacked.abs() > self.config.threshold
        number = changed.sum(0)
        factors = torch.where(number == 1, torch.tensor(self.known, dtype=torch.float64)[:, None], 1.0)
        return (self.config.scale * (stacked * changed * factors).sum(0) / number.clamp(min=1)).float()

    def defined(self, info: TensorInfo) -> list[float]:
        by_model = self.config.granularity == "model"
        infos: Iterable[TensorInfo] = self.pretrained.tensors.values() if by_model else [info]
        shared, unique = np.zeros(len(self.tuned)), np.zeros(len(self.tuned))
        for one in filter(self.merges, infos):
            for _, updates in self.defined_updates_of(one):
                changed = np.abs(updates) > self.config.threshold
                alone = changed & (np.count_nonzero(changed, axis=0) == 1)
                unique += np.count_nonzero(alone, axis=1)
                shared += np.count_nonzero(changed & ~alone, axis=1)
        shares = np.minimum(shared / np.maximum(unique, 1), self.config.rescale_limit)
        found: list[float] = (1 + self.config.rescale * shares).tolist()
        return found

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        changed = np.abs(updates) > self.config.threshold
        number = np.count_nonzero(changed, axis=0)
        enlarged = np.where(number == 1, np.array(self.known)[:, None] * updates, updates)
        found: np.ndarray = self.config.scale * np.where(changed, enlarged, 0).sum(0) / np.maximum(number, 1)
        return found
