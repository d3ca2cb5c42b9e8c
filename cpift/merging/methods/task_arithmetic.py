"""θ0 plus the weighted updates of fine-tunes."""

from __future__ import annotations

import numpy as np

from cpift.checkpoints.writing import TensorRecord
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import Contender
from cpift.merging.definition import Definition, vectors_of, weighted
from cpift.merging.forms import WeightedMerge


class TaskArithmetic(WeightedMerge):
    """θ0 plus the weighted updates."""

    formula = "θ0 + Σ λ_i·(θi − θ0)"
    source = "arXiv 2212.04089"
    fields = ("weight", "weights")
    contender = Contender("task arithmetic (λ 0.4)", {"weight": 0.4})

    def coefficients(self, info: TensorInfo) -> tuple[list[float], TensorRecord | None]:
        return [1.0 - sum(self.weights), *self.weights], None

    def definition(self, info: TensorInfo) -> Definition:
        return weighted(vectors_of(self.models, info), np.array([1.0 - sum(self.weights), *self.weights]))
