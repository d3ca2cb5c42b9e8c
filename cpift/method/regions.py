"""Core regions Ci: where task i moved the model most (docs/method.md, stage 2).

Ci is the set of the ⌊p·D⌋ elements of largest Δi = |θi − θ0| over the parameter space; or, with measure `significance`
(beyond the paper), of largest Δi·|θ0|, which prefers weights that already carry something; or, with `curvature`, of
largest Δi²·vi, vi the second moments of the fine-tune, which prefers what its loss depends on. Regions are kept as
bit-packed masks, one int32 tensor per parameter, in one safetensors file a task.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from cpift_kernels import overlap_counts, overlap_counts_per_tensor, stream_cores

from cpift.checkpoints.checkpoint import Checkpoint, first_problems, require_same_layout
from cpift.checkpoints.finite import is_finite
from cpift.checkpoints.slices import DEFAULT_BUDGET
from cpift.config.run import RegionsConfig
from cpift.disk.files import link_or_copy, write_json
from cpift.errors import CheckpointError, Problem, entry
from cpift.method.changes import ChangesInPassing
from cpift.method.masks import (
    SUMMARY,
    MaskFiles,
    MasksFrom,
    MasksInMemory,
    MasksOfTask,
    RegionMasks,
    read_summary,
)
from cpift.method.measures import measure_named, scope_named
from cpift.method.moments import moments_of, require_moments
from cpift.method.placement import PLACEMENTS
from cpift.untrusted.json import shown

if TYPE_CHECKING:
    import torch
    from cpift_kernels import Core, Mark, Masks, Models, Selection


@dataclass(frozen=True)
class RegionSummary:
    """What is known of one region without its mask."""

    task: str
    p: float
    space: int  # D, elements of the parameter space
    requested: int  # ⌊p·D⌋
    count: int  # |Ci|; less than requested if fewer elements moved at all
    threshold: float  # smallest selected |Δ|; by another measure what its class says (`measures.MEASURES`)
    cores: dict[str, int]  # parameter name → selected elements


@dataclass(frozen=True)
class CoreRegion:
    """Ci: packed masks by parameter name (int32, ⌈numel/32⌉ words, bit j%32 of word j//32)."""

    summary: RegionSummary
    words: Mapping[str, torch.Tensor]


def parameter_space(model: Checkpoint, config: RegionsConfig) -> tuple[str, ...]:
    """Names of the floating-point tensors that regions are chosen from, in name order. Raises as `chosen_names`."""
    return chosen_names([info.name for info in model.tensors.values() if info.floating], config, str(model.folder))


def chosen_names(names: Sequence[str], config: RegionsConfig, where: str) -> tuple[str, ...]:
    """Those of the names that include and exclude leave. Raises CheckpointError if they leave none."""
    chosen = tuple(
        name
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in config.include)
        and not any(fnmatchcase(name, pattern) for pattern in config.exclude)
    )
    if not chosen:
        what = f"include {shown(list(config.include))} and exclude {shown(list(config.exclude))} leave no parameter"
        remedy = f"change the patterns: names look like {shown(names[0]) if names else 'nothing'}"
        raise CheckpointError(f"model {where}", [Problem("regions", f"{what} of {len(names)}", remedy)])
    return chosen


def core_size(p: float, elements: int) -> int:
    """⌊p·D⌋, exact for p as it is written in decimal."""
    return math.floor(Fraction(str(p)) * elements)


def select_regions(
    pretrained: Checkpoint,
    tuned: Mapping[str, Checkpoint],
    config: RegionsConfig,
    streaming: Streaming | None = None,
) -> dict[str, CoreRegion]:
    """Core regions of all tasks, their masks in memory; see `select_regions_many`."""
    return select_regions_many(pretrained, tuned, config, [config.p], streaming)[config.p]


def select_regions_many(
    pretrained: Checkpoint,
    tuned: Mapping[str, Checkpoint],
    config: RegionsConfig,
    ps: Sequence[float],
    streaming: Streaming | None = None,
) -> dict[float, dict[str, CoreRegion]]:
    """Core regions of all tasks for every p of `ps` (`config.p` is not looked at), from one pass over the checkpoints.

    Ties go to the lower linear index (name order, then row-major). Elements that did not move are never core, unless
    `config.placement` is random: then a core's elements are as many others of the same tensors.
    Raises CheckpointError for models of other layout and for NaN or Inf, naming task and tensor.
    """
    names = _checked_space(pretrained, tuned, config)
    sizes, chosen = [pretrained.tensors[name].numel for name in names], list(dict.fromkeys(ps))
    masks = MasksInMemory(len(tuned), len(chosen), sizes)
    cores = _select(pretrained, tuned, config, names, lambda name: chosen, masks, streaming or Streaming())
    return dict(zip(chosen, _regions(tuned, names, sizes, chosen, cores, masks), strict=True))


def write_regions(
    pretrained: Checkpoint,
    tuned: Mapping[str, Checkpoint],
    config: RegionsConfig,
    folders: Mapping[float, Path],
    streaming: Streaming | None = None,
) -> None:
    """`select_regions_many` for models of any size: masks go straight to files, candidates to a nameless one.

    folders: for every p, an empty folder, filled as by `save_regions`.
    """
    names = _checked_space(pretrained, tuned, config)
    sizes, chosen = [pretrained.tensors[name].numel for name in names], list(folders)
    paths = [[folders[p] / f"{task}.safetensors" for p in chosen] for task in tuned]
    streaming = streaming or Streaming()
    with MaskFiles.create(paths, names, sizes) as masks:
        spill = next(iter(folders.values()))
        spilling = replace(streaming, spill=spill)
        cores = _select(pretrained, tuned, config, names, lambda name: chosen, masks, spilling)
        for regions, folder in zip(_regions(tuned, names, sizes, chosen, cores, masks), folders.values(), strict=True):
            _write_summary(regions, folder)


def write_shares(
    pretrained: Checkpoint,
    tuned: Mapping[str, Checkpoint],
    config: RegionsConfig,
    shares: Callable[[str, str], Sequence[float]],
    folders: Sequence[Path],
    streaming: Streaming,
) -> None:
    """`write_regions` with a p for every folder, task and tensor, `shares(task, name)`; `config.p` is not looked at.
    With scope `global` those of a task's first tensor are for all. θ0 is read once for each task."""
    names = _checked_space(pretrained, tuned, config)
    sizes = [pretrained.tensors[name].numel for name in names]
    streaming = replace(streaming, spill=folders[0])
    paths = [[folder / f"{task}.safetensors" for folder in folders] for task in tuned]
    with MaskFiles.create(paths, names, sizes) as masks:
        of_tasks = [
            _select(
                pretrained, {task: model}, config, names, partial(shares, task), MasksOfTask(masks, number), streaming
            )
            for number, (task, model) in enumerate(tuned.items())
        ]
        cores = [[part for one in block for part in one] for block in zip(*of_tasks, strict=True)]
        ps = [
            sum(part[k].requested for block in cores for part in block) / max(len(tuned) * sum(sizes), 1)
            for k in range(len(folders))
        ]
        for regions, folder in zip(_regions(tuned, names, sizes, ps, cores, masks), folders, strict=True):
            _write_summary(regions, folder)


@dataclass(frozen=True)
class Streaming:
    """How a selection reads: `budget` in bytes for buffers; `mark` does the marking elsewhere, given the selection of
    each block; `select` does all of it, where it has these models, and else gives None; `spill` is a folder for
    candidates; `passing` measures the changes that are read here; `moments` are the second moments of the tasks, for
    measures that need them."""

    budget: int = DEFAULT_BUDGET
    spill: Path | None = None
    mark: Callable[[Selection, Masks], Mark] | None = None
    select: Callable[[Models, Sequence[int], Masks, int], list[list[Core]] | None] | None = None
    passing: ChangesInPassing | None = None
    moments: Mapping[str, Checkpoint] = field(default_factory=dict)


def _checked_space(pretrained: Checkpoint, tuned: Mapping[str, Checkpoint], config: RegionsConfig) -> tuple[str, ...]:
    require_same_layout(pretrained, tuned)
    return parameter_space(pretrained, config)


def _select(
    pretrained: Checkpoint,
    tuned: Mapping[str, Checkpoint],
    config: RegionsConfig,
    names: Sequence[str],
    ps: Callable[[str], Sequence[float]],
    masks: Masks,
    streaming: Streaming,
) -> list[list[list[Core]]]:
    """[block][task][p]; ps: by the first tensor of a block."""
    measure, regions, ks = measure_named(config.measure), [], 0
    moments = moments_of(streaming.moments, tuned) if measure.needs_moments else []
    for first, last in scope_named(config.scope).blocks(len(names)):
        models = measure([pretrained, *tuned.values()], names[first:last], streaming.passing, moments)
        sizes = [core_size(p, sum(models.sizes)) for p in ps(names[first])]
        ks = len(sizes)
        block: Masks = masks if last - first == len(names) else MasksFrom(masks, first)
        try:
            regions.append(_select_block(models, sizes, block, streaming))
        except ValueError:
            _raise_if_not_finite({"pretrained": pretrained, **tuned}, names[first:last])
            require_moments(dict(zip(tuned, moments, strict=False)), names[first:last])
            raise
    place = entry(PLACEMENTS, config.placement, "regions.placement")
    place(masks, list(tuned), ks, names, [pretrained.tensors[name].numel for name in names])
    return regions


def _select_block(models: Models, sizes: Sequence[int], masks: Masks, streaming: Streaming) -> list[list[Core]]:
    """[task][p]"""
    cores = streaming.select(models, sizes, masks, streaming.budget) if streaming.select else None
    if cores is not None:
        return cores
    selection = stream_cores(models, sizes)
    mark = streaming.mark(selection, masks) if streaming.mark else None
    return selection.select(masks, selection.ranges_within(streaming.budget), mark, streaming.spill)


def _raise_if_not_finite(models: Mapping[str, Checkpoint], names: Sequence[str]) -> None:
    problems = [
        Problem(f"{label}: {name}", "holds NaN or Inf", "its training diverged: use an earlier checkpoint")
        for label, model in models.items()
        for name in names
        if not is_finite(model, name)
    ]
    if problems:
        raise CheckpointError("models to select core regions from", first_problems(problems, 20))


def _regions(
    tasks: Iterable[str],
    names: Sequence[str],
    sizes: Sequence[int],
    ps: Sequence[float],
    cores: list[list[list[Core]]],
    masks: Masks,
) -> list[dict[str, CoreRegion]]:
    """By p, in their order, and task."""
    import torch

    regions: list[dict[str, CoreRegion]] = [{} for _ in ps]
    for i, task in enumerate(tasks):
        for k, p in enumerate(ps):
            words = {name: torch.from_numpy(masks.words(i, k, t)) for t, name in enumerate(names)}
            counts = overlap_counts_per_tensor([list(words.values())])[:, 0, 0].tolist()
            parts = [block[i][k] for block in cores]
            summary = RegionSummary(
                task=task,
                p=p,
                space=sum(sizes),
                requested=sum(part.requested for part in parts),
                count=sum(part.count for part in parts),
                threshold=min(part.threshold for part in parts),
                cores=dict(zip(names, counts, strict=True)),
            )
            regions[k][task] = CoreRegion(summary, words)
    return regions


def region_overlaps(regions: Sequence[CoreRegion]) -> np.ndarray:
    """|Ci∩Cj| as (N, N) int64."""
    return overlap_counts([list(region.words.values()) for region in regions]).numpy()


def save_regions(regions: Mapping[str, CoreRegion], folder: Path) -> None:
    """One mask file a task, the summaries and the pairwise intersections."""
    from safetensors.torch import save_file

    for task, region in regions.items():
        save_file({name: words.contiguous() for name, words in region.words.items()}, folder / f"{task}.safetensors")
    _write_summary(regions, folder)
    for task in regions:  # the library's files are for the owner alone
        shutil.copymode(folder / SUMMARY, folder / f"{task}.safetensors")


def join_regions(folder: Path, other: Path, tasks: Sequence[str], order: Sequence[str]) -> None:
    """Put the regions of these tasks, which lie in `other`, beside those in `folder`; intersections are counted of all.

    Masks get a second name where the file system has that. order: of all tasks, in the summary. Raises CheckpointError
    where the regions are not of the same tensors.
    """
    records = read_summary(folder)["regions"] if (folder / SUMMARY).is_file() else {}
    known = read_summary(other)["regions"]
    for task in tasks:
        link_or_copy(other / f"{task}.safetensors", folder / f"{task}.safetensors")
        records[task] = known[task]
    spaces = {tuple(record["cores"]) for record in records.values()}
    if len(spaces) > 1:
        what = f"are not of the same tensors as those that are selected here: {[len(names) for names in spaces]}"
        raise CheckpointError(f"core regions in {other}", [Problem("regions", what, "select all of them anew")])
    masks, regions = RegionMasks(folder, order), {}
    for task in order:
        sizes = {name: 32 * masks.infos[task][name].numel for name in records[task]["cores"]}
        words = {name: masks.words(task, name, 0, size) for name, size in sizes.items()}
        regions[task] = CoreRegion(RegionSummary(**records[task]), words)
    _write_summary(regions, folder)


def _write_summary(regions: Mapping[str, CoreRegion], folder: Path) -> None:
    summaries = {task: asdict(region.summary) for task, region in regions.items()}
    overlaps = region_overlaps(list(regions.values())).tolist()
    write_json(folder / SUMMARY, {"tasks": list(regions), "regions": summaries, "overlaps": overlaps})
