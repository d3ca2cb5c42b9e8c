"""The weighted mean of fine-tunes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpift.checkpoints.writing import TensorRecord
from cpift.config.run import FusionConfig
from cpift.errors import Problem
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import Contender
from cpift.merging.definition import Definition, vectors_of, weighted
from cpift.merging.forms import WeightedMerge


class Linear(WeightedMerge):
    """The weighted mean of the fine-tunes."""

    formula = "Σ w_i·θi / Σ w_i; not `normalize`: Σ w_i·θi"
    source = "arXiv 2203.05482"
    fields = ("weight", "weights", "normalize")
    needs_base = False
    combines_updates = True
    contender = Contender("linear average", {})

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        weights = [config.weights.get(task, config.weight) for task in tasks]
        if config.normalize is False or abs(sum(weights)) > 1e-9 * sum(map(abs, weights)):
            return []
        return [Problem("fusion.weights", f"sum to {sum(weights):g}, and linear divides by it", "give others")]

    def coefficients(self, info: TensorInfo) -> tuple[list[float], TensorRecord | None]:
        total = 1.0 if self.config.normalize is False else sum(self.weights)
        return [weight / total for weight in self.weights], None

    def definition(self, info: TensorInfo) -> Definition:
        weights = np.array(self.weights)
        return weighted(
            vectors_of(self.models, info), weights if self.config.normalize is False else weights / weights.sum()
        )
