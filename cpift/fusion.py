"""Fusion: transplant every core into the backbone, SLERP the rest (METHOD.md, stage 5).

Tensors are streamed: θ_base, θ0 and all θi of one parameter at a time. Sequential SLERP of N models is a linear
combination whose coefficients follow from the masked Gram matrix, so one pass reads and one writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from cpift_kernels import (
    count_mask,
    fused_apply,
    gather_masked,
    masked_gram,
    resolve_conflicts,
    slerp_coefficients,
    union_mask,
)

from cpift.checkpoints import Checkpoint, TensorInfo, require_finite, require_same_layout, write_like
from cpift.config import FusionConfig
from cpift.regions import read_mask

Progress = Callable[[str], None]


@dataclass(frozen=True)
class FusionInputs:
    """Everything that is fused. `tuned` in the order in which the SLERP folds; `priority` in stage order."""

    pretrained: Checkpoint
    backbone: Checkpoint
    tuned: Mapping[str, Checkpoint]
    regions: Path
    priority: Sequence[str]


@dataclass
class FusionRecord:
    """What happened, tensor by tensor."""

    tensors: list[dict[str, Any]] = field(default_factory=list)
    core_elements: int = 0  # elements that come from a single donor
    core_differing: int = 0  # of these, how many differ from the donor in any bit (0, or the fusion is wrong)


def omegas(config: FusionConfig, tasks: int) -> list[float]:
    """Interpolation factors ω_1..ω_N: 1/(i+1), or the fixed number."""
    if config.omega == "uniform":
        return [1 / (i + 1) for i in range(1, tasks + 1)]
    return [float(config.omega)] * tasks


@dataclass(frozen=True)
class _Operands:
    """One parameter of all models. `masks` has a packed mask a task, conflicts resolved."""

    sources: list[torch.Tensor]  # [θ0 (delta space only), θ_base, θ1..θN]
    masks: list[torch.Tensor | None]  # one a source; None for those that donate nothing
    core: torch.Tensor  # union of the cores


class Fusion:
    """Fuses the models of `inputs` under `config`, writing like the backbone."""

    def __init__(self, inputs: FusionInputs, config: FusionConfig):
        self.inputs, self.config = inputs, config
        self.record = FusionRecord()
        self._model_coefficients: torch.Tensor | None = None

    def write(self, out: Path, progress: Progress = lambda name: None) -> FusionRecord:
        """Write the fused checkpoint into the folder `out`.

        Raises CheckpointError if a model does not fit the pre-trained one or a backbone tensor is not finite.
        """
        inputs = self.inputs
        require_same_layout(inputs.pretrained, {"backbone": inputs.backbone, **inputs.tuned})
        require_finite("backbone", inputs.backbone)
        if self.config.granularity == "model":
            self._model_coefficients = self._coefficients_of_model()

        def produce(info: TensorInfo) -> torch.Tensor:
            progress(info.name)
            return self._fuse(info)

        write_like(inputs.backbone, out, produce)
        return self.record

    def _fuse(self, info: TensorInfo) -> torch.Tensor:
        operands = self._operands(info.name)
        if operands is None:  # outside the parameter space: θ_base bit for bit
            return self.inputs.backbone.tensor(info.name)
        coefficients = self._coefficients(info, operands)
        out = torch.empty(info.shape, dtype=info.dtype)
        fused_apply(out, operands.sources, coefficients, operands.masks)
        self._check_donors(out, operands)
        return out

    def _operands(self, name: str) -> _Operands | None:
        inputs, tasks = self.inputs, list(self.inputs.tuned)
        masks = {task: read_mask(inputs.regions, task, name) for task in tasks}
        if any(mask is None for mask in masks.values()):
            return None
        pretrained = inputs.pretrained.tensor(name)
        tuned = {task: inputs.tuned[task].tensor(name) for task in tasks}
        # `last` lets the later stage win, `magnitude` breaks ties for the earlier task: each has its own order.
        order = list(inputs.priority) if self.config.conflict == "last" else tasks
        resolved = resolve_conflicts(
            self.config.conflict, pretrained, [tuned[task] for task in order], [_present(masks[task]) for task in order]
        )
        owned = dict(zip(order, resolved, strict=True))
        origin = [pretrained] if self.config.space == "delta" else []
        return _Operands(
            sources=[*origin, inputs.backbone.tensor(name), *tuned.values()],
            masks=[*[None] * (len(origin) + 1), *(owned[task] for task in tasks)],
            core=union_mask([_present(mask) for mask in masks.values()]),
        )

    def _gram(self, operands: _Operands) -> torch.Tensor:
        by: Literal["row", "tensor"] = "row" if self.config.granularity == "row" else "tensor"
        return masked_gram(operands.sources[0], operands.sources[1:], operands.core, granularity=by)

    def _coefficients(self, info: TensorInfo, operands: _Operands) -> torch.Tensor:
        core = count_mask(operands.core)
        entry: dict[str, Any] = {"tensor": info.name, "numel": info.numel, "core": core}
        self.record.tensors.append(entry)
        if self._model_coefficients is not None:
            return self._model_coefficients
        coefficients, entry["angles"], entry["lerp"] = self._slerp(self._gram(operands))
        return coefficients

    def _coefficients_of_model(self) -> torch.Tensor:
        """Granularity `model`: one Gram matrix, summed over all tensors, gives one angle a fold."""
        grams = (
            self._gram(found) for name in self.inputs.backbone.names if (found := self._operands(name)) is not None
        )
        total = torch.stack([gram.sum(0) for gram in grams]).sum(0, keepdim=True)
        coefficients, angles, lerp = self._slerp(total)
        self.record.tensors.append({"tensor": "(model)", "numel": 0, "core": 0, "angles": angles, "lerp": lerp})
        return coefficients

    def _slerp(self, gram: torch.Tensor) -> tuple[torch.Tensor, list[float], list[float]]:
        """Coefficients (R, sources); per fold the mean angle in radians and the share of vectors that took LERP."""
        factors = omegas(self.config, len(self.inputs.tuned))
        result = slerp_coefficients(gram, factors, self.config.epsilon, space=self.config.space)
        return result.coefficients, result.angles.mean(0).tolist(), result.lerp.double().mean(0).tolist()

    def _check_donors(self, out: torch.Tensor, operands: _Operands) -> None:
        """Compare every core element that has one donor with that donor, bit for bit."""
        owned = [mask for mask in operands.masks if mask is not None]
        for source, mask in zip(operands.sources, operands.masks, strict=True):
            if mask is None:
                continue
            others = union_mask([other for other in owned if other is not mask]) if len(owned) > 1 else mask & 0
            sole = mask & ~others
            got, wanted = gather_masked(out.reshape(-1), sole), gather_masked(source.reshape(-1), sole).to(out.dtype)
            self.record.core_elements += wanted.numel()
            self.record.core_differing += int((got.view(torch.uint8) != wanted.view(torch.uint8)).sum())


def _present(mask: torch.Tensor | None) -> torch.Tensor:
    assert mask is not None  # `_operands` has already left out such parameters
    return mask


def lerp_share(record: Mapping[str, Any]) -> float:
    """Share of (tensor, fold) pairs that took the LERP branch."""
    shares = [share for entry in record["tensors"] for share in entry.get("lerp", ())]
    return sum(shares) / len(shares) if shares else 0.0
