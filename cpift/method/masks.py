"""Core regions as files: masks of elements by tensor, read where they lie, and the summary beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift_kernels import union_mask

from cpift.disk.files import read_json
from cpift.disk.mapped import MappedFile
from cpift.formats.safetensors import read_tensors_of

if TYPE_CHECKING:
    import torch

SUMMARY = "regions.json"


def read_summary(folder: Path) -> dict[str, Any]:
    """What `save_regions` wrote beside the masks: tasks, regions (RegionSummary fields), overlaps."""
    return read_json(folder / SUMMARY)


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
