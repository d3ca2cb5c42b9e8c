"""Fusion: transplant every core into the backbone, SLERP the rest (docs/method.md, stage 5).

Tensors are streamed in slices: θ_base, θ0 and all θi of one run of elements at a time. Sequential SLERP of N models is
a linear combination whose coefficients follow from the masked Gram matrix, so a tensor is walked twice: for the Gram
matrix, and to write the result. Slices have one fixed size and are summed in order: the result does not depend on the
memory, the number of workers or where a shard ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cpift_kernels import (
    count_mask,
    fused_apply,
    masked_gram,
    pack_mask,
    resolve_conflicts,
    slerp_coefficients,
    union_mask,
    unpack_mask,
)
from cpift_kernels.overlap import ConflictPolicy

from cpift.checkpoints.checkpoint import Checkpoint, require_same_layout
from cpift.checkpoints.finite import all_finite, require_finite
from cpift.checkpoints.slices import Piece, pieces, sweep
from cpift.config.run import FusionConfig
from cpift.errors import entry
from cpift.formats.safetensors import TensorInfo
from cpift.method.masks import NoCores, RegionMasks

if TYPE_CHECKING:
    import torch

Fill = Callable[[int, int, "torch.Tensor"], None]  # writes elements start..stop-1 into a buffer [stop - start]


@dataclass(frozen=True)
class FusionInputs:
    """Everything that is fused. `tuned` in the order in which the SLERP folds; `priority` in stage order."""

    pretrained: Checkpoint
    backbone: Checkpoint
    tuned: Mapping[str, Checkpoint]
    regions: Path
    priority: Sequence[str]

    def check(self) -> None:
        """Raise CheckpointError if a model does not fit the pre-trained one."""
        require_same_layout(self.pretrained, {"backbone": self.backbone, **self.tuned})


def copy_of(model: Checkpoint, label: str, info: TensorInfo) -> Fill:
    """Writes a tensor as it is in a model. Raises CheckpointError where it is not finite."""

    def fill(start: int, stop: int, out: torch.Tensor) -> None:
        values = model.slice(info.name, start, stop)
        if info.floating and not all_finite(values):
            require_finite(label, model, [info.name])
        out.copy_(values)

    return fill


@dataclass(frozen=True)
class Conflict:
    """What `fusion.conflict` may be."""

    rule: ConflictPolicy  # the kernel's
    by_stage: bool = False  # tasks in stage order, so that the later stage wins; else as the config has them
    agreeing: bool = False  # what tasks pull apart is core of none


CONFLICTS = {
    "magnitude": Conflict("magnitude"),
    "last": Conflict("last", by_stage=True),
    "mean": Conflict("mean"),
    "agree": Conflict("magnitude", agreeing=True),
}


@dataclass(frozen=True)
class Vector:
    """What `fusion.granularity` may be: what has an angle of its own."""

    row: bool = False
    model: bool = False


VECTORS = {"tensor": Vector(), "row": Vector(row=True), "model": Vector(model=True)}
SPACES: dict[str, bool] = {"weights": False, "delta": True}  # `fusion.space` → whether vectors begin at θ0


def omegas(config: FusionConfig, tasks: int) -> list[float]:
    """Interpolation factors ω_1..ω_N: 1/(i+1), or the fixed number."""
    if config.omega == "uniform":
        return [1 / (i + 1) for i in range(1, tasks + 1)]
    return [float(config.omega)] * tasks


@dataclass(frozen=True)
class Operands:
    """Some elements of one parameter in all models. `masks` has a packed mask a task, conflicts resolved."""

    sources: list[torch.Tensor]  # [θ0 (delta space only), θ_base, θ1..θN]
    masks: list[torch.Tensor | None]  # one a source; None for those that donate nothing
    core: torch.Tensor  # union of the cores


class Fusion:
    """CPI-FT's fusion of `inputs` under `config`, tensor by tensor and slice by slice."""

    def __init__(self, inputs: FusionInputs, config: FusionConfig):
        self.inputs, self.config = inputs, config
        self._conflict = entry(CONFLICTS, config.conflict, "fusion.conflict")
        self.vector = entry(VECTORS, config.granularity, "fusion.granularity")
        self.from_origin = entry(SPACES, config.space, "fusion.space")
        self.masks = (RegionMasks if config.transplant else NoCores)(inputs.regions, list(inputs.tuned))
        self._model: tuple[torch.Tensor, dict[str, Any]] | None = None

    @property
    def models(self) -> list[Checkpoint]:
        """Every model that is read, each once."""
        inputs = self.inputs
        return list({id(m): m for m in (inputs.pretrained, inputs.backbone, *inputs.tuned.values())}.values())

    def prepare(self) -> list[dict[str, Any]]:
        """What must be known of the whole model before the first tensor, and records of it: with granularity `model`,
        its one angle a fold, which takes a read of everything."""
        import torch

        if not self.vector.model:
            return []
        total: torch.Tensor | float = 0.0
        for name in self.inputs.backbone.names:
            if self.masks.has(name):
                total = total + self._gram(self.inputs.backbone.tensors[name])[0]
        assert isinstance(total, torch.Tensor)  # a parameter space is never empty
        coefficients, angles, lerp = self._slerp(total, "(model)")
        record = {"tensor": "(model)", "numel": 0, "core": 0, "angles": angles, "lerp": lerp}
        self._model = coefficients, record
        return [record]

    def pieces(self, info: TensorInfo) -> list[Piece]:
        """The slices of a tensor, cut between rows where every row has its own angle."""
        width = info.numel // info.shape[0] if self._by_row(info) and info.shape[0] else 0
        return pieces(info.numel, width)

    def tensor(self, info: TensorInfo) -> tuple[dict[str, Any] | None, Fill]:
        """A record of one tensor (None outside the parameter space), and what writes any of its `pieces`."""
        if not self.masks.has(info.name):  # θ_base bit for bit
            return None, copy_of(self.inputs.backbone, "backbone", info)
        record: dict[str, Any] = {"tensor": info.name, "numel": info.numel, "core": 0}
        if self._model is not None:
            coefficients = self._model[0]
            record["core"] = self._core_count(info)
        else:
            gram, record["core"] = self._gram(info)
            coefficients, record["angles"], record["lerp"] = self._slerp(gram, info.name)
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

    def _by_row(self, info: TensorInfo) -> bool:
        return self.vector.row and len(info.shape) >= 2 and self.masks.has(info.name)

    def sources(self, name: str, start: int, stop: int) -> list[torch.Tensor]:
        """Elements of [θ0 (delta space only), θ_base, θ1..θN]."""
        inputs = self.inputs
        first = [inputs.pretrained] if self.from_origin else []
        return [model.slice(name, start, stop) for model in (*first, inputs.backbone, *inputs.tuned.values())]

    def operands(self, name: str, start: int, stop: int) -> Operands:
        """Elements start..stop-1 of one parameter, ready to be fused; start is a multiple of 32."""
        inputs, tasks = self.inputs, list(self.inputs.tuned)
        masks = self._cores(name, start, stop)
        sources = self.sources(name, start, stop)
        tuned = dict(zip(tasks, sources[-len(tasks) :], strict=True))
        # `last` lets the later stage win, `magnitude` breaks ties for the earlier task: each has its own order.
        order = list(inputs.priority) if self._conflict.by_stage else tasks
        pretrained = inputs.pretrained.slice(name, start, stop)
        models, cores = [tuned[task] for task in order], [masks[task] for task in order]
        resolved = resolve_conflicts(self._conflict.rule, pretrained, models, cores)
        owned = dict(zip(order, resolved, strict=True))
        return Operands(
            sources=sources,
            masks=[*[None] * (len(sources) - len(tasks)), *(owned[task] for task in tasks)],
            core=union_mask(list(masks.values())),
        )

    def union(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The packed union of the cores of all tasks; start is a multiple of 32."""
        return union_mask(list(self._cores(name, start, stop).values()))

    def _cores(self, name: str, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Every task's packed core; with conflict `agree` without what tasks that share it pull apart."""
        tasks = self.inputs.tuned
        masks = {task: self.masks.words(task, name, start, stop) for task in tasks}
        if not self._conflict.agreeing:
            return masks
        pretrained = self.inputs.pretrained.slice(name, start, stop)
        updates = {task: model.slice(name, start, stop).float() - pretrained.float() for task, model in tasks.items()}
        kept = ~pack_mask(_pulled_apart(updates, masks))
        return {task: words & kept for task, words in masks.items()}

    def _core_count(self, info: TensorInfo) -> int:
        return sum(count_mask(self.union(info.name, start, stop)) for start, stop in self.pieces(info))

    def _gram(self, info: TensorInfo) -> tuple[torch.Tensor, int]:
        """The Gram matrices [R, M, M] over the non-core elements, and the number of core elements."""
        import torch

        by: Literal["row", "tensor"] = "row" if self._by_row(info) else "tensor"
        width, core, grams = (info.numel // info.shape[0] if by == "row" and info.shape[0] else 0), 0, []
        for start, stop in sweep(self.models, info, self.pieces(info)):
            sources, union = self.sources(info.name, start, stop), self.union(info.name, start, stop)
            core += count_mask(union)
            shaped = [source.view(-1, width) for source in sources] if width else sources
            grams.append(masked_gram(shaped[0], shaped[1:], union, granularity=by))
        if not grams:
            size = len(self.inputs.tuned) + (2 if self.from_origin else 1)
            return torch.zeros(1, size, size, dtype=torch.float64), 0
        return (torch.cat(grams) if by == "row" else sum(grams[1:], grams[0])), core

    def _slerp(self, gram: torch.Tensor, name: str) -> tuple[torch.Tensor, list[float], list[float]]:
        """Coefficients (R, sources); per fold the mean angle in radians and the share of vectors that took LERP."""
        factors = omegas(self.config, len(self.inputs.tuned))
        try:
            result = slerp_coefficients(gram, factors, self.config.epsilon, space=self.config.space)
        except ValueError:
            self._raise_if_not_finite(name)
            raise
        return result.coefficients, result.angles.mean(0).tolist(), result.lerp.double().mean(0).tolist()

    def _raise_if_not_finite(self, name: str) -> None:
        names = None if name == "(model)" else [name]
        for label, model in {"backbone": self.inputs.backbone, **self.inputs.tuned}.items():
            require_finite(label, model, names)


def _pulled_apart(updates: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Bool [n]: elements that one task whose core they are in moved up, and another one down."""
    import torch

    up, down = torch.zeros(2, len(next(iter(updates.values()))), dtype=torch.bool)
    for task, update in updates.items():
        core = unpack_mask(masks[task], len(update))
        up, down = up | core & (update > 0), down | core & (update < 0)
    return up & down


def lerp_share(record: Mapping[str, Any]) -> float:
    """Share of (tensor, fold) pairs that took the LERP branch."""
    shares = [share for entry in record["tensors"] for share in entry.get("lerp", ())]
    return sum(shares) / len(shares) if shares else 0.0
