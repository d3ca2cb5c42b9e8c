"""What an element is chosen by (`regions.measure`), and among which (`regions.scope`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.errors import entry
from cpift.method.changes import ChangesInPassing

if TYPE_CHECKING:
    import torch
    from cpift_kernels import Models

Block = tuple[int, int]  # tensors [first, last) that are selected from together


@dataclass(frozen=True)
class Update:
    """|θi − θ0|, of some tensors of θ0 and the tuned models (`cpift_kernels.Models`)."""

    formula: ClassVar[str] = "|θi − θ0|"
    threshold: ClassVar[str] = "|Δ|"  # what a core's threshold is of
    needs_moments: ClassVar[bool] = False

    models: Sequence[Checkpoint]  # θ0 first
    names: Sequence[str]
    passing: ChangesInPassing | None = None  # measures what is loaded
    moments: Sequence[Checkpoint] = ()  # of the tuned models, in their order, where it `needs_moments`

    @property
    def sizes(self) -> list[int]:
        return [self.models[0].tensors[name].numel for name in self.names]

    @property
    def tasks(self) -> int:
        return len(self.models) - 1

    def load(self, model: int, tensor: int, start: int, stop: int) -> torch.Tensor:
        values = self.models[model].slice(self.names[tensor], start, stop)
        if model and self.passing is not None:
            origin = self.models[0].slice(self.names[tensor], start, stop)
            self.passing(model - 1, self.names[tensor], start, origin, values)
        return values

    def gather(self, model: int, tensor: int, starts: np.ndarray, length: int) -> torch.Tensor:
        return self.models[model].gather(self.names[tensor], starts, length)

    def prefetch(self, tensor: int, start: int, stop: int) -> None:
        for model in (*self.models, *self.moments):
            model.prefetch(self.names[tensor], start, stop)

    def release(self, tensor: int, start: int, stop: int) -> None:
        for model in (*self.models, *self.moments):
            model.release(self.names[tensor], start, stop)


@dataclass(frozen=True)
class Significance(Update):
    """|θi − θ0|·|θ0|: θ0 reads as 0, θi as (θi − θ0)·θ0 in float32, difference and product each rounded."""

    formula = "|θi − θ0|·|θ0|"
    threshold = "|Δ|·|θ0|"

    def load(self, model: int, tensor: int, start: int, stop: int) -> torch.Tensor:
        origin = super().load(0, tensor, start, stop).float()
        return _scaled(origin, super().load(model, tensor, start, stop).float() if model else origin)

    def gather(self, model: int, tensor: int, starts: np.ndarray, length: int) -> torch.Tensor:
        origin = super().gather(0, tensor, starts, length)
        return _scaled(origin, super().gather(model, tensor, starts, length) if model else origin)


@dataclass(frozen=True)
class Curvature(Update):
    """(θi − θ0)²·vi, vi AdamW's second moments of the fine-tune i, which stand for the diagonal of the Fisher matrix
    (arXiv 2509.11167): what the loss would rise by to second order, up to a factor, if an update were taken back.

    Compared by its root, which has the same order and does not vanish in float32: θ0 reads as 0, θi as
    (θi − θ0)·√vi, difference, root and product each rounded. `curvature_in_fp64` is the definition.
    """

    formula = "(θi − θ0)²·vi"
    threshold = "|Δ|·√v"
    needs_moments = True

    def load(self, model: int, tensor: int, start: int, stop: int) -> torch.Tensor:
        origin = super().load(0, tensor, start, stop).float()
        if not model:
            return origin - origin  # NaN where it is not finite
        moments = self.moments[model - 1].slice(self.names[tensor], start, stop)
        return _curved(origin, super().load(model, tensor, start, stop).float(), moments)

    def gather(self, model: int, tensor: int, starts: np.ndarray, length: int) -> torch.Tensor:
        origin = super().gather(0, tensor, starts, length)
        if not model:
            return origin - origin
        moments = self.moments[model - 1].gather(self.names[tensor], starts, length)
        return _curved(origin, super().gather(model, tensor, starts, length), moments)


def curvature_in_fp64(origin: np.ndarray, tuned: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """fp64 [n]: (θi − θ0)²·vi of the elements of one task."""
    scores: np.ndarray = (tuned.astype(np.float64) - origin.astype(np.float64)) ** 2 * moments.astype(np.float64)
    return scores


def without_passing(models: Models) -> Models:
    """The same, measuring nothing of what is loaded."""
    return replace(models, passing=None) if isinstance(models, Update) else models


def _scaled(origin: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (values - origin).mul_(origin)


def _curved(origin: torch.Tensor, values: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    return (values - origin).mul_(moments.float().sqrt())


@dataclass(frozen=True)
class Scope:
    """Among which elements the top p is taken."""

    formula: str
    by_tensor: bool = False

    def blocks(self, tensors: int) -> list[Block]:
        """Of so many tensors those that are selected from together."""
        return [(t, t + 1) for t in range(tensors)] if self.by_tensor else [(0, tensors)]


MEASURES: dict[str, type[Update]] = {
    "update": Update,
    "significance": Significance,
    "curvature": Curvature,
}
SCOPES: dict[str, Scope] = {
    "global": Scope("the top ⌊p·D⌋ of all elements at once"),
    "tensor": Scope("the top ⌊p·n⌋ of the n elements of each tensor", by_tensor=True),
}


def measure_named(name: str) -> type[Update]:
    """Raises CpiftError for a name that is none of MEASURES."""
    return entry(MEASURES, name, "regions.measure")


def scope_named(name: str) -> Scope:
    """Raises CpiftError for a name that is none of SCOPES."""
    return entry(SCOPES, name, "regions.scope")
