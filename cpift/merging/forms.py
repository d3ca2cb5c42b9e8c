"""The two forms that most ways to merge have: weighted sums of models, and formulas over updates.

`WeightedMerge` is Σ c·θ with the same c for a whole tensor; `UpdateMerge` is θ0 and what a formula makes of θi − θ0,
element by element.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from cpift_kernels import fused_apply, masked_gram

from cpift.checkpoints.finite import all_finite, require_finite
from cpift.checkpoints.slices import Piece, sweep
from cpift.checkpoints.writing import TensorRecord
from cpift.config.fusion import FusionConfig
from cpift.errors import CpiftError, Problem
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import Merged, MergeMethod
from cpift.merging.definition import Definition, Expected, in_fp64
from cpift.merging.signs import NONE

if TYPE_CHECKING:
    import torch

_RUN = 1 << 18  # elements whose updates are held in fp32 at once, a multiple of 32


class WeightedMerge(MergeMethod):
    """Any merge that is Σ c_m·θ_m with the same c for a whole tensor."""

    on_gpu = True
    combines_updates: ClassVar[bool] = False  # whether the coefficients sum to 1: θ0 plus multiples of whole updates

    @abstractmethod
    def coefficients(self, info: TensorInfo) -> tuple[list[float], TensorRecord | None]:
        """One factor for each of `models`, and a record."""

    def gram(self, info: TensorInfo) -> torch.Tensor:
        """fp64 [M, M]: the products of (first of `models`, others − first) over a whole tensor, read in slices.

        Raises CheckpointError naming a model that is not finite.
        """
        import torch

        total = torch.zeros(len(self.models), len(self.models), dtype=torch.float64)
        for start, stop in sweep(self.models, info, self.pieces(info)):
            first, *others = (model.slice(info.name, start, stop) for model in self.models)
            total += masked_gram(first, others, None)[0]
        if not total.isfinite().all():
            for label, model in {"θ0": self.pretrained, **self.tuned}.items():
                if model in self.models:
                    require_finite(label, model, [info.name])
        return total

    def merged(self, info: TensorInfo) -> Merged:
        import torch

        with self.named(f"coefficients of tensor {info.name}"):
            factors, record = self.coefficients(info)
        if len(factors) != len(self.models) or not all(map(math.isfinite, factors)):
            what = f"merge method {self.config.method_name}: tensor {info.name}: coefficients {factors}"
            raise CpiftError(f"{what} → give a finite number for each of {len(self.models)} models")
        used = [(model, factor) for model, factor in zip(self.models, factors, strict=True) if factor != 0.0]
        used = used or [(self.models[0], 0.0)]
        scale = torch.tensor([[factor for _, factor in used]], dtype=torch.float64)

        def fill(start: int, stop: int, out: torch.Tensor) -> None:
            sources = [model.slice(info.name, start, stop) for model, _ in used]
            fused_apply(out, sources, scale, [None] * len(sources))

        return record, fill


class UpdateMerge(MergeMethod):
    """Merges of updates by a formula that needs them element by element.

    An update is θi − θ0, rounded to fp32 once. The definition is of the same updates, so that both choose the same
    elements where they compare them."""

    def merged(self, info: TensorInfo) -> Merged:
        def fill(start: int, stop: int, out: torch.Tensor) -> None:
            for first, last in self.runs(info, start, stop):
                origin, updates = self.updates(info.name, first, last)
                with self.named(f"tensor {info.name}, elements {first} to {last - 1}"):
                    update = self.update(info.name, first, last, updates)
                    self._require_update(update, info.name, first, last)
                out[first - start : last - start] = origin + update

        return None, fill

    def runs(self, info: TensorInfo, start: int, stop: int) -> list[Piece]:
        """A slice cut into what is held in fp32 at once; between rows where these may not be cut."""
        return row_runs(self.row_width(self.config, info), start, stop)

    def updates(self, name: str, start: int, stop: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """fp32 [stop - start]: θ0, and the updates."""
        origin = self.pretrained.slice(name, start, stop).float()
        return origin, [model.slice(name, start, stop).float() - origin for model in self.tuned.values()]

    def _require_update(self, update: Any, name: str, start: int, stop: int) -> None:
        """Raise CpiftError for what cannot be added to θ0; CheckpointError where it is a model that is not finite."""
        import torch

        where = f"merge method {self.config.method_name}: tensor {name}, elements {start} to {stop - 1}"
        if not isinstance(update, torch.Tensor):
            raise CpiftError(f"{where}: gives a {type(update).__name__} → give a tensor")
        if tuple(update.shape) != (stop - start,) or update.dtype != torch.float32:
            what = f"gives {str(update.dtype).removeprefix('torch.')} {list(update.shape)}"
            raise CpiftError(f"{where}: {what} → give float32 [{stop - start}], an element each")
        if not all_finite(update):
            for label, model in {"θ0": self.pretrained, **self.tuned}.items():
                require_finite(label, model, [name])
            remedy = "mend its formula, if it is your own; else give smaller weights or a smaller scale"
            raise CpiftError(f"{where}: gives NaN or Inf of finite models → {remedy}")

    @property
    def magnifies(self) -> float:
        """By how much an update may be larger than those it is made of; rounding is judged by it."""
        kept = min(self.densities) if "density" in self.fields else 1.0
        return max(abs(self.config.scale), 1.0) / kept if "scale" in self.fields else 1 / kept

    @abstractmethod
    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        """fp32 [stop - start], what is added to θ0; updates: fp32, one a task."""

    @abstractmethod
    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        """The same in fp64, [stop - start], as the formula has it; updates: fp64 [N, stop - start]."""

    def definition(self, info: TensorInfo) -> Definition:
        def values(start: int, stop: int) -> Expected:
            origin = in_fp64(self.pretrained, info.name, start, stop)
            tuned = [in_fp64(model, info.name, start, stop) for model in self.tuned.values()]
            updates = rounded_updates(origin, tuned)
            scale = np.max(np.abs([origin, *tuned]), axis=0, initial=0.0) * self.magnifies
            values_wanted = origin + self.defined_update(info.name, start, stop, updates)
            return Expected(values_wanted, np.arange(stop - start), scale)

        return values


def row_runs(width: int, start: int, stop: int) -> list[Piece]:
    """A slice cut into runs of elements that are computed with at once; between rows where their width is given."""
    step = max(_RUN // width, 1) * width if width else _RUN
    return [(at, min(at + step, stop)) for at in range(start, stop, step)]


def rounded_updates(origin: np.ndarray, tuned: Sequence[np.ndarray]) -> np.ndarray:
    """fp64 [N, n]: θi − θ0, rounded to fp32 once."""
    found: np.ndarray = np.stack([vector - origin for vector in tuned]).astype(np.float32).astype(np.float64)
    return found


# ---- weights that are divided by their sum or not (`fusion.normalize`) -----------------------------------------------


def summed(weights: Sequence[float], config: FusionConfig) -> list[float]:
    """Factors of updates that are added up: λ·w, with `normalize` λ·w / Σ w."""
    if not config.normalize:
        return list(weights) if config.scale == 1 else [config.scale * weight for weight in weights]
    return [config.scale * weight / sum(weights) for weight in weights]


def sum_problems(config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
    """Why weights that are numbers cannot be normalised."""
    weights = [config.weights.get(task, config.weight) for task in tasks]
    if not config.normalize or abs(sum(weights)) > NONE:
        return []
    return [Problem("fusion.weights", f"sum to {sum(weights):g}, and `normalize` divides by it", "give others")]
