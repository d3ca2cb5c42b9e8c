"""SLERP of fine-tunes, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence

from cpift_kernels import slerp_coefficients

from cpift.checkpoints.writing import TensorRecord
from cpift.config.run import FusionConfig
from cpift.errors import Problem
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import Contender
from cpift.merging.definition import Definition, combined, runs_of, sequential_slerp, vectors_of
from cpift.merging.forms import WeightedMerge


class Slerp(WeightedMerge):
    """SLERP of fine-tunes one after another, a vector being one tensor; LERP where the angle is below `epsilon`."""

    formula = "SLERP(θ1, θ2, t); of more, one after another by ω_i = 1/(i+1)"
    source = "Shoemake 1985"
    fields = ("t", "epsilon")
    reads = 1
    needs_base = False
    contender = Contender("SLERP", {})

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        if len(tasks) == 2 or (len(tasks) > 2 and config.t == 0.5):
            return []
        remedy = "leave out fusion.t" if len(tasks) > 2 else "add a task"
        return [Problem(f"fusion.t {config.t:g}", f"is for two tasks, the config has {len(tasks)}", remedy)]

    @property
    def factors(self) -> list[float]:
        """The ω of every fold: of two tasks `t`; of more 1/(i+1), by which each weighs the same."""
        return [self.config.t] if len(self.tuned) == 2 else [1 / (i + 1) for i in range(1, len(self.tuned))]

    def coefficients(self, info: TensorInfo) -> tuple[list[float], TensorRecord | None]:
        result = slerp_coefficients(self.gram(info)[None], self.factors, self.config.epsilon)
        angles, lerp = result.angles[0].tolist(), result.lerp[0].double().tolist()
        record = TensorRecord(tensor=info.name, numel=info.numel, core=0, angles=angles, lerp=lerp)
        return result.coefficients[0].tolist(), record

    def definition(self, info: TensorInfo) -> Definition:
        vectors = vectors_of(self.models, info)
        return combined(vectors, sequential_slerp(runs_of(vectors, info.numel), self.factors, self.config.epsilon))
