"""LoRA adapters as the checkpoints they make: θ0 + scaling · B·A, computed slice by slice, never kept merged.

An element is the fp32 sum of θ0 and scaling · Σ_k B·A (fp32, k ascending), rounded once to θ0's dtype: what merging in
fp32 and saving in that dtype gives. Modules that were trained whole (`modules_to_save`, biases) replace θ0's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from cpift_kernels import add_low_rank

from cpift.checkpoints.checkpoint import Checkpoint, first_problems
from cpift.checkpoints.layout import checkpoint_layout
from cpift.checkpoints.lora_config import ADAPTER_CONFIG, MERGE_FIRST, adapter_settings
from cpift.checkpoints.lora_files import ADAPTER_WEIGHTS, changes_in, own_copy, require_plain, tensors_of, unties
from cpift.checkpoints.vocabulary import token_tensors
from cpift.errors import CheckpointError, Problem
from cpift.formats.safetensors import TensorInfo
from cpift.pretrained.architecture import has_parameter, stored_transposed
from cpift.untrusted.json import UnreadableError
from cpift.untrusted.patterns import Patterns

if TYPE_CHECKING:
    import torch

_PATTERN_FORM = r"(.*\.)?({})$"  # PEFT's


@dataclass(frozen=True)
class _Update:
    """scaling · left·right of one weight [rows, columns]; the factors are tensors of the adapter's file."""

    left: TensorInfo  # B, or A where the product is stored transposed
    right: TensorInfo
    transposed: bool
    scaling: float


class LoraCheckpoint(Checkpoint):
    """An adapter's folder opened as a fine-tune of `base`: the same names, shapes and dtypes.

    Raises CheckpointError for anything that is not plain LoRA (DoRA, other methods, trained LoRA biases), and for
    factors that are missing, that fit no tensor of `base`, or whose rank is not the one that the config gives.
    """

    def __init__(self, folder: Path, base: Checkpoint):
        self.folder, self.base = folder, base
        self.ties, self.is_apart, self._maps, self._copies = base.ties, base.is_apart, {}, {}
        self._versions = {}
        self.tensors = dict(base.tensors)
        self.config = base.config
        self._settings = adapter_settings(folder)
        require_plain(folder)  # before its tensors, which may be called anything
        problems: list[Problem] = []
        self._parts = tensors_of(folder, problems)
        self._full: dict[str, TensorInfo] = {}
        self._updates: dict[str, _Update] = {}
        self._patterns: dict[str, Patterns] = {}
        self._assign(problems)
        if not self.is_apart and unties(folder, base):
            what = "changes an embedding and output layer apart that are one tensor in the model it is read with"
            problems.append(
                Problem(str(folder), what, "give it as a task's checkpoint: all models have two tensors then")
            )
        if problems:
            raise CheckpointError(f"adapter {folder}", first_problems(problems, 20))
        self._factors = lru_cache(maxsize=2)(self._read_factors)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.base)

    def apart(self) -> Checkpoint:
        return LoraCheckpoint(self.folder, self.base.apart())

    @property
    def adapted(self) -> tuple[str, ...]:
        """The tensors that factors change."""
        return tuple(self._updates)

    @cached_property
    def replaced(self) -> tuple[str, ...]:
        """The tensors that the file holds whole, with other values than θ0's; reads them."""
        import torch

        def same(name: str, info: TensorInfo) -> bool:
            base = self.base.tensors[name]
            return base.shape == info.shape and torch.equal(
                self._view(info, 0, info.numel), self.base.slice(name, 0, info.numel)
            )

        return tuple(name for name, info in self._full.items() if not same(name, info))

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """left [rows, K] and right [K, columns] of a tensor of `adapted`, float32; the scaling is in left."""
        import torch

        left, right = map(torch.from_numpy, self._factors(name))
        return left * self._updates[name].scaling, right

    @property
    def stored_by_class(self) -> bool:
        """Whether the file's own `fan_in_fan_out` contradicts the class of a module that is adapted."""
        flag = bool(self._settings.get("fan_in_fan_out"))
        return any(
            update.transposed != (flag or "lora_embedding_" in update.left.name) for update in self._updates.values()
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """The adapter's own file: θ0's are counted with θ0."""
        return (self.folder / ADAPTER_WEIGHTS,)

    def require_unchanged(self) -> None:
        super().require_unchanged()
        self.base.require_unchanged()

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop-1: a view of θ0 or of the adapter's file, or computed into memory of its own."""
        import torch

        full = self._full.get(name)
        values = self.base.slice(name, start, stop) if full is None else self._view(full, start, stop)
        if name not in self._updates:
            return values
        left, right = map(torch.from_numpy, self._factors(name))
        return add_low_rank(values, left, right, start, self._updates[name].scaling)

    def gather(self, name: str, starts: np.ndarray, length: int) -> torch.Tensor:
        import torch

        places = np.minimum(starts[:, None] + np.arange(length), self.tensors[name].numel - 1)
        if name in self._full:
            values = self._view(self._full[name], 0, self._full[name].numel)[torch.from_numpy(places)].float()
        else:
            values = self.base.gather(name, starts, length)
        if name in self._updates:
            left, right = self._factors(name)
            row, column = np.divmod(places, right.shape[1])
            delta = sum(left[row, k] * right[k, column] for k in range(left.shape[1]))
            rounded = (values + torch.from_numpy(np.asarray(delta)) * self._updates[name].scaling).to(
                self.tensors[name].dtype
            )
            values = rounded.float()
        return values

    def prefetch(self, name: str, start: int, stop: int) -> None:
        self.base.prefetch(name, start, stop)

    def release(self, name: str, start: int, stop: int) -> None:
        self.base.release(name, start, stop)

    def _view(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        values = self._map(info.file).view(info.start + start * info.itemsize, info.dtype, stop - start)
        return values.to(self.tensors[info.name].dtype)

    def _read_factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """left [rows, K] and right [K, columns], float32."""
        update = self._updates[name]
        factors = []
        for info in (update.left, update.right):
            values = self._map(info.file).view(info.start, info.dtype, info.numel).float().reshape(info.shape)
            factors.append(np.ascontiguousarray((values.T if update.transposed else values).numpy()))
        return factors[0], factors[1]

    def _assign(self, problems: list[Problem]) -> None:
        """Say which tensor of θ0 every tensor of the adapter changes."""
        changes = changes_in(self._parts)
        for module, change in changes.items():
            problems += [Problem(key, "is no plain LoRA factor", MERGE_FIRST) for key in change.unknown]
            for parameter, info in change.full.items():
                self._assign_full(f"{module}.{parameter}", info, own_copy(self._settings, module), problems)
        pairs = [(module, change.factors) for module, change in changes.items() if change.factors]
        try:
            misfits = [self._assign_pair(module, factors) for module, factors in pairs]
        except UnreadableError as error:  # a pattern
            misfits = [error.problem(ADAPTER_CONFIG)]
        problems += [problem for problem in misfits if problem is not None]

    def _assign_full(self, parameter: str, info: TensorInfo, own: bool, problems: list[Problem]) -> None:
        mine = self._name(parameter)
        tied = {mine} if own else _tied_with(mine, self.ties)  # PEFT loads it into the one tensor of both
        for name in tied if self.is_apart else {self.ties.get(mine, mine)}:
            target = self.base.tensors.get(name)
            rows = target is not None and target.shape[1:] == info.shape[1:] and name in token_tensors(self.base)
            if target is None or (target.shape != info.shape and not rows):
                what = "no such tensor" if target is None else f"shape {list(target.shape)}, not {list(info.shape)}"
                remedy = "give the adapter's own base model"
                if target is None and has_parameter(self.base.folder, parameter):
                    what, remedy = "it as several tensors in its files", MERGE_FIRST
                problems.append(Problem(parameter, f"was trained whole, but θ0 has {what}", remedy))
            else:
                self._full[name] = replace(info, name=name)
                self.tensors[name] = replace(target, shape=info.shape)

    def _assign_pair(self, module: str, factors: Mapping[str, TensorInfo]) -> Problem | None:
        name, a, b = self._name(f"{module}.weight"), factors.get("A"), factors.get("B")
        if name in self.ties and not self.is_apart:
            return None  # the same change as that of the tensor that it is tied to: `unties`
        target = self.tensors.get(name)
        if a is None or b is None:
            return Problem(module, "has one LoRA factor of two", "the adapter is damaged: download or copy it again")
        if target is None:
            return Problem(module, "is adapted, but θ0 has no such weight", "give the adapter's own base model")
        transposed = self._transposed(module, a, b, target)
        if transposed is None:
            return Problem(module, "is adapted, but in θ0 it is no linear layer and no embedding", MERGE_FIRST)
        if _product(a, b, transposed) != target.shape:
            what = f"has factors {list(b.shape)} · {list(a.shape)}, θ0's weight is {list(target.shape)}"
            return Problem(module, what, "give the adapter's own base model")
        rank = self._patterned("rank_pattern", module, "r")
        if a.shape[0] != rank or b.shape[1] != rank:
            return Problem(module, f"has rank {a.shape[0]}, {ADAPTER_CONFIG} says {rank}", "restore the config")
        alpha = self._patterned("alpha_pattern", module, "lora_alpha")
        scaling = alpha / (rank**0.5 if self._settings.get("use_rslora") else rank)
        self._updates[name] = _Update(a if transposed else b, b if transposed else a, transposed, scaling)
        return None

    def _transposed(self, module: str, a: TensorInfo, b: TensorInfo, target: TensorInfo) -> bool | None:
        """Whether the product is stored transposed, None where that cannot be told. The module's class decides; experts
        and routers are other classes than when they were adapted, and there only one way may fit."""
        stored = stored_transposed(self.base.folder, module)
        if stored is not None or len(set(target.shape)) != 2:
            return stored
        return _product(a, b, True) == target.shape

    def _patterned(self, field: str, module: str, default: str) -> Any:
        """The value of the first pattern that matches the end of a module's name, as PEFT has it."""
        if field not in self._patterns:
            self._patterns[field] = Patterns(self._settings.get(field) or {}, _PATTERN_FORM)
        match = self._patterns[field].first(module)
        return self._settings[default] if match is None else self._settings[field][match]

    def _name(self, parameter: str) -> str:
        """The tensor of θ0's files for a parameter, as adapters name it; that name itself if there is none."""
        if parameter in self.base.tensors or parameter in self.ties:
            return parameter
        same = checkpoint_layout(self.base).tensor_of(parameter)
        return parameter if same is None else same


def _product(a: TensorInfo, b: TensorInfo, transposed: bool) -> tuple[int, ...]:
    """The shape of B·A or of its transpose; () for what are no two matrices."""
    if len(a.shape) != 2 or len(b.shape) != 2:
        return ()
    return (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])


def _tied_with(parameter: str, ties: Mapping[str, str]) -> set[str]:
    """A parameter and all names that are tied to the same tensor."""
    source = ties.get(parameter, parameter)
    return {source} | {target for target, tied in ties.items() if tied == source}
