"""Second moments of fine-tunes as files: an element each of θ0's tensors, beside a checkpoint or wherever they lie.

`probe.keep_moments` writes AdamW's `exp_avg_sq` of the last step so, in bf16 (`training/moments.py`): v, which stands
for the diagonal of the Fisher matrix (arXiv 2509.11167). `regions.measure: curvature` and `fusion.method: fisher` read
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.checkpoints.checkpoint import Checkpoint, first_problems
from cpift.checkpoints.opening import MOMENTS, at_hand
from cpift.config.run import TaskConfig
from cpift.errors import CheckpointError, Problem
from cpift.formats.safetensors import TensorInfo

if TYPE_CHECKING:
    import torch

_SCAN = 1 << 22  # elements looked at together
_REMEDY = "give the file that a fine-tune of this θ0 wrote (probe.keep_moments: true)"


class Moments(Checkpoint):
    """One file of second moments, opened as a model is; `like`: θ0, whose tensors it has, tied ones once.

    Raises CheckpointError for a file that cannot be read, and for tensors that are not those of `like`.
    """

    def __init__(self, file: Path, like: Checkpoint):
        self.file, self._like = file, like
        super().__init__(file.parent, like.ties, like.is_apart, like.prefix)
        if problems := misfits(self, like):
            raise CheckpointError(f"second moments {file}", first_problems(problems, 8))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.file, self._like)

    @property
    def config(self) -> dict[str, Any]:  # a file alone has none
        return {}

    def _index(self) -> None:
        return None

    def _files(self, problems: list[Problem]) -> list[Path]:
        if self.file.is_file():
            return [self.file]
        problems.append(Problem(self.file.name, f"is no file in {self.file.parent}", _REMEDY))
        return []

    def prefetch(self, name: str, start: int, stop: int) -> None:
        if name in self.tensors:  # of what is no float there are none
            super().prefetch(name, start, stop)

    def release(self, name: str, start: int, stop: int) -> None:
        if name in self.tensors:
            super().release(name, start, stop)


def misfits(moments: Checkpoint, base: Checkpoint) -> list[Problem]:
    """What keeps a file from being the second moments of a fine-tune of `base`: every floating-point tensor of it has
    to be there with its shape, and no other."""
    wanted = {name: info.shape for name, info in base.tensors.items() if info.floating}
    found = {name: info.shape for name, info in moments.tensors.items() if info.floating}
    problems = [Problem(name, "is not there, and θ0 has it", _REMEDY) for name in wanted if name not in found]
    problems += [Problem(name, "is there, and no weight of θ0", _REMEDY) for name in found if name not in wanted]
    return problems + [
        Problem(name, f"has shape {list(found[name])}, in θ0 {list(shape)}", _REMEDY)
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]


def moments_at_hand(tasks: Sequence[TaskConfig]) -> list[Path]:
    """The files of second moments that are given for checkpoints, or lie beside them."""
    folders = ((task, task.checkpoint and at_hand(task.checkpoint)) for task in tasks)
    files = (task.moments or (folder and folder / MOMENTS) for task, folder in folders)
    return [file for file in files if file and file.is_file()]


def open_moments(files: Mapping[str, Path], base: Checkpoint) -> dict[str, Checkpoint]:
    """The second moments of tasks whose models are read with `base`. Raises CheckpointError naming the task."""
    opened: dict[str, Checkpoint] = {}
    for task, file in files.items():
        try:
            opened[task] = Moments(file, base)
        except CheckpointError as error:
            problems = [Problem(f"{task}: {one.where}", one.what, one.remedy) for one in error.problems]
            raise CheckpointError(f"second moments {file}", problems) from None
    return opened


def moments_of(moments: Mapping[str, Checkpoint], tasks: Sequence[str] | Mapping[str, Any]) -> list[Checkpoint]:
    """Those of these tasks, in order. Raises CheckpointError naming tasks that have none."""
    lacking = [Problem(task, "has no second moments", _REMEDY) for task in tasks if task not in moments]
    if lacking:
        raise CheckpointError("second moments", lacking)
    return [moments[task] for task in tasks]


def require_moments(moments: Mapping[str, Checkpoint], names: Sequence[str]) -> None:
    """Raise CheckpointError naming tasks and tensors whose second moments are no means of squares."""
    problems = [
        Problem(f"moments of {task}: {name}", "holds NaN, Inf or values below 0", _REMEDY)
        for task, file in moments.items()
        for name in names
        if name in file.tensors and not _are_squares(file, file.tensors[name])
    ]
    if problems:
        raise CheckpointError("second moments", first_problems(problems, 20))


def _are_squares(file: Checkpoint, info: TensorInfo) -> bool:
    parts = ((start, min(start + _SCAN, info.numel)) for start in range(0, info.numel, _SCAN))
    return all(_is_square(file.slice(info.name, start, stop)) for start, stop in parts)


def _is_square(values: torch.Tensor) -> bool:
    least, most = values.aminmax()
    return bool(least >= 0) and bool(most.isfinite())
