"""DARE: drop updates at random, rescale the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpift.config.run import FusionConfig
from cpift.errors import Problem
from cpift.merging.base import Contender
from cpift.merging.forms import UpdateMerge, sum_problems, summed
from cpift.merging.signs import in_turn

if TYPE_CHECKING:
    import torch


class Dare(UpdateMerge):
    """Drop updates at random, rescale the rest. An element's fate depends on the seed, its task, tensor and index
    alone, so it is the same in every slice and on every machine."""

    formula = "θ0 + Σ λ_i·(θi − θ0)·b / d, b ~ Bernoulli(d)"
    source = "arXiv 2311.03099"
    fields = ("weight", "weights", "density", "densities", "normalize", "scale")
    seeded = True
    contender = Contender("DARE (density 0.5, λ 0.4)", {"density": 0.5, "weight": 0.4})

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        return sum_problems(config, tasks)

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        kept = [
            torch.where(torch.from_numpy(survives(self.seed, task, name, start, stop, density)), update / density, 0.0)
            for task, density, update in zip(self.tuned, self.densities, updates, strict=True)
        ]
        factors = torch.tensor(summed(self.weights, self.config))
        return in_turn(torch.stack(kept) * factors[:, None])

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        pairs = zip(self.tuned, self.densities, strict=True)
        kept = np.stack([survives(self.seed, task, name, start, stop, density) / density for task, density in pairs])
        total = sum(self.weights) if self.config.normalize else 1.0
        factors = np.array(self.weights)[:, None] * self.config.scale / total
        found: np.ndarray = (updates * kept * factors).sum(0)
        return found


def survives(seed: int, task: str, name: str, start: int, stop: int, density: float) -> np.ndarray:
    """Bool [stop - start]: whether each element is kept, with probability `density`."""
    return drawn(seed, task, name, start, stop) < np.uint64(round(density * 2**32))


def drawn(seed: int, task: str, name: str, start: int, stop: int) -> np.ndarray:
    """uint64 [stop - start]: of each element a number below 2³², all equally likely; SplitMix64 of its index."""
    key = hashlib.sha256(f"{seed}\0{task}\0{name}".encode()).digest()
    state = np.arange(start, stop, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(int.from_bytes(key[:8], "little"))
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: np.ndarray = (state ^ (state >> np.uint64(31))) >> np.uint64(32)
    return found
