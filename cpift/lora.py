"""LoRA adapters as the checkpoints they make: θ0 + scaling · B·A, computed slice by slice, never kept merged.

An element is the fp32 sum of θ0 and scaling · Σ_k B·A (fp32, k ascending), rounded once to θ0's dtype: what merging in
fp32 and saving in that dtype gives. Modules that were trained whole (`modules_to_save`, biases) replace θ0's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpift_kernels.cpu.compiled import in_threads
from cpift_kernels.cpu.low_rank import low_rank_elements

from cpift.architecture import stored_transposed
from cpift.checkpoints import Checkpoint, first_problems
from cpift.errors import CheckpointError, Problem
from cpift.lora_config import ADAPTER_CONFIG, MERGE_FIRST, adapter_settings, setting_problems
from cpift.safetensors_files import FormatError, TensorInfo, read_header

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.lora_(embedding_)?(?P<part>[AB])(\.weight)?")
_TRAINING_ONLY = (".lora_velora_embed",)  # VeLoRA's, for the backward pass
_RUN = 1 << 18  # elements computed together


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
        self._maps = {}
        self.tensors = dict(base.tensors)
        self.config = base.config
        self._settings = adapter_settings(folder)
        problems = list(setting_problems(self._settings))
        if problems:  # its tensors may be called anything
            raise CheckpointError(f"adapter {folder}", problems)
        self._parts = _parts(folder, problems)
        self._full: dict[str, TensorInfo] = {}
        self._updates: dict[str, _Update] = {}
        self._assign(problems)
        if problems:
            raise CheckpointError(f"adapter {folder}", first_problems(problems, 20))
        self._factors = lru_cache(maxsize=2)(self._read_factors)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.base)

    @property
    def files(self) -> tuple[Path, ...]:
        """The adapter's own file: θ0's are counted with θ0."""
        return (self.folder / ADAPTER_WEIGHTS,)

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop-1: a view of θ0 or of the adapter's file, or computed into memory of its own."""
        full = self._full.get(name)
        values = self.base.slice(name, start, stop) if full is None else self._view(full, start, stop)
        if name not in self._updates:
            return values
        left, right = self._factors(name)
        scaling, out = self._updates[name].scaling, torch.empty_like(values)

        def compute(first: int) -> None:
            part = slice(first, min(first + _RUN, len(values)))
            delta = torch.empty(part.stop - first, dtype=torch.float32)
            low_rank_elements(left, right, start + first, delta.numpy())
            out[part] = delta.mul_(scaling).add_(values[part].float()).to(values.dtype)

        in_threads(compute, range(0, len(values), _RUN))
        return out

    def gather(self, name: str, starts: np.ndarray, length: int) -> torch.Tensor:
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
        values = self._map(info.file).view(info.start + start * info.dtype.itemsize, info.dtype, stop - start)
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
        pairs: dict[str, dict[str, TensorInfo]] = {}
        for key, info in self._parts.items():
            if key.endswith(_TRAINING_ONLY):
                continue
            name = key.removeprefix(_PREFIX)
            part = _PART.fullmatch(name)
            if part:
                pairs.setdefault(part["module"], {})[part["part"]] = info
            elif "lora_" in name:
                problems.append(Problem(key, "is no plain LoRA factor", MERGE_FIRST))
            else:
                # PEFT keeps an adapted embedding beside its factors; the product is added to that.
                self._assign_full(key, name.replace(".base_layer.", "."), info, problems)
        for module, factors in pairs.items():
            problem = self._assign_pair(module, factors)
            if problem is not None:
                problems.append(problem)

    def _assign_full(self, key: str, name: str, info: TensorInfo, problems: list[Problem]) -> None:
        target = self.base.tensors.get(name)
        if target is None or target.shape != info.shape:
            found = "no such tensor" if target is None else f"shape {list(target.shape)}, not {list(info.shape)}"
            problems.append(Problem(key, f"was trained whole, but θ0 has {found}", "give the adapter's own base model"))
        else:
            self._full[name] = TensorInfo(name, info.shape, info.dtype, info.file, info.start)

    def _assign_pair(self, module: str, factors: Mapping[str, TensorInfo]) -> Problem | None:
        name, a, b = f"{module}.weight", factors.get("A"), factors.get("B")
        target = self.base.tensors.get(name)
        if a is None or b is None:
            return Problem(module, "has one LoRA factor of two", "the adapter is damaged: download or copy it again")
        if target is None:
            return Problem(module, "is adapted, but θ0 has no such weight", "give the adapter's own base model")
        transposed = stored_transposed(self.base.folder, module)
        if transposed is None:
            return Problem(module, "is adapted, but in θ0 it is no linear layer and no embedding", MERGE_FIRST)
        shape = (b.shape[0], a.shape[-1])
        if len(a.shape) != 2 or len(b.shape) != 2 or (shape[::-1] if transposed else shape) != target.shape:
            what = f"has factors {list(b.shape)} · {list(a.shape)}, θ0's weight is {list(target.shape)}"
            return Problem(module, what, "give the adapter's own base model")
        rank = _patterned(self._settings, "rank_pattern", module, "r")
        if a.shape[0] != rank or b.shape[1] != rank:
            return Problem(module, f"has rank {a.shape[0]}, {ADAPTER_CONFIG} says {rank}", "restore the config")
        alpha = _patterned(self._settings, "alpha_pattern", module, "lora_alpha")
        scaling = alpha / (rank**0.5 if self._settings.get("use_rslora") else rank)
        self._updates[name] = _Update(a if transposed else b, b if transposed else a, transposed, scaling)
        return None


def _parts(folder: Path, problems: list[Problem]) -> dict[str, TensorInfo]:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        what = "is pickled (adapter_model.bin), which can run code when loaded" if pickled else "is not there"
        problems.append(Problem(ADAPTER_WEIGHTS, what, "save the adapter again with PEFT, which writes safetensors"))
        return {}
    try:
        return {info.name: info for info in read_header(file)}
    except (FormatError, OSError) as error:
        problems.append(Problem(file.name, f"cannot be read ({error})", "download or copy it again"))
        return {}


def _patterned(settings: Mapping[str, Any], field: str, module: str, default: str) -> Any:
    """The value of the first pattern that matches the end of a module's name, as PEFT has it."""
    patterns: Mapping[str, Any] = settings.get(field) or {}
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, settings[default])
