"""NuSLERP: SLERP of two fine-tunes or of their updates, by weights."""

from __future__ import annotations

from collections.abc import Sequence

from cpift_kernels import slerp_coefficients

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.writing import TensorRecord
from cpift.config.run import FusionConfig
from cpift.errors import Problem
from cpift.formats.safetensors import TensorInfo
from cpift.merging.definition import Definition, combined, from_origin, moves_of, runs_of, sequential_slerp, vectors_of
from cpift.merging.forms import WeightedMerge
from cpift.merging.settings import no_shares


class NuSlerp(WeightedMerge):
    """Tensor by tensor; with `space: delta` what is interpolated are the updates, whose angle is large where that of
    the models is hardly measurable. LERP where the angle is below `epsilon`. One pass for the angle, one merges."""

    formula = "SLERP(θ1, θ2, w2/(w1 + w2)); space delta: θ0 + SLERP(θ1 − θ0, θ2 − θ0, w2/(w1 + w2))"
    source = "mergekit's documentation"
    fields = ("weight", "weights", "space", "epsilon")
    reads = 1

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        if len(tasks) != 2:
            return [Problem("tasks", f"nuslerp is of two, the config has {len(tasks)}", "name another method")]
        return no_shares(config, tasks, "they share 1, none is below 0, not all are 0")

    @property
    def models(self) -> list[Checkpoint]:
        return [*([self.pretrained] if self.config.space == "delta" else []), *self.tuned.values()]

    @property
    def factor(self) -> float:
        """How far from the first to the second."""
        return self.weights[1] / sum(self.weights)

    def coefficients(self, info: TensorInfo) -> tuple[list[float], TensorRecord | None]:
        result = slerp_coefficients(self.gram(info)[None], [self.factor], self.config.epsilon, space=self.config.space)
        angles, lerp = result.angles[0].tolist(), result.lerp[0].double().tolist()
        record = TensorRecord(tensor=info.name, numel=info.numel, core=0, angles=angles, lerp=lerp)
        return result.coefficients[0].tolist(), record

    def definition(self, info: TensorInfo) -> Definition:
        delta = self.config.space == "delta"
        vectors = moves_of(self.models, info) if delta else vectors_of(self.models, info)
        folds = sequential_slerp(runs_of(vectors, info.numel), [self.factor], self.config.epsilon)
        wanted = combined(vectors, folds)
        return from_origin(wanted, self.pretrained, info.name) if delta else wanted
