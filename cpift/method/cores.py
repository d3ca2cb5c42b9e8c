"""Core regions as Python objects: every task's mask tensor by tensor, summaries, overlaps and groups, saved and loaded.

Masks are kept bit-packed (32 elements a word) and unpacked one tensor at a time, when it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from cpift_kernels import unpack_mask

from cpift.config.loading import validated
from cpift.config.run import GroupsConfig, RegionsConfig
from cpift.disk.files import folder_made, read_json, write_json
from cpift.errors import CheckpointError, ConfigError, CpiftError, Problem
from cpift.method.groups import Grouping, chance_level, group_tasks, jaccard_matrix
from cpift.method.masks import RegionMasks, read_summary
from cpift.method.regions import CoreRegion, RegionSummary, region_overlaps, save_regions

RECORD = "cores.json"
_FORMAT = 1
_NEW = "give a folder that is not there yet"


@dataclass(frozen=True)
class Origin:
    """What cores were selected from, and how."""

    base: str  # θ0's fingerprint
    models: Mapping[str, str]  # fingerprint by task
    fields: RegionsConfig
    shapes: Mapping[str, tuple[int, ...]]  # of every tensor of θ0's files


class Core(Mapping[str, torch.Tensor]):
    """One task's core region Ci: a bool mask of the tensor's shape by the name of the checkpoint's tensor.

    `words` has the same packed (int32, ⌈numel/32⌉ words, bit j%32 of word j//32), `summary` what is known without it.
    """

    def __init__(self, region: CoreRegion, shapes: Mapping[str, tuple[int, ...]]):
        self.summary: RegionSummary = region.summary
        self.words: Mapping[str, torch.Tensor] = region.words
        self.shapes = shapes

    @property
    def task(self) -> str:
        return self.summary.task

    @property
    def count(self) -> int:
        """|Ci|, elements."""
        return self.summary.count

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        return unpack_mask(self.words[name], int(np.prod(shape, dtype=np.int64))).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __len__(self) -> int:
        return len(self.words)

    def __repr__(self) -> str:
        return f"Core({self.task}: {self.count:,} of {self.summary.space:,} elements)"


class Cores(Mapping[str, Core]):
    """The core regions of several tasks, by name; what `cpift.regions` returns."""

    def __init__(self, regions: Mapping[str, CoreRegion], origin: Origin):
        self._regions, self.origin = dict(regions), origin
        self._cores = {task: Core(region, origin.shapes) for task, region in regions.items()}

    def __getitem__(self, task: str) -> Core:
        return self._cores[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cores)

    def __len__(self) -> int:
        return len(self._cores)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self._cores)

    @property
    def p(self) -> float:
        return self.origin.fields.p

    @property
    def chance(self) -> float:
        """The Jaccard overlap that two random regions of this p are expected to have, p / (2 − p)."""
        return chance_level(self.p)

    @property
    def overlaps(self) -> np.ndarray:
        """|Ci∩Cj| as (N, N) int64, in the order of `tasks`; the diagonal has |Ci|."""
        return region_overlaps(list(self._regions.values()))

    @property
    def jaccard(self) -> np.ndarray:
        """S(i,j) = |Ci∩Cj| / |Ci∪Cj| as (N, N) float64; to be read beside `chance`."""
        return jaccard_matrix(self.overlaps)

    def groups(
        self,
        tau: float | None = None,
        *,
        tau_chance: float | None = None,
        order: Literal["random", "given", "similarity"] = "given",
        seed: int = 0,
    ) -> Grouping:
        """Tasks whose cores overlap by τ or more, in stage order, with warnings; the paper's τ is 0.1.

        tau_chance: τ as a multiple of `chance`. Raises ConfigError for values that no run would take.
        """
        stated = {"tau": tau, "tau_chance": tau_chance} if (tau, tau_chance) != (None, None) else {"tau": 0.1}
        fields = validated(GroupsConfig, {**stated, "order": order}, "groups")
        return group_tasks(self.tasks, self.overlaps, self.p, fields, seed)

    def subset(self, tasks: Sequence[str]) -> Cores:
        """The cores of some tasks, in this order."""
        return Cores({task: self._regions[task] for task in tasks}, self.origin)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write masks and summaries into a new folder, whole or not at all. Raises CpiftError where it exists."""
        folder = Path(folder).expanduser().absolute()
        _require_new(folder)
        with folder_made(folder) as partial:
            self.write_masks(partial)
            write_origin(self.origin, partial)
        return folder

    def write_masks(self, folder: Path) -> None:
        """The files of a run's core regions, into an empty folder."""
        save_regions(self._regions, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Cores:
        """What `save` wrote; masks stay in their files, mapped. Raises CpiftError for other folders."""
        folder = Path(folder).expanduser().absolute()
        if not (folder / RECORD).is_file():
            raise CpiftError(f"{folder}: has no {RECORD} → give a folder that Cores.save or cpift.regions(out=…) wrote")
        record = read_json(folder / RECORD)
        if record.get("format") != _FORMAT:
            raise CpiftError(
                f"{folder}: {RECORD} has format {record.get('format')!r}, known is {_FORMAT} → select anew"
            )
        shapes = {name: tuple(shape) for name, shape in record["shapes"].items()}
        fields = RegionsConfig.model_validate(record["fields"])
        summary = read_summary(folder)
        masks = RegionMasks(folder, summary["tasks"])
        regions = {
            task: CoreRegion(RegionSummary(**summary["regions"][task]), _Mapped(masks, task, shapes))
            for task in summary["tasks"]
        }
        return cls(regions, Origin(record["base"], record["models"], fields, shapes))

    def require_of(self, base: str, models: Mapping[str, str]) -> None:
        """Raise CheckpointError unless these are the cores of models of these fingerprints."""
        again = "select core regions of these files: cpift.regions"
        problems = [Problem("cores", "were selected with another base", again)] if base != self.origin.base else []
        for task, fingerprint in models.items():
            if task not in self:
                problems.append(Problem(f"cores: {task}", f"is not there; there are {', '.join(self.tasks)}", again))
            elif self.origin.models[task] != fingerprint:
                problems.append(Problem(f"cores: {task}", "were selected from other files than are merged now", again))
        if problems:
            raise CheckpointError("cores of another merge", problems)

    def __repr__(self) -> str:
        lines = [f"Cores of {len(self)} tasks, p = {self.p:g}, overlap by chance {self.chance:.4f}"]
        for row, core in zip(self.jaccard, self.values(), strict=True):
            share = core.count / core.summary.space
            figures = "  ".join(f"{value:.4f}" for value in row)
            lines.append(f"  {core.task}: {core.count:,} elements ({share:.3%}); overlaps {figures}")
        return "\n".join(lines)


class _Mapped(Mapping[str, torch.Tensor]):
    """One task's packed masks in its mapped file."""

    def __init__(self, masks: RegionMasks, task: str, shapes: Mapping[str, tuple[int, ...]]):
        self._masks, self._task, self._shapes = masks, task, shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._masks.infos[self._task]:
            raise KeyError(name)
        return self._masks.words(self._task, name, 0, int(np.prod(self._shapes[name], dtype=np.int64)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks.infos[self._task])

    def __len__(self) -> int:
        return len(self._masks.infos[self._task])


def write_origin(origin: Origin, folder: Path) -> None:
    """What `Cores.load` needs beside the masks."""
    record = asdict(origin) | {"fields": origin.fields.model_dump(mode="json")}
    write_json(folder / RECORD, {"format": _FORMAT, **record})


def _require_new(folder: Path) -> None:
    if os.path.lexists(folder):
        raise ConfigError("cores", [Problem("out", f"{folder} exists already", _NEW)])
