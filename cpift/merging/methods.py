"""Other ways to merge, on the same streaming engine: what CPI-FT's fusion has to be better than.

linear            Σ w_i·θi / Σ w_i
task arithmetic   θ0 + Σ λ_i·(θi − θ0)                                    (arXiv 2212.04089)
slerp             SLERP(θ1, θ2, t), tensor by tensor; of more models one after another, ω_i = 1/(i+1)
TIES              θ0 + λ·mean of the largest updates that agree in sign   (arXiv 2306.01708)
DARE              θ0 + Σ λ_i·(θi − θ0)·b / d,  b ~ Bernoulli(d)           (arXiv 2311.03099)
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from cpift_kernels import fused_apply, masked_gram, slerp_coefficients, unpack_mask

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.finite import require_finite
from cpift.checkpoints.slices import Piece, pieces, sweep
from cpift.config.run import FusionConfig
from cpift.errors import CpiftError, entry
from cpift.formats.safetensors import TensorInfo
from cpift.merging.fusion import Fill, Fusion, FusionInputs, copy_of
from cpift.method.masks import RegionMasks

if TYPE_CHECKING:
    import torch

_RUN = 1 << 18  # elements whose updates are held in fp32 at once, a multiple of 32


class Baseline(ABC):
    """A method that looks at θ0 and θ1..θN alone; tensors that are not floating-point are θ0's."""

    def __init__(self, pretrained: Checkpoint, tuned: Mapping[str, Checkpoint], config: FusionConfig):
        self.pretrained, self.tuned, self.config = pretrained, dict(tuned), config
        self.weights = [config.weights.get(task, config.weight) for task in tuned]

    @property
    def models(self) -> list[Checkpoint]:
        return [self.pretrained, *self.tuned.values()]

    def prepare(self) -> list[dict[str, Any]]:
        return []

    def pieces(self, info: TensorInfo) -> list[Piece]:
        return pieces(info.numel)

    def tensor(self, info: TensorInfo) -> tuple[dict[str, Any] | None, Fill]:
        return self.merged(info) if info.floating else (None, copy_of(self.pretrained, "θ0", info))

    @abstractmethod
    def merged(self, info: TensorInfo) -> tuple[dict[str, Any] | None, Fill]:
        """`tensor` of a floating-point tensor."""


class Combination(Baseline):
    """Any merge that is Σ c_m·θ_m with the same c for a whole tensor."""

    @abstractmethod
    def coefficients(self, info: TensorInfo) -> tuple[list[float], dict[str, Any] | None]:
        """One factor for each of `models`, and a record."""

    def merged(self, info: TensorInfo) -> tuple[dict[str, Any] | None, Fill]:
        import torch

        factors, record = self.coefficients(info)
        used = [(model, factor) for model, factor in zip(self.models, factors, strict=True) if factor != 0.0]
        scale = torch.tensor([[factor for _, factor in used]], dtype=torch.float64)

        def fill(start: int, stop: int, out: torch.Tensor) -> None:
            sources = [model.slice(info.name, start, stop) for model, _ in used]
            fused_apply(out, sources, scale, [None] * len(sources))

        return record, fill


class Linear(Combination):
    """The weighted mean of the fine-tunes."""

    @property
    def models(self) -> list[Checkpoint]:
        return list(self.tuned.values())

    def coefficients(self, info: TensorInfo) -> tuple[list[float], dict[str, Any] | None]:
        return [weight / sum(self.weights) for weight in self.weights], None


class TaskArithmetic(Combination):
    """θ0 plus the weighted updates."""

    def coefficients(self, info: TensorInfo) -> tuple[list[float], dict[str, Any] | None]:
        return [1.0 - sum(self.weights), *self.weights], None


class Slerp(Combination):
    """SLERP of fine-tunes one after another, a vector being one tensor; LERP where the angle is below `epsilon`.

    `factors`: the ω of every fold. Of two tasks it is `t`; of more 1/(i+1), by which each weighs the same.
    """

    def __init__(self, pretrained: Checkpoint, tuned: Mapping[str, Checkpoint], config: FusionConfig):
        super().__init__(pretrained, tuned, config)
        if len(tuned) != 2 and (len(tuned) < 2 or config.t != 0.5):
            remedy = "leave out fusion.t" if len(tuned) > 2 else "add a task"
            raise CpiftError(f"fusion.t {config.t:g}: is for two tasks, the config has {len(tuned)} → {remedy}")
        self.factors = [config.t] if len(tuned) == 2 else [1 / (i + 1) for i in range(1, len(tuned))]

    @property
    def models(self) -> list[Checkpoint]:
        return list(self.tuned.values())

    def coefficients(self, info: TensorInfo) -> tuple[list[float], dict[str, Any] | None]:
        import torch

        size = len(self.tuned)
        gram = torch.zeros(1, size, size, dtype=torch.float64)
        for start, stop in sweep(self.models, info, self.pieces(info)):
            first, *others = (model.slice(info.name, start, stop) for model in self.models)
            gram += masked_gram(first, others, None)
        try:
            result = slerp_coefficients(gram, self.factors, self.config.epsilon)
        except ValueError:
            for task, model in self.tuned.items():
                require_finite(task, model, [info.name])
            raise
        record = {"tensor": info.name, "numel": info.numel, "core": 0}
        record |= {"angles": result.angles[0].tolist(), "lerp": result.lerp[0].double().tolist()}
        return result.coefficients[0].tolist(), record


class Updates(Baseline):
    """Merges of updates θi − θ0 (fp32) by a formula that needs them element by element."""

    def merged(self, info: TensorInfo) -> tuple[dict[str, Any] | None, Fill]:
        def fill(start: int, stop: int, out: torch.Tensor) -> None:
            for first in range(start, stop, _RUN):
                last = min(first + _RUN, stop)
                origin = self.pretrained.slice(info.name, first, last).float()
                updates = [model.slice(info.name, first, last).float() - origin for model in self.tuned.values()]
                out[first - start : last - start] = origin + self.update(info.name, first, last, updates)

        return None, fill

    @abstractmethod
    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        """fp32 [stop - start], what is added to θ0; updates: fp32, one a task."""


class Ties(Updates):
    """Trim, elect a sign, average what agrees. What is kept of each update is its core region for p = `density`."""

    def __init__(self, pretrained: Checkpoint, tuned: Mapping[str, Checkpoint], config: FusionConfig, trimmed: Path):
        super().__init__(pretrained, tuned, config)
        self.masks = RegionMasks(trimmed, list(tuned))
        self._formulas = merge_utilities()

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        kept = [
            torch.where(unpack_mask(self.masks.words(task, name, start, stop), stop - start), update, 0.0)
            for task, update in zip(self.tuned, updates, strict=True)
        ]
        stacked, weights = torch.stack(kept), torch.tensor(self.weights)
        agreeing = self._formulas.calculate_majority_sign_mask(stacked, method="total")
        merged: torch.Tensor = self._formulas.disjoint_merge(stacked * weights[:, None], agreeing)
        return merged


class Dare(Updates):
    """Drop updates at random, rescale the rest. An element's fate depends on the seed, its task, tensor and index
    alone, so it is the same in every slice and on every machine."""

    def __init__(self, pretrained: Checkpoint, tuned: Mapping[str, Checkpoint], config: FusionConfig, seed: int):
        super().__init__(pretrained, tuned, config)
        self.seed = seed
        self._formulas = merge_utilities()

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        density = self.config.density
        kept = [
            torch.where(torch.from_numpy(survives(self.seed, task, name, start, stop, density)), update / density, 0.0)
            for task, update in zip(self.tuned, updates, strict=True)
        ]
        merged: torch.Tensor = self._formulas.task_arithmetic(kept, torch.tensor(self.weights))
        return merged


def survives(seed: int, task: str, name: str, start: int, stop: int, density: float) -> np.ndarray:
    """Bool [stop - start]: whether each element is kept, with probability `density`; SplitMix64 of its index."""
    key = hashlib.sha256(f"{seed}\0{task}\0{name}".encode()).digest()
    state = np.arange(start, stop, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(int.from_bytes(key[:8], "little"))
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(32)) < np.uint64(round(density * 2**32))


def merge_utilities() -> Any:
    """PEFT's formulas. Raises CpiftError if it is not installed."""
    try:
        from peft.utils import merge_utils
    except ImportError as error:
        raise CpiftError("fusion.method: ties and dare need the package peft → pip install 'cpift[peft]'") from error
    return merge_utils


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Materials:
    """What a method may be made from. `trimmed`: the masks of the largest updates, made when asked for."""

    inputs: FusionInputs
    config: FusionConfig
    seed: int
    trimmed: Callable[[], Path]

    @property
    def models(self) -> tuple[Checkpoint, Mapping[str, Checkpoint], FusionConfig]:
        return self.inputs.pretrained, self.inputs.tuned, self.config


@dataclass(frozen=True)
class Method:
    """What `fusion.method` may be."""

    make: Callable[[Materials], Fusion | Baseline]
    told: Callable[[FusionConfig], str]  # by what it is set, for people
    reads: int = 0  # times that every model is read before the pass that writes
    seeded: bool = False


def _weighted(config: FusionConfig) -> str:
    own = "".join(f", {task} {weight:g}" for task, weight in config.weights.items())
    return f"weight {config.weight:g}{own}"


def _thinned(config: FusionConfig) -> str:
    return f"{_weighted(config)}, density {config.density:g}"


def _transplanted(config: FusionConfig) -> str:
    return (
        f"core transplant (conflicts: {config.conflict}), then SLERP of {config.space} "
        f"by {config.granularity}, ω = {config.omega}, LERP below {config.epsilon:g} rad"
    )


METHODS: dict[str, Method] = {
    "cpift": Method(lambda it: Fusion(it.inputs, it.config), _transplanted, reads=1),
    "linear": Method(lambda it: Linear(*it.models), _weighted),
    "task_arithmetic": Method(lambda it: TaskArithmetic(*it.models), _weighted),
    "slerp": Method(lambda it: Slerp(*it.models), lambda c: f"t = {c.t:g}, LERP below {c.epsilon:g} rad"),
    "ties": Method(lambda it: Ties(*it.models, it.trimmed()), _thinned, reads=1),
    "dare": Method(lambda it: Dare(*it.models, it.seed), _thinned, seeded=True),
}


def method_named(name: str) -> Method:
    """Raises CpiftError for a name that is none of METHODS."""
    return entry(METHODS, name, "fusion.method")
