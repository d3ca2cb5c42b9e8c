"""Models walked in pieces: slices of one tensor for a merge, runs over all tensors for core selection, masks in files.

Memory that counts is what this process allocates. Mapped pages of checkpoints are the system's cache: they are read
ahead, given back after use, and dropped by the system when somebody needs the room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from cpift_kernels.cpu.segments import ITEM, SEGMENT

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.formats.safetensors import FileWriter, TensorInfo

if TYPE_CHECKING:
    import torch

DEFAULT_BUDGET = 1 << 30  # bytes
SLICE = 1 << 22  # elements of one tensor that are merged together; part of what fixes the bits of a sum
_ROWS = 32  # rows a slice holds a multiple of, so that its mask starts with a whole word
_AHEAD = 2  # slices that are read ahead

Piece = tuple[int, int]  # elements [start, stop) of a tensor, row-major


def pieces(numel: int, width: int = 0) -> list[Piece]:
    """A tensor cut into slices of SLICE elements or, given the width of a row, of about as many in whole rows."""
    step = SLICE if not width else max(SLICE // width // _ROWS, 1) * _ROWS * width
    return [(start, min(start + step, numel)) for start in range(0, numel, step)]


def sweep(models: Sequence[Checkpoint], info: TensorInfo, parts: Sequence[Piece]) -> Iterator[Piece]:
    """The pieces of a tensor in order; the next ones are read ahead, and what has been used is given back."""
    for number, (start, stop) in enumerate(parts):
        for first, last in parts[number + _AHEAD : number + _AHEAD + 1] if number else parts[: _AHEAD + 1]:
            for model in models:
                model.prefetch(info.name, first, last)
        yield start, stop
        for model in models:
            model.release(info.name, start, stop)


def elements_at_once(budget: int, models: int) -> int:
    """Elements of one model that a thread takes at a time: the buffers of all threads stay within the budget."""
    import torch

    held = 4 * models + models  # bytes an element: values of adapters in fp32, masks and candidates with room to spare
    return max(min(ITEM // models, budget // (2 * torch.get_num_threads() * held)), SEGMENT)


@dataclass(frozen=True)
class ModelTensors:
    """Some tensors of θ0 and the tuned models (`cpift_kernels.cpu.phases.Models`)."""

    models: Sequence[Checkpoint]  # θ0 first
    names: Sequence[str]

    @property
    def sizes(self) -> list[int]:
        return [self.models[0].tensors[name].numel for name in self.names]

    @property
    def tasks(self) -> int:
        return len(self.models) - 1

    def load(self, model: int, tensor: int, start: int, stop: int) -> torch.Tensor:
        return self.models[model].slice(self.names[tensor], start, stop)

    def gather(self, model: int, tensor: int, starts: np.ndarray, length: int) -> torch.Tensor:
        return self.models[model].gather(self.names[tensor], starts, length)

    def prefetch(self, tensor: int, start: int, stop: int) -> None:
        for model in self.models:
            model.prefetch(self.names[tensor], start, stop)

    def release(self, tensor: int, start: int, stop: int) -> None:
        for model in self.models:
            model.release(self.names[tensor], start, stop)


@dataclass(frozen=True)
class Significances(ModelTensors):
    """`ModelTensors` whose update is |θi − θ0|·|θ0|: θ0 reads as 0, θi as (θi − θ0)·θ0 in float32, difference and
    product each rounded."""

    def load(self, model: int, tensor: int, start: int, stop: int) -> torch.Tensor:
        origin = super().load(0, tensor, start, stop).float()
        return _scaled(origin, super().load(model, tensor, start, stop).float() if model else origin)

    def gather(self, model: int, tensor: int, starts: np.ndarray, length: int) -> torch.Tensor:
        origin = super().gather(0, tensor, starts, length)
        return _scaled(origin, super().gather(model, tensor, starts, length) if model else origin)


def _scaled(origin: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (values - origin).mul_(origin)


class MasksInMemory:
    """`cpift_kernels.cpu.phases.Masks` as arrays."""

    def __init__(self, tasks: int, ks: int, sizes: Sequence[int]):
        words = [(size + 31) // 32 for size in sizes]
        self._words = [[[np.empty(n, np.int32) for n in words] for _ in range(ks)] for _ in range(tasks)]

    def store(self, task: int, k: int, tensor: int, first: int, words: np.ndarray) -> None:
        self._words[task][k][tensor][first : first + len(words)] = words.view(np.int32)

    def words(self, task: int, k: int, tensor: int) -> np.ndarray:
        return self._words[task][k][tensor]


class MaskFiles:
    """`cpift_kernels.cpu.phases.Masks` in safetensors files, one a task and k: files [task][k]."""

    def __init__(self, files: Sequence[Sequence[FileWriter]], names: Sequence[str]):
        self._files, self._names = files, names
        self._maps: dict[tuple[int, int], np.ndarray] = {}

    @classmethod
    def create(cls, paths: Sequence[Sequence[Path]], names: Sequence[str], sizes: Sequence[int]) -> MaskFiles:
        """New files for tensors of these names and sizes."""
        infos = [TensorInfo(n, ((s + 31) // 32,), "I32", Path()) for n, s in zip(names, sizes, strict=True)]
        return cls([[FileWriter(path, infos) for path in task] for task in paths], names)

    @classmethod
    def attach(cls, paths: Sequence[Sequence[Path]], names: Sequence[str]) -> MaskFiles:
        """Files that another process has created."""
        return cls([[FileWriter.attach(path) for path in task] for task in paths], names)

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskFiles.attach, ([[file.path for file in task] for task in self._files], self._names)

    def store(self, task: int, k: int, tensor: int, first: int, words: np.ndarray) -> None:
        import torch

        self._files[task][k].write(self._names[tensor], first, torch.from_numpy(words.view(np.int32)))

    def words(self, task: int, k: int, tensor: int) -> np.ndarray:
        file = self._files[task][k]
        info = file.tensors[self._names[tensor]]
        if (task, k) not in self._maps:
            self._maps[task, k] = np.asarray(np.memmap(file.path, np.uint8, "r+"))
        return self._maps[task, k][info.start : info.start + info.nbytes].view(np.int32)

    def __enter__(self) -> MaskFiles:
        return self

    def __exit__(self, *error: Any) -> None:
        self._maps.clear()
        for file in (file for task in self._files for file in task):
            file.flush()
            file.close()
