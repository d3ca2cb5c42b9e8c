"""What a way to merge is: `MergeMethod`, and the two kinds that most are.

`WeightedMerge` is Σ c·θ with the same c for a whole tensor; `UpdateMerge` is θ0 and what a formula makes of θi − θ0,
element by element. One file of `methods/` is one way, and one row of `registry.METHODS`.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import numpy as np
from cpift_kernels import fused_apply

from cpift.checkpoints.checkpoint import Checkpoint, require_same_layout
from cpift.checkpoints.finite import all_finite, require_finite
from cpift.checkpoints.slices import Piece, pieces
from cpift.checkpoints.writing import TensorRecord
from cpift.config.run import FusionConfig
from cpift.errors import CpiftError, Problem, ProblemsError
from cpift.formats.safetensors import TensorInfo
from cpift.merging.checks import Check, OnElements
from cpift.merging.definition import Definition, Expected, in_fp64
from cpift.method.masks import RegionMasks

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

Fill = Callable[[int, int, "torch.Tensor"], None]  # writes elements start..stop-1 into a buffer [stop - start]
Merged = tuple[TensorRecord | None, Fill]  # a record of one tensor if there is anything to say, and what writes it
_RUN = 1 << 18  # elements whose updates are held in fp32 at once, a multiple of 32
_LARGEST = 1 << 24  # elements of a tensor that is not too large for its definition to be evaluated


@dataclass(frozen=True)
class FusionInputs:
    """Everything that is merged. `tuned` in the order in which SLERP folds; `priority` in stage order."""

    pretrained: Checkpoint
    backbone: Checkpoint
    tuned: Mapping[str, Checkpoint]
    regions: Path
    priority: Sequence[str]

    def check(self) -> None:
        """Raise CheckpointError if a model does not fit the pre-trained one."""
        require_same_layout(self.pretrained, {"backbone": self.backbone, **self.tuned})


@dataclass(frozen=True)
class Materials:
    """What a method may be made from. `trimmed`: the masks of the largest updates, made when asked for."""

    inputs: FusionInputs
    config: FusionConfig
    seed: int
    trimmed: Callable[[], Path]


@dataclass(frozen=True)
class Contender:
    """A method as comparisons have it: its name there, and the fields of `fusion` that it is set by."""

    name: str
    fields: Mapping[str, Any]


class Destination(Protocol):
    """Where slices of models and masks come to."""

    def model(self, model: Checkpoint) -> Checkpoint:
        """The same model; slices of it lie there."""

    def masks(self, masks: RegionMasks) -> RegionMasks:
        """The same masks; their words lie there."""


class MergeMethod(ABC):
    """One way to make one model out of many.

    What a class says of itself is what a plan, a fingerprint, a model card, the reference and a comparison know of it.
    Tensors that it does not merge are copied bit for bit.
    """

    formula: ClassVar[str]
    source: ClassVar[str]  # the paper
    fields: ClassVar[tuple[str, ...]]  # of `fusion`, beside `method`, `vocabulary` and `shard_size`
    seeded: ClassVar[bool] = False  # whether the run's seed decides the result
    needs_base: ClassVar[bool] = True  # whether θ0's values decide it
    reads: ClassVar[int] = 0  # times that every model is read before the pass that writes
    extra: ClassVar[str] = ""  # of cpift, without which it cannot run
    contender: ClassVar[Contender | None] = None  # how comparisons have it, if they do
    on_gpu: ClassVar[bool] = False  # whether slices on a GPU are merged there
    compared_where: ClassVar[str] = "sampled elements"  # what verification holds against the definition

    masks: RegionMasks | None = None  # of elements that it treats in another way

    def __init__(self, inputs: FusionInputs, config: FusionConfig, seed: int = 0):
        """Raises ProblemsError for a config that it cannot do. The seed is of use where it is `seeded`."""
        if problems := self.problems(config, list(inputs.tuned)):
            raise ProblemsError(f"merge by {config.method_name}", problems)
        self.pretrained, self.tuned, self._seed = inputs.pretrained, dict(inputs.tuned), seed
        self.config = cast(FusionConfig, Declared(config, self.fields))
        self.weights = [config.weights.get(task, config.weight) for task in inputs.tuned]

    @classmethod
    def make(cls, materials: Materials) -> Self:
        """The method over a run's models."""
        return cls(materials.inputs, materials.config, materials.seed)

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        """Why it cannot merge these tasks as the config says; asked before any model is opened."""
        return []

    @classmethod
    def described(cls, config: FusionConfig) -> str:
        """By what it is set, for people."""
        return ", ".join(_SETTINGS[name](config) for name in cls.fields if name in _SETTINGS)

    @classmethod
    def row_width(cls, config: FusionConfig, info: TensorInfo) -> int:
        """Elements of a row, where rows of this tensor may not be cut; else 0."""
        return 0

    @property
    def seed(self) -> int:
        if not self.seeded:
            raise CpiftError(f"merge method {self.config.method_name}: reads the seed → say `seeded = True`")
        return self._seed

    @property
    def models(self) -> list[Checkpoint]:
        """Every model that is read, each once."""
        return [*([self.pretrained] if self.needs_base else []), *self.tuned.values()]

    def placed(self, at: Destination) -> Self:
        """A copy of it whose models and masks are read to where `at` has them."""
        other = copy.copy(self)
        other.pretrained = at.model(self.pretrained)
        other.tuned = {task: at.model(model) for task, model in self.tuned.items()}
        other.masks = None if self.masks is None else at.masks(self.masks)
        return other

    def prepare(self) -> list[TensorRecord]:
        """Whole-model statistics, before the first tensor; returns records of them."""
        return []

    def merges(self, info: TensorInfo) -> bool:
        """Whether a tensor is merged; else it is `rest`'s."""
        return info.floating

    @property
    def rest(self) -> tuple[str, Checkpoint]:
        """The model that everything else is copied from, with its label."""
        return "θ0", self.pretrained

    def pieces(self, info: TensorInfo) -> list[Piece]:
        """The slices of a tensor, cut between rows where these may not be cut."""
        return pieces(info.numel, self.row_width(self.config, info) if self.merges(info) else 0)

    def tensor(self, info: TensorInfo) -> Merged:
        """A record of one tensor if there is anything to say, and what writes any of its pieces into a buffer.

        It may run while another tensor is being written."""
        return self.merged(info) if self.merges(info) else (None, copy_of(*self.rest, info))

    @abstractmethod
    def merged(self, info: TensorInfo) -> Merged:
        """`tensor` of one that it merges."""

    @abstractmethod
    def definition(self, info: TensorInfo) -> Definition:
        """What the tensor has to be, in fp64, by code that shares nothing with `merged`."""

    def compares(self, info: TensorInfo) -> bool:
        """Whether a tensor that was written is compared with its definition."""
        return self.merges(info) and 0 < info.numel <= _LARGEST

    def checks(self, written: Checkpoint, progress: OnElements) -> list[Check]:
        """What else has to hold of the merged model."""
        return []


@contextmanager
def own_code(method: MergeMethod, where: str) -> Iterator[None]:
    """What a user's method raises is an error of theirs, with the place; of ours it is what it is."""
    try:
        yield
    except CpiftError:
        raise
    except Exception as error:
        if type(method).__module__.startswith("cpift."):
            raise
        what = f"merge method {method.config.method_name}: {where}: {type(error).__name__}: {error}"
        raise CpiftError(f"{what} → mend the method") from error


class Declared:
    """A config of which a method reads what it declares: by that it is known what a merge depends on."""

    def __init__(self, config: FusionConfig, fields: Sequence[str]):
        self._config, self._fields = config, (*fields, "method", "method_name")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._config, self._fields)

    def __getattr__(self, name: str) -> Any:
        if name in FusionConfig.model_fields and name not in self._fields:
            raise CpiftError(f"merge method {self._config.method_name}: reads fusion.{name} → name it in `fields`")
        return getattr(self._config, name)


def copy_of(label: str, model: Checkpoint, info: TensorInfo) -> Fill:
    """Writes a tensor as it is in a model. Raises CheckpointError where it is not finite."""

    def fill(start: int, stop: int, out: torch.Tensor) -> None:
        values = model.slice(info.name, start, stop)
        if info.floating and not all_finite(values):
            require_finite(label, model, [info.name])
        out.copy_(values)

    return fill


def _weights_said(config: FusionConfig) -> str:
    own = "".join(f", {task} {weight:g}" for task, weight in config.weights.items())
    return f"weight {config.weight:g}{own}"


# How a field is said; one that is not here goes without saying.
_SETTINGS: Mapping[str, Callable[[FusionConfig], str]] = {
    "weight": _weights_said,
    "density": lambda config: f"density {config.density:g}",
    "t": lambda config: f"t = {config.t:g}",
    "epsilon": lambda config: f"LERP below {config.epsilon:g} rad",
}


class WeightedMerge(MergeMethod):
    """Any merge that is Σ c_m·θ_m with the same c for a whole tensor."""

    on_gpu = True

    @abstractmethod
    def coefficients(self, info: TensorInfo) -> tuple[list[float], TensorRecord | None]:
        """One factor for each of `models`, and a record."""

    def merged(self, info: TensorInfo) -> Merged:
        import torch

        with own_code(self, f"coefficients of tensor {info.name}"):
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
    """Merges of updates θi − θ0 (fp32) by a formula that needs them element by element."""

    def merged(self, info: TensorInfo) -> Merged:
        def fill(start: int, stop: int, out: torch.Tensor) -> None:
            for first, last in ((at, min(at + _RUN, stop)) for at in range(start, stop, _RUN)):
                origin = self.pretrained.slice(info.name, first, last).float()
                updates = [model.slice(info.name, first, last).float() - origin for model in self.tuned.values()]
                with own_code(self, f"tensor {info.name}, elements {first} to {last - 1}"):
                    update = self.update(info.name, first, last, updates)
                self._require_update(update, info.name, first, last)
                out[first - start : last - start] = origin + update

        return None, fill

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
            raise CpiftError(f"{where}: gives NaN or Inf of finite models → mend its formula")

    @property
    def magnifies(self) -> float:
        """By how much an update may be larger than those it is made of; rounding is judged by it."""
        return 1 / self.config.density if "density" in self.fields else 1.0

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
            updates = np.stack([vector - origin for vector in tuned])
            scale = np.max(np.abs([origin, *tuned]), axis=0, initial=0.0) * self.magnifies
            values_wanted = origin + self.defined_update(info.name, start, stop, updates)
            return Expected(values_wanted, np.arange(stop - start), scale)

        return values
