"""Core regions as masks by tensor: in files, read where they lie and written while they are selected, or in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from cpift_kernels import union_mask

from cpift.disk.files import read_json
from cpift.disk.mapped import MappedFile
from cpift.formats.safetensors import FileWriter, TensorInfo, read_tensors_of

if TYPE_CHECKING:
    import torch
    from cpift_kernels import Masks

SUMMARY = "regions.json"


class RegionRecord(TypedDict):
    """As `regions.RegionSummary`, whose fields say more."""

    task: str
    p: float
    space: int
    requested: int
    count: int
    threshold: float
    cores: dict[str, int]  # tensor → elements


class RegionsRecord(TypedDict):
    """What is written beside the masks."""

    tasks: list[str]
    regions: dict[str, RegionRecord]  # by task
    overlaps: list[list[int]]  # |Ci ∩ Cj|, in the order of `tasks`


def read_summary(folder: Path) -> RegionsRecord:
    """What `save_regions` wrote beside the masks."""
    summary: RegionsRecord = read_json(folder / SUMMARY)
    return summary


class RegionMasks:
    """The masks that `write_regions` or `save_regions` left in a folder, as views of the mapped files."""

    def __init__(self, folder: Path, tasks: Sequence[str]):
        self._made_of = folder, tuple(tasks)
        self.files = {task: folder / f"{task}.safetensors" for task in tasks}
        self.infos = {task: read_tensors_of(file, "I32") for task, file in self.files.items()}
        self._maps = {task: MappedFile(file) for task, file in self.files.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of  # another process maps the files itself

    def has(self, name: str) -> bool:
        """Whether a parameter belongs to the parameter space."""
        return all(name in infos for infos in self.infos.values())

    def words(self, task: str, name: str, start: int, stop: int) -> torch.Tensor:
        """The mask words of elements start..stop-1; start is a multiple of 32."""
        first, last = start // 32, (stop + 31) // 32
        info = self.infos[task][name]
        return self._maps[task].view(info.start + 4 * first, info.dtype, last - first)


class NoCores(RegionMasks):
    """The same parameter space without a core."""

    def words(self, task: str, name: str, start: int, stop: int) -> torch.Tensor:
        words = super().words(task, name, start, stop)
        return words.new_zeros(words.shape)


def read_mask(folder: Path, task: str, name: str) -> torch.Tensor | None:
    """The packed mask of one parameter, None if it lies outside the parameter space."""
    file = folder / f"{task}.safetensors"
    info = read_tensors_of(file, "I32").get(name)
    return None if info is None else MappedFile(file).view(info.start, info.dtype, info.numel).reshape(info.shape)


class JointCores(Mapping[str, "torch.Tensor"]):
    """The union of some tasks' cores by parameter name, packed; read from the regions' files when it is asked for."""

    def __init__(self, folder: Path, tasks: Sequence[str]):
        self._folder, self._tasks = folder, tasks
        self._names = tuple(next(iter(read_summary(folder)["regions"].values()))["cores"])

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = [read_mask(self._folder, task, name) for task in self._tasks]
        return union_mask([part for part in parts if part is not None])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class MasksInMemory:
    """`cpift_kernels.Masks` as arrays."""

    def __init__(self, tasks: int, ks: int, sizes: Sequence[int]):
        words = [(size + 31) // 32 for size in sizes]
        self._words = [[[np.empty(n, np.int32) for n in words] for _ in range(ks)] for _ in range(tasks)]

    def store(self, task: int, k: int, tensor: int, first: int, words: np.ndarray) -> None:
        self._words[task][k][tensor][first : first + len(words)] = words.view(np.int32)

    def words(self, task: int, k: int, tensor: int) -> np.ndarray:
        return self._words[task][k][tensor]


@dataclass(frozen=True)
class MasksFrom:
    """The masks of the tensors from number `first` on, as those of a model that has no others."""

    masks: Masks
    first: int

    def store(self, task: int, k: int, tensor: int, first: int, words: np.ndarray) -> None:
        self.masks.store(task, k, self.first + tensor, first, words)

    def words(self, task: int, k: int, tensor: int) -> np.ndarray:
        return self.masks.words(task, k, self.first + tensor)


@dataclass(frozen=True)
class MasksOfTask:
    """The masks of one task, as those of a selection that has no other."""

    masks: Masks
    number: int

    def store(self, task: int, k: int, tensor: int, first: int, words: np.ndarray) -> None:
        self.masks.store(self.number, k, tensor, first, words)

    def words(self, task: int, k: int, tensor: int) -> np.ndarray:
        return self.masks.words(self.number, k, tensor)


class MaskFiles:
    """`cpift_kernels.Masks` in safetensors files, one a task and k: files [task][k]."""

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
