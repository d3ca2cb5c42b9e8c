"""Model Stock: how far to go from θ0 to the mean of fine-tunes, by the angle between their updates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpift.checkpoints.writing import TensorRecord
from cpift.config.run import FusionConfig
from cpift.errors import Problem
from cpift.formats.safetensors import TensorInfo
from cpift.merging.definition import Definition, moves_of, runs_of, total, vectors_of, weighted
from cpift.merging.forms import WeightedMerge


class ModelStock(WeightedMerge):
    """Tensor by tensor θ0 + t·(mean of θi − θ0); cosα is the mean over pairs of updates, 0 where one of them is none,
    and no less than 0, for which the paper's geometry is."""

    formula = "θ0 + t·mean(θi − θ0), t = N·cosα / (1 + (N − 1)·cosα), α the angle between updates"
    source = "arXiv 2403.19522"
    fields = ()
    reads = 1
    combines_updates = True

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        if len(tasks) > 1:
            return []
        return [Problem("tasks", "model_stock takes the angle between fine-tunes, and there is one", "name another")]

    @classmethod
    def described(cls, config: FusionConfig) -> str:
        return "t by the angle between updates, tensor by tensor"

    def coefficients(self, info: TensorInfo) -> tuple[list[float], TensorRecord | None]:
        import torch

        size = len(self.tuned)
        of_updates = self.gram(info)[1:, 1:]  # the Gram matrix is of (θ0, θ1 − θ0, …)
        norms = of_updates.diagonal().sqrt()
        cosines = (of_updates / torch.outer(norms, norms)).nan_to_num(0.0)
        cosine = float((cosines.sum() - cosines.trace()) / (size * (size - 1)))
        share = _share(cosine, size)
        record = TensorRecord(tensor=info.name, numel=info.numel, core=0, cosine=cosine, share=share)
        return [1.0 - share, *[share / size] * size], record

    def definition(self, info: TensorInfo) -> Definition:
        updates, size = runs_of(moves_of(self.models, info), info.numel), len(self.tuned)
        products = total(updates, lambda run: np.stack(run) @ np.stack(run).T, (size, size))
        pairs = [(i, j) for i in range(size) for j in range(i)]
        sizes = np.sqrt(np.diagonal(products))
        cosines = [products[i, j] / (sizes[i] * sizes[j]) if sizes[i] * sizes[j] > 0 else 0.0 for i, j in pairs]
        share = _share(float(np.mean(cosines)), size)
        return weighted(vectors_of(self.models, info), np.array([1 - share, *[share / size] * size]))


def _share(cosine: float, size: int) -> float:
    """t of so many fine-tunes."""
    cosine = max(cosine, 0.0)
    return size * cosine / (1 + (size - 1) * cosine)
