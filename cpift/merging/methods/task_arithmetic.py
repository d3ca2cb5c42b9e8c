"""θ0 plus the weighted updates of fine-tunes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpift.checkpoints.writing import TensorRecord
from cpift.config.run import FusionConfig
from cpift.errors import Problem
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import Contender
from cpift.merging.definition import Definition, vectors_of, weighted
from cpift.merging.forms import WeightedMerge, sum_problems, summed


class TaskArithmetic(WeightedMerge):
    """θ0 plus the weighted updates."""

    formula = "θ0 + Σ λ_i·(θi − θ0)"
    source = "arXiv 2212.04089"
    fields = ("weight", "weights", "normalize", "scale")
    combines_updates = True
    contender = Contender("task arithmetic (λ 0.4)", {"weight": 0.4})

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        return sum_problems(config, tasks)

    def coefficients(self, info: TensorInfo) -> tuple[list[float], TensorRecord | None]:
        factors = summed(self.weights, self.config)
        return [1.0 - sum(factors), *factors], None

    def definition(self, info: TensorInfo) -> Definition:
        factors = np.array(self.weights) * self.config.scale
        factors = factors / sum(self.weights) if self.config.normalize else factors
        return weighted(vectors_of(self.models, info), np.array([1.0 - factors.sum(), *factors]))
