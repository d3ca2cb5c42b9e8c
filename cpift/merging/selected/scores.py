"""Numbers that elements are chosen by, as a model: selection takes the largest of it, as of updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.finite import all_finite, require_finite
from cpift.errors import Problem

if TYPE_CHECKING:
    import torch

# Of a tensor's name and fp32 updates [N, n] the scores [n] in fp32, none below 0, each of its own element alone.
Score = Callable[[str, "torch.Tensor"], "torch.Tensor"]


class Scores(Checkpoint):
    """The scores of the updates of models, computed slice by slice; models: θ0 first. In fp32, with θ0's names.

    A slice raises CheckpointError naming a model that is not finite."""

    def __init__(self, models: Sequence[Checkpoint], score: Score):
        like = models[0]
        self.folder, self.is_apart, self.ties, self.config = Path("scores"), like.is_apart, {}, {}
        self.tensors = {name: replace(info, kind="F32") for name, info in like.tensors.items() if info.floating}
        self._models, self._score = list(models), score

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._models, self._score)

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        found = self._of(name, [model.slice(name, start, stop).float() for model in self._models])
        if not all_finite(found):
            for label, model in enumerate(self._models):
                require_finite(f"model {label}" if label else "θ0", model, [name])
        return found

    def gather(self, name: str, starts: np.ndarray, length: int) -> torch.Tensor:
        values = [model.gather(name, starts, length) for model in self._models]
        return self._of(name, [one.reshape(-1) for one in values]).view(values[0].shape)

    def _of(self, name: str, values: list[torch.Tensor]) -> torch.Tensor:
        import torch

        origin, *tuned = values
        return self._score(name, torch.stack([one - origin for one in tuned]))

    def prefetch(self, name: str, start: int, stop: int) -> None:
        for model in self._models:
            model.prefetch(name, start, stop)

    def release(self, name: str, start: int, stop: int) -> None:
        for model in self._models:
            model.release(name, start, stop)

    def require_unchanged(self) -> None:
        for model in self._models:
            model.require_unchanged()

    def unequal_copies(self) -> Iterator[Problem]:
        return iter(())


class Origin(Scores):
    """0 everywhere: what scores are counted from."""

    def __init__(self, like: Checkpoint):
        super().__init__([like], lambda name, updates: updates[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._models[0],)

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        return torch.zeros(stop - start)

    def gather(self, name: str, starts: np.ndarray, length: int) -> torch.Tensor:
        import torch

        return torch.zeros(len(starts), length)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """Nothing is read."""

    def release(self, name: str, start: int, stop: int) -> None:
        """Nothing was read."""
