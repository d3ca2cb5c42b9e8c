"""CPI-FT's fusion: transplant every core into the backbone, SLERP the rest (docs/method.md, stage 5).

Tensors are streamed in slices: θ_base, θ0 and all θi of one run of elements at a time. Sequential SLERP of N models is
a linear combination whose coefficients follow from the masked Gram matrix, so a tensor is walked twice: for the Gram
matrix, and to write the result. Slices have one fixed size and are summed in order: the result does not depend on the
memory, the number of workers or where a shard ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from cpift_kernels import count_mask, fused_apply, masked_gram, slerp_coefficients, union_mask, unpack_mask

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.finite import require_finite
from cpift.checkpoints.slices import sweep
from cpift.checkpoints.writing import TensorRecord
from cpift.config.run import FusionConfig
from cpift.errors import entry
from cpift.extensions import own_code
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import Destination, FusionInputs, Merged, MergeMethod
from cpift.merging.checks import Check, Operands, Tally, check_copied, check_cores, differing_cores
from cpift.merging.conflicts import CONFLICTS, Claims, conflict_named, owned, remaining
from cpift.merging.definition import (
    Definition,
    Expected,
    Fold,
    Runs,
    Vectors,
    combined,
    expected,
    from_origin,
    runs_of,
    sequential_slerp,
)
from cpift.method.masks import NoCores, RegionMasks

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Vector:
    """What `fusion.granularity` may be: what has an angle of its own."""

    row: bool = False
    model: bool = False


VECTORS = {"tensor": Vector(), "row": Vector(row=True), "model": Vector(model=True)}
SPACES: dict[str, bool] = {"weights": False, "delta": True}  # `fusion.space` → whether vectors begin at θ0


def omegas(config: FusionConfig, tasks: int, before: int = 0) -> list[float]:
    """Interpolation factors ω_1..ω_N: 1/(i+1), or the fixed number. before: models that were folded in earlier; i goes
    on from there."""
    if config.omega == "uniform":
        return [1 / (i + 1) for i in range(before + 1, before + tasks + 1)]
    return [float(config.omega)] * tasks


class Fusion(MergeMethod):
    """Core transplant into a backbone, then SLERP of what is core of none, slice by slice."""

    formula = "cores of θ1..θN in θ_base; the rest SLERP(…SLERP(θ_base, θ1, ω_1)…, θN, ω_N)"
    source = "CPI-FT"
    fields = ("omega", "epsilon", "granularity", "space", "conflict", "transplant")
    reads = 1
    late = ("omega", "epsilon")
    on_gpu = True
    compared_where = "sampled elements in no core"

    def __init__(self, inputs: FusionInputs, config: FusionConfig, seed: int = 0):
        super().__init__(inputs, config, seed)
        self.inputs = inputs
        rule = conflict_named(config.conflict)
        with own_code(rule, f"conflict rule {config.conflict_name}: __init__"):
            self._conflict = rule()
        self.vector = entry(VECTORS, config.granularity, "fusion.granularity")
        self.from_origin = entry(SPACES, config.space, "fusion.space")
        masks = RegionMasks if config.transplant else NoCores
        self.masks: RegionMasks = masks(inputs.regions, [*inputs.protected, *inputs.tuned])
        self.of_model: tuple[torch.Tensor, TensorRecord] | None = None  # coefficients [1, M], once it is prepared

    @classmethod
    def described(cls, config: FusionConfig) -> str:
        return (
            f"core transplant (conflicts: {config.conflict_name}), then SLERP of {config.space} "
            f"by {config.granularity}, ω = {config.omega}, LERP below {config.epsilon:g} rad"
        )

    @classmethod
    def row_width(cls, config: FusionConfig, info: TensorInfo) -> int:
        rows = entry(VECTORS, config.granularity, "fusion.granularity").row and len(info.shape) >= 2
        return info.numel // info.shape[0] if rows and info.shape[0] else 0

    @property
    def models(self) -> list[Checkpoint]:
        inputs = self.inputs
        return list({id(m): m for m in (inputs.pretrained, inputs.backbone, *inputs.tuned.values())}.values())

    @property
    def leaves_host(self) -> bool:
        return self.config.conflict in CONFLICTS  # a user's rule was written for the CPU

    def placed(self, at: Destination) -> Fusion:
        other, inputs = super().placed(at), self.inputs
        backbone = at.model(inputs.backbone)
        other.inputs = replace(inputs, pretrained=other.pretrained, backbone=backbone, tuned=other.tuned)
        return other

    def with_masks(self, read: Callable[[RegionMasks], RegionMasks]) -> Fusion:
        other = super().with_masks(read)
        other.masks = read(self.masks)
        return other

    def merges(self, info: TensorInfo) -> bool:
        return self.masks.has(info.name)

    @property
    def rest(self) -> tuple[str, Checkpoint]:
        return "backbone", self.inputs.backbone

    def prepare(self) -> list[TensorRecord]:
        """With granularity `model` its one angle a fold, which takes a read of everything."""
        import torch

        if not self.vector.model:
            return []
        total: torch.Tensor | float = 0.0
        for name in self.inputs.backbone.names:
            if self.masks.has(name):
                total = total + self._gram(self.inputs.backbone.tensors[name])[0]
        assert isinstance(total, torch.Tensor)  # a parameter space is never empty
        coefficients, angles, lerp = self.slerp(total, "(model)")
        record: TensorRecord = {"tensor": "(model)", "numel": 0, "core": 0, "angles": angles, "lerp": lerp}
        self.of_model = coefficients, record
        return [record]

    def merged(self, info: TensorInfo) -> Merged:
        record: TensorRecord = {"tensor": info.name, "numel": info.numel, "core": 0}
        if self.of_model is not None:
            coefficients = self.of_model[0]
            record["core"] = self._core_count(info)
        else:
            gram, record["core"] = self._gram(info)
            coefficients, record["angles"], record["lerp"] = self.slerp(gram, info.name)
        width = info.numel // len(coefficients)

        def fill(start: int, stop: int, out: torch.Tensor) -> None:
            operands = self.operands(info.name, start, stop)
            if len(coefficients) == 1:
                fused_apply(out, operands.sources, coefficients, operands.masks)
                return
            rows = slice(start // width, stop // width)
            sources = [source.view(-1, width) for source in operands.sources]
            fused_apply(out.view(-1, width), sources, coefficients[rows], operands.masks)

        return record, fill

    # ---- cores -------------------------------------------------------------------------------------------------------

    def sources(self, name: str, start: int, stop: int) -> list[torch.Tensor]:
        """Elements of [θ0 (delta space only), θ_base, θ1..θN]."""
        inputs = self.inputs
        first = [inputs.pretrained] if self.from_origin else []
        return [model.slice(name, start, stop) for model in (*first, inputs.backbone, *inputs.tuned.values())]

    def operands(self, name: str, start: int, stop: int) -> Operands:
        """Elements start..stop-1 of one parameter, ready to be fused; start is a multiple of 32."""
        tasks, sources = list(self.tuned), self.sources(name, start, stop)
        donated, core = self.reuse(
            ("donors", name, start, stop),
            lambda: self._donors(name, start, stop, dict(zip(tasks, sources[-len(tasks) :], strict=True))),
        )
        return Operands(sources, masks=[*[None] * (len(sources) - len(donated)), *donated], core=core)

    def _donors(
        self, name: str, start: int, stop: int, known: Mapping[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor | None], torch.Tensor]:
        """What the backbone keeps and each task donates, and the union of all cores; packed masks."""
        claims, kept = self._claims(name, start, stop, known), self._protected(name, start, stop)
        donated = owned(self._conflict, claims, self.config.conflict)
        return [kept, *(donated[task] for task in self.tuned)], _joint(claims, kept)

    def union(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The packed union of the cores of all tasks; start is a multiple of 32."""
        return _joint(self._claims(name, start, stop, {}), self._protected(name, start, stop))

    def _protected(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """The packed union of the cores that the backbone keeps; None where there are none."""
        words = [self.masks.words(task, name, start, stop) for task in self.inputs.protected]
        return union_mask(words) if words else None

    def _claims(self, name: str, start: int, stop: int, known: Mapping[str, torch.Tensor]) -> Claims:
        """Every task's packed core, in the order of the conflict rule, without what that takes from all cores and what
        the backbone keeps."""
        order = list(self.inputs.priority) if self._conflict.by_stage else list(self.tuned)
        cores = {task: self.masks.words(task, name, start, stop) for task in order}
        claims = Claims(self.pretrained, self.tuned, name, start, stop, cores, known)
        kept = self._protected(name, start, stop)
        return remaining(self._conflict, claims if kept is None else claims.without(kept), self.config.conflict)

    def _core_count(self, info: TensorInfo) -> int:
        return sum(count_mask(self.union(info.name, start, stop)) for start, stop in self.pieces(info))

    # ---- angles ------------------------------------------------------------------------------------------------------

    def _gram(self, info: TensorInfo) -> tuple[torch.Tensor, int]:
        """The Gram matrices [R, M, M] over the non-core elements, and the number of core elements; read once where they
        are kept, but for those of rows, which are many."""
        if self.statistics is None or self.vector.row:
            return self._read_gram(info)
        if info.name not in self.statistics:
            self.statistics[info.name] = self._read_gram(info)
        known: tuple[torch.Tensor, int] = self.statistics[info.name]
        return known

    def _read_gram(self, info: TensorInfo) -> tuple[torch.Tensor, int]:
        import torch

        by: Literal["row", "tensor"] = "row" if self.vector.row and len(info.shape) >= 2 else "tensor"
        width, core, grams = self.row_width(self.config, info), 0, []
        for start, stop in sweep(self.models, info, self.pieces(info)):
            sources, union = self.sources(info.name, start, stop), self.union(info.name, start, stop)
            core += count_mask(union)
            shaped = [source.view(-1, width) for source in sources] if width else sources
            grams.append(masked_gram(shaped[0], shaped[1:], union, granularity=by))
        if not grams:
            size = len(self.inputs.tuned) + (2 if self.from_origin else 1)
            return torch.zeros(1, size, size, dtype=torch.float64), 0
        return (torch.cat(grams) if by == "row" else sum(grams[1:], grams[0])), core

    def slerp(self, gram: torch.Tensor, name: str) -> tuple[torch.Tensor, list[float], list[float]]:
        """Coefficients (R, sources); per fold the mean angle in radians and the share of vectors that took LERP."""
        try:
            result = slerp_coefficients(gram, self.factors, self.config.epsilon, space=self.config.space)
        except ValueError:
            names = None if name == "(model)" else [name]
            for label, model in {"backbone": self.inputs.backbone, **self.inputs.tuned}.items():
                require_finite(label, model, names)
            raise
        return result.coefficients, result.angles.mean(0).tolist(), result.lerp.double().mean(0).tolist()

    # ---- verification ------------------------------------------------------------------------------------------------

    def differing(self, info: TensorInfo, start: int, stop: int, out: torch.Tensor) -> tuple[int, int]:
        if not self.merges(info):
            return super().differing(info, start, stop, out)
        return differing_cores(self.operands(info.name, start, stop), out)

    def compared_with(self, info: TensorInfo) -> list[Checkpoint]:
        return self.models if self.merges(info) else super().compared_with(info)

    def checks(self, written: Checkpoint, tallies: Mapping[str, Tally]) -> list[Check]:
        inside, outside = ([name for name in written.names if self.masks.has(name) is has] for has in (True, False))
        name = "every tensor outside the parameter space equals the backbone bit for bit"
        return [check_cores(tallies, inside), check_copied(tallies, outside, name)]

    def compares(self, info: TensorInfo) -> bool:
        """Of a row or the model no tensor is too large: its elements are walked by rows, or for all tensors at once."""
        return super().compares(info) or (self.merges(info) and info.numel > 0 and self.vector != VECTORS["tensor"])

    def definition(self, info: TensorInfo) -> Definition:
        vectors, width = self._vectors(info), self.row_width(self.config, info)
        if width:
            wanted = self._defined_by_row(vectors, width)
        else:
            folds = self._model_folds if self.vector.model else self._folds(runs_of(vectors, info.numel))
            wanted = combined(vectors, folds)
        return from_origin(wanted, self.pretrained, info.name) if self.from_origin else wanted

    def _vectors(self, info: TensorInfo) -> Vectors:
        """θ_base, θ1..θN (less θ0 in delta space), 0 in the cores; and the places in no core."""

        def vectors(start: int, stop: int) -> tuple[list[np.ndarray], np.ndarray]:
            sources, core = self.sources(info.name, start, stop), self.union(info.name, start, stop)
            rest = ~unpack_mask(core, stop - start).numpy()
            values = [source.double().numpy() for source in sources]
            values = [vector - values[0] for vector in values[1:]] if self.from_origin else values
            return [vector * rest for vector in values], np.flatnonzero(rest)

        return vectors

    def _defined_by_row(self, vectors: Vectors, width: int) -> Definition:
        """For elements of whole rows."""

        def values(start: int, stop: int) -> Expected:
            of_rows, places = vectors(start, stop)
            rows = []
            for first in range(0, stop - start, width):
                row = [vector[first : first + width] for vector in of_rows]
                rows.append(expected(row, self._folds(_once(row)), places))
            fields = ([row.values for row in rows], [row.scale for row in rows], [row.gain for row in rows])
            values_there, scale, gain = (np.concatenate(field)[places] for field in fields)
            return Expected(values_there, places, scale, gain)

        return values

    @cached_property
    def _model_folds(self) -> list[Fold]:
        """The folds of granularity `model`: a vector is the whole parameter space, read once a fold."""
        infos = [info for info in self.inputs.backbone.tensors.values() if self.masks.has(info.name)]
        parts = [runs_of(self._vectors(info), info.numel) for info in infos]
        return self._folds(lambda: (run for part in parts for run in part()))

    def _folds(self, runs: Runs) -> list[Fold]:
        return sequential_slerp(runs, self.factors, self.config.epsilon)

    @property
    def factors(self) -> list[float]:
        """ω of each fold."""
        return omegas(self.config, len(self.inputs.tuned), len(self.inputs.protected))


def _joint(claims: Claims, kept: torch.Tensor | None) -> torch.Tensor:
    """The packed union of all cores."""
    return union_mask([*claims.cores.values(), *([] if kept is None else [kept])])


def _once(row: list[np.ndarray]) -> Runs:
    return lambda: iter([lambda: row])
