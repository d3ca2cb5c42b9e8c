"""NearSwap: θ1 where it is near θ0, and no further than `t` from θ0 elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpift.config.run import FusionConfig
from cpift.errors import Problem
from cpift.merging.forms import UpdateMerge

if TYPE_CHECKING:
    import torch


class NearSwap(UpdateMerge):
    """LERP from θ0 to one fine-tune by min(t / |θ1 − θ0|, 1), element by element: an update is cut off at t."""

    formula = "θ0 + (θ1 − θ0)·min(t / |θ1 − θ0|, 1)"
    source = "mergekit's documentation"
    fields = ("t",)

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        if len(tasks) == 1:
            return []
        return [Problem("tasks", f"nearswap is of one fine-tune, the config has {len(tasks)}", "name one")]

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        return updates[0].clamp(-self.config.t, self.config.t)

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        sizes = np.abs(updates[0])
        shares = np.where(sizes > 0, np.minimum(self.config.t / np.where(sizes > 0, sizes, 1), 1), 1)
        found: np.ndarray = updates[0] * shares
        return found
