"""One model as it is, or its tensors times a factor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpift.checkpoints.writing import TensorRecord
from cpift.config.run import FusionConfig
from cpift.errors import Problem
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import Merged, copy_of
from cpift.merging.definition import Definition, vectors_of, weighted
from cpift.merging.forms import WeightedMerge


class Passthrough(WeightedMerge):
    """What layers of several models one after another are made by (`fusion.slices`); with the weight 1 bit for bit."""

    formula = "w·θ1"
    source = "mergekit's documentation"
    fields = ("weight", "weights")
    needs_base = False
    on_gpu = False

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        if len(tasks) == 1:
            return []
        remedy = "give one, or name another method; layers of several models one after another are fusion.slices"
        return [Problem("fusion.method", f"passthrough is of one model, and there are {len(tasks)}", remedy)]

    def merged(self, info: TensorInfo) -> Merged:
        ((label, model),) = self.tuned.items()
        return (None, copy_of(label, model, info)) if self.weights == [1.0] else super().merged(info)

    def coefficients(self, info: TensorInfo) -> tuple[list[float], TensorRecord | None]:
        return self.weights, None

    def definition(self, info: TensorInfo) -> Definition:
        return weighted(vectors_of(self.models, info), np.array(self.weights))
