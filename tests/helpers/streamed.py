"""Models in memory, as a selection in phases asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


class Held:
    """Models in memory, and masks, as a selection asks for them."""

    def __init__(self, models: Sequence[Sequence[torch.Tensor]], ks: int):
        self.models, self.sizes, self.tasks = models, [tensor.numel() for tensor in models[0]], len(models) - 1
        self.masks = [
            [[np.zeros((size + 31) // 32, np.int32) for size in self.sizes] for _ in range(ks)] for _ in models[1:]
        ]

    def load(self, model: int, tensor: int, start: int, stop: int) -> torch.Tensor:
        return self.models[model][tensor][start:stop]

    def gather(self, model: int, tensor: int, starts: NDArray[np.int64], length: int) -> torch.Tensor:
        places = np.minimum(starts[:, None] + np.arange(length), self.sizes[tensor] - 1)
        return self.models[model][tensor][torch.from_numpy(places)].float()

    def prefetch(self, tensor: int, start: int, stop: int) -> None:
        """It is in memory."""

    def release(self, tensor: int, start: int, stop: int) -> None:
        """It is the test's."""

    def store(self, task: int, k: int, tensor: int, first: int, words: NDArray[np.uint32]) -> None:
        self.masks[task][k][tensor][first : first + len(words)] = words.view(np.int32)

    def words(self, task: int, k: int, tensor: int) -> NDArray[Any]:
        return self.masks[task][k][tensor]
