"""What a way to merge is: `MergeMethod`. Most have one of the two forms in `forms`.

One file of `methods/` is one way, and one row of `registry.METHODS`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from cpift.checkpoints.checkpoint import Checkpoint, require_same_layout
from cpift.checkpoints.finite import all_finite, require_finite
from cpift.checkpoints.slices import Piece, pieces
from cpift.checkpoints.towers.tower import outside
from cpift.checkpoints.writing import TensorRecord
from cpift.config.run import FusionConfig
from cpift.errors import CpiftError, Problem, ProblemsError
from cpift.extensions import own_code
from cpift.formats.safetensors import TensorInfo
from cpift.merging.checks import Check, Tally, check_copied, differing_bits
from cpift.merging.definition import Definition
from cpift.merging.settings import SAID, Largest, Settings
from cpift.method.masks import RegionMasks

if TYPE_CHECKING:
    import torch
    from cpift_kernels import Ready
    from typing_extensions import Self

# Writes elements start..stop-1 into a buffer [stop - start]. Of a method it has done so when it returns; what `tensor`
# gives may return what waits until they are there.
Fill = Callable[[int, int, "torch.Tensor"], "Ready | None"]
Merged = tuple[TensorRecord | None, Fill]  # a record of one tensor if there is anything to say, and what writes it
_LARGEST = 1 << 24  # elements of a tensor that is not too large for its definition to be evaluated


@dataclass(frozen=True)
class FusionInputs:
    """Everything that is merged. `tuned` in the order in which SLERP folds; `priority` in stage order. protected: tasks
    whose cores the backbone has already, and keeps. moments: second moments by task, of methods that need them."""

    pretrained: Checkpoint
    backbone: Checkpoint
    tuned: Mapping[str, Checkpoint]
    regions: Path
    priority: Sequence[str]
    first_layer: int = 0
    protected: Sequence[str] = ()
    moments: Mapping[str, Checkpoint] = field(default_factory=dict)

    def check(self) -> None:
        """Raise CheckpointError if a model does not fit the pre-trained one."""
        require_same_layout(self.pretrained, {"backbone": self.backbone, **self.tuned})


@dataclass(frozen=True)
class Materials:
    """What a method may be made from. `trimmed`: masks by task, a folder a share, made when asked for."""

    inputs: FusionInputs
    config: FusionConfig
    seed: int
    trimmed: Callable[[Largest], list[Path]]


@dataclass(frozen=True)
class Contender:
    """A method as comparisons have it: its name there, and the fields of `fusion` that it is set by."""

    name: str
    fields: Mapping[str, Any]


class Destination(Protocol):
    """Where slices of models and masks are read to."""

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
    fields: ClassVar[tuple[str, ...]]  # of `fusion`, beside those of every merge
    seeded: ClassVar[bool] = False  # whether the run's seed decides the result
    needs_base: ClassVar[bool] = True  # whether θ0's values decide it
    needs_moments: ClassVar[bool] = False  # whether it reads the second moments of every fine-tune (cpift's own alone)
    reads: ClassVar[int] = 0  # times that every model is read before the pass that writes
    late: ClassVar[tuple[str, ...]] = ()  # of `fields`, those that `statistics` do not depend on
    extra: ClassVar[str] = ""  # of cpift, without which it cannot run
    contender: ClassVar[Contender | None] = None  # how comparisons have it, if they do
    on_gpu: ClassVar[bool] = False  # whether slices on a GPU are merged there
    compared_where: ClassVar[str] = "sampled elements"  # what verification holds against the definition

    statistics: dict[str, Any] | None = None  # by tensor, kept for merges that differ in `late` fields alone
    reused: dict[Any, Any] | None = None  # the same by slice, where there is memory for it
    known_as: str | None = None  # what names `statistics` where other processes make them too

    def __init__(self, inputs: FusionInputs, config: FusionConfig, seed: int = 0):
        """Raises ProblemsError for a config that it cannot do. The seed is of use where it is `seeded`."""
        self.pretrained, self.tuned, self._seed = inputs.pretrained, dict(inputs.tuned), seed
        self._fusion = Settings(config, list(inputs.pretrained.tensors), inputs.first_layer)
        if problems := self._fusion.problems(self.asked, list(inputs.tuned)):
            raise ProblemsError(f"merge by {config.method_name}", problems)
        self._set(config)

    def _set(self, config: FusionConfig) -> None:
        self.config = cast(FusionConfig, Declared(config, self.fields))
        self.weights = [config.weights.get(task, config.weight) for task in self.tuned]
        self.densities = [config.densities.get(task, config.density) for task in self.tuned]

    def at(self, name: str) -> Self:
        """The method as one tensor is merged: with numbers where its settings differ over layers or by filter."""
        if not self._fusion.vary:
            return self
        other = copy.copy(self)
        other._set(self._fusion.at(name))
        return other

    @classmethod
    def make(cls, materials: Materials) -> Self:
        """The method over a run's models."""
        with own_code(cls, f"merge method {materials.config.method_name}: __init__"):
            return cls(materials.inputs, materials.config, materials.seed)

    @classmethod
    def asked(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        """`problems`. Raises CpiftError where a user's class gives anything else."""
        with own_code(cls, f"merge method {config.method_name}: problems"):
            found = list(cls.problems(config, tasks))
            if not all(isinstance(one, Problem) for one in found):
                raise TypeError(f"gives {found}, no list of Problem")
        return found

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        """Why it cannot merge these tasks as the config says; asked before any model is opened."""
        return []

    @classmethod
    def described(cls, config: FusionConfig) -> str:
        """Its settings in words."""
        said = (SAID[name](config) for name in cls.fields if name in SAID)
        return ", ".join(text for text in said if text)

    @classmethod
    def row_width(cls, config: FusionConfig, info: TensorInfo) -> int:
        """Elements of a row, where rows of this tensor may not be cut; else 0."""
        return 0

    @classmethod
    def held(cls, config: FusionConfig, info: TensorInfo, tasks: int) -> int:
        """Bytes that are held for a tensor beside its slices while it is merged."""
        return 0

    def beside(self, info: TensorInfo) -> int:
        """`held`, of the models that are merged."""
        return self.held(self.config, info, len(self.tuned)) if self.merges(info) else 0

    @property
    def seed(self) -> int:
        if not self.seeded:
            raise CpiftError(f"merge method {self.config.method_name}: reads the seed → say `seeded = True`")
        return self._seed

    def reuse(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, or gave for a merge that differs in `late` fields alone."""
        if self.reused is None:
            return make()
        if key not in self.reused:
            self.reused[key] = make()
        return self.reused[key]

    @property
    def models(self) -> list[Checkpoint]:
        """Every model that is read, each once."""
        return [*([self.pretrained] if self.needs_base else []), *self.tuned.values()]

    @property
    def leaves_host(self) -> bool:
        """Whether it, as it is configured and with these models, is merged on a GPU where there is one."""
        return self.on_gpu and all(model.replaced_alone is None for model in self.tuned.values())

    @property
    def reads_base(self) -> bool:
        """Whether θ0's weights are read: for the method, for tensors that are copied, or for fine-tunes that are given
        as something else than whole models under θ0's names."""
        if self.needs_base or any(type(model) is not Checkpoint for model in self.tuned.values()):
            return True
        return not all(self.merges(info) for info in self.pretrained.tensors.values())

    def placed(self, at: Destination) -> Self:
        """A copy that reads its models and masks to `at`."""
        other = self.with_masks(at.masks)
        other.pretrained = at.model(self.pretrained)
        other.tuned = {task: at.model(model) for task, model in self.tuned.items()}
        return other

    def with_masks(self, read: Callable[[RegionMasks], RegionMasks]) -> Self:
        """A copy that reads all its masks as `read` gives them."""
        return copy.copy(self)

    def named(self, where: str) -> AbstractContextManager[None]:
        """Around what a user's method may do wrong at a place."""
        return own_code(type(self), f"merge method {self.config.method_name}: {where}")

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
        if not self.merges(info) or outside(self.tuned.values(), info.name):
            return None, copy_of(*self.rest, info)
        with self.named(f"tensor {info.name}"):
            record, fill = self.at(info.name).merged(info)

        def named_fill(start: int, stop: int, out: torch.Tensor) -> None:
            with self.named(f"tensor {info.name}, elements {start} to {stop - 1}"):
                fill(start, stop, out)

        return record, named_fill

    @abstractmethod
    def merged(self, info: TensorInfo) -> Merged:
        """As `tensor`, of a tensor that is merged."""

    @abstractmethod
    def definition(self, info: TensorInfo) -> Definition:
        """What the tensor has to be, in fp64, by code that shares nothing with `merged`."""

    def compares(self, info: TensorInfo) -> bool:
        """Whether a tensor that was written is compared with its definition."""
        kept = outside(self.tuned.values(), info.name)
        return self.merges(info) and not kept and 0 < info.numel <= _LARGEST

    def tally(self, info: TensorInfo, start: int, values: torch.Tensor) -> Tally:
        """What elements start.. of the merged model show, [n]: while they are merged, or read back."""
        with self.named(f"tensor {info.name}, compared from element {start} on"):
            compared, differing = self.at(info.name).differing(info, start, start + values.numel(), values)
        return Tally(compared, differing, not info.floating or all_finite(values))

    def differing(self, info: TensorInfo, start: int, stop: int, out: torch.Tensor) -> tuple[int, int]:
        """Elements of a slice that have to be some model's bit for bit, and how many of them are not."""
        if self.merges(info):
            return 0, 0
        return differing_bits(self.rest[1].slice(info.name, start, stop).to(out.dtype), out)

    def compared_with(self, info: TensorInfo) -> list[Checkpoint]:
        """The models that `differing` reads."""
        return [] if self.merges(info) else [self.rest[1]]

    def checks(self, written: Checkpoint, tallies: Mapping[str, Tally]) -> list[Check]:
        """What else has to hold of the merged model; tallies: what was found of each of its tensors."""
        copied = [info.name for info in written.tensors.values() if not self.merges(info)]
        name = "every tensor that is not merged equals the one that it is copied from bit for bit"
        return [check_copied(tallies, copied, name)] if copied else []


class Declared:
    """A config that gives a method only the fields that it declares: a merge depends on no others."""

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
