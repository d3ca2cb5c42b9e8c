"""Core regions Ci: where task i moved the model most (METHOD.md, stage 2).

Ci is the set of the ⌊p·D⌋ elements of largest Δi = |θi − θ0| over the parameter space. Regions are kept as bit-packed
masks, one int32 tensor per parameter, in one safetensors file a task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpift_kernels import CoreMask, count_mask, overlap_counts, select_cores
from safetensors import safe_open
from safetensors.torch import save_file

from cpift.artifacts import read_json, write_json
from cpift.checkpoints import Checkpoint, require_same_layout
from cpift.config import RegionsConfig
from cpift.errors import CheckpointError, CpiftError, Problem

SUMMARY = "regions.json"


@dataclass(frozen=True)
class RegionSummary:
    """What is known of one region without its mask."""

    task: str
    p: float
    space: int  # D, elements of the parameter space
    requested: int  # ⌊p·D⌋
    count: int  # |Ci|; less than requested if fewer elements moved at all
    threshold: float  # smallest selected |Δ|
    cores: dict[str, int]  # parameter name → selected elements


@dataclass(frozen=True)
class CoreRegion:
    """Ci: packed masks by parameter name (int32, ⌈numel/32⌉ words, bit j%32 of word j//32)."""

    summary: RegionSummary
    words: Mapping[str, torch.Tensor]


def parameter_space(model: Checkpoint, config: RegionsConfig) -> tuple[str, ...]:
    """Names of the floating-point tensors that regions are chosen from, in name order.

    Raises CpiftError if the patterns leave nothing.
    """
    names = tuple(
        info.name
        for info in model.tensors.values()
        if info.floating
        and any(fnmatchcase(info.name, pattern) for pattern in config.include)
        and not any(fnmatchcase(info.name, pattern) for pattern in config.exclude)
    )
    if not names:
        raise CpiftError(
            f"regions.include {list(config.include)} and regions.exclude {list(config.exclude)} leave no parameter of "
            f"{model.folder}: names look like {model.names[0]!r}"
        )
    return names


def core_size(p: float, elements: int) -> int:
    """⌊p·D⌋, exact for p as it is written in decimal."""
    return math.floor(Fraction(str(p)) * elements)


def select_regions(
    pretrained: Checkpoint, tuned: Mapping[str, Checkpoint], config: RegionsConfig
) -> dict[str, CoreRegion]:
    """Core regions of all tasks; see `select_regions_many`."""
    return select_regions_many(pretrained, tuned, config, [config.p])[config.p]


def select_regions_many(
    pretrained: Checkpoint, tuned: Mapping[str, Checkpoint], config: RegionsConfig, ps: Sequence[float]
) -> dict[float, dict[str, CoreRegion]]:
    """Core regions of all tasks for every p of `ps` (`config.p` is not looked at), from one pass over the checkpoints.

    Ties go to the lower linear index (name order, then row-major). Elements that did not move are never core.
    Raises CheckpointError for models of other layout and for NaN or Inf, naming task and tensor.
    """
    require_same_layout(pretrained, tuned)
    names = parameter_space(pretrained, config)
    blocks = [names] if config.scope == "global" else [(name,) for name in names]
    chosen = list(dict.fromkeys(ps))
    masks: dict[float, dict[str, list[CoreMask]]] = {p: {task: [] for task in tuned} for p in chosen}
    for block in blocks:
        for task, found in zip(tuned, _select_block(pretrained, tuned, block, chosen), strict=True):
            for p, mask in zip(chosen, found, strict=True):
                masks[p][task].append(mask)
    return {p: {task: _region(task, p, pretrained, names, found) for task, found in masks[p].items()} for p in chosen}


def _select_block(
    pretrained: Checkpoint, tuned: Mapping[str, Checkpoint], names: Sequence[str], ps: Sequence[float]
) -> list[list[CoreMask]]:
    elements = sum(pretrained.tensors[name].numel for name in names)
    base = [pretrained.tensor(name) for name in names]
    others = [[model.tensor(name) for name in names] for model in tuned.values()]
    try:
        return select_cores(base, others, [core_size(p, elements) for p in ps])
    except ValueError:
        _raise_if_not_finite({"pretrained": pretrained, **tuned}, names)
        raise


def _raise_if_not_finite(models: Mapping[str, Checkpoint], names: Sequence[str]) -> None:
    problems = [
        Problem(f"{label}: {name}", "holds NaN or Inf", "its training diverged: use an earlier checkpoint")
        for label, model in models.items()
        for name in names
        if not bool(model.tensor(name).isfinite().all())
    ]
    if problems:
        raise CheckpointError("models to select core regions from", problems)


def _region(task: str, p: float, model: Checkpoint, names: Sequence[str], masks: Sequence[CoreMask]) -> CoreRegion:
    words = dict(zip(names, (part for mask in masks for part in mask.words), strict=True))
    summary = RegionSummary(
        task=task,
        p=p,
        space=sum(model.tensors[name].numel for name in names),
        requested=sum(mask.requested for mask in masks),
        count=sum(mask.count for mask in masks),
        threshold=min(mask.threshold for mask in masks),
        cores={name: count_mask(part) for name, part in words.items()},
    )
    return CoreRegion(summary, words)


def region_overlaps(regions: Sequence[CoreRegion]) -> np.ndarray:
    """|Ci∩Cj| as (N, N) int64."""
    return overlap_counts([list(region.words.values()) for region in regions]).numpy()


def save_regions(regions: Mapping[str, CoreRegion], folder: Path) -> None:
    """One mask file a task, the summaries and the pairwise intersections."""
    for task, region in regions.items():
        save_file({name: words.contiguous() for name, words in region.words.items()}, folder / f"{task}.safetensors")
    summaries = {task: asdict(region.summary) for task, region in regions.items()}
    overlaps = region_overlaps(list(regions.values())).tolist()
    write_json(folder / SUMMARY, {"tasks": list(regions), "regions": summaries, "overlaps": overlaps})


def read_summary(folder: Path) -> dict[str, Any]:
    """What `save_regions` wrote beside the masks: tasks, regions (RegionSummary fields), overlaps."""
    return read_json(folder / SUMMARY)


def read_mask(folder: Path, task: str, name: str) -> torch.Tensor | None:
    """The packed mask of one parameter, None if it lies outside the parameter space."""
    with safe_open(folder / f"{task}.safetensors", framework="pt") as opened:
        return opened.get_tensor(name) if name in opened.keys() else None  # noqa: SIM118 (no mapping)
