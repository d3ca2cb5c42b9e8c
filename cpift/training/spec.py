"""A fine-tune, described. Light on purpose: Ray's helper processes unpickle it and must not pay for torch."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from cpift.config.run import ResourcesConfig, TaskConfig, TrainingConfig
from cpift.config.training import Freeze, Tracker
from cpift.data.use import UseRecord
from cpift.disk.files import read_json
from cpift.errors import entry

RESULT = "training.json"


class LogRow(TypedDict, total=False):
    """What the Trainer logged; `grad_norm` is in some."""

    stage: int
    step: int
    loss: float  # nats a token
    learning_rate: float
    grad_norm: float


class FrozenRow(TypedDict):
    """What freezing did in a stage."""

    stage: int
    elements: int  # frozen
    moved: int  # of them, nevertheless


class HeldOutRow(TypedDict):
    """A loss on rows that are held out."""

    stage: int
    step: int
    loss: float  # nats a token
    tokens: int  # that it is the mean of


class MomentsRecord(TypedDict):
    """What second moments are of that were kept: v after so many steps, begun at 0, without bias correction."""

    beta2: float
    steps: int


class _Later(TypedDict, total=False):
    """What records of earlier releases do not have."""

    title: str
    tokens: list[int]  # input tokens seen, by stage
    rows: list[dict[str, UseRecord]]  # by stage and task
    precision: str
    gathered: str  # what FSDP2 gathered weights as
    held_out: list[HeldOutRow]
    moments: MomentsRecord


class TrainingRecord(_Later):
    """What a fine-tune writes beside its model; the last file, which makes the folder complete."""

    log: list[LogRow]
    frozen: list[FrozenRow]
    seconds: float
    device: str


def read_training(folder: Path) -> TrainingRecord:
    """The record beside a fine-tuned model."""
    record: TrainingRecord = read_json(folder / RESULT)
    return record


@dataclass(frozen=True)
class StageSpec:
    """One stage: the tasks trained jointly, and the tasks whose core regions are frozen (or pulled back) meanwhile."""

    tasks: tuple[str, ...]
    frozen: tuple[str, ...] = ()


# `steps_per` → how often a stage of these tasks takes `steps`
STEPS_PER: dict[str, Callable[[Sequence[str]], int]] = {"stage": lambda tasks: 1, "task": len}


@dataclass(frozen=True)
class FitSpec:
    """A whole fine-tune. Paths are absolute and, on a cluster, on storage that every node sees."""

    title: str
    model: Path
    tasks: tuple[TaskConfig, ...]
    stages: tuple[StageSpec, ...]
    training: TrainingConfig
    seed: int
    threads: int
    resources: ResourcesConfig
    export: Path
    scratch: Path
    tokens: Path  # kept of one fine-tune for all
    logs: Path
    regions: Path | None = None
    penalty: float | None = None  # instead of freezing
    holds: str = "cores"  # which elements are frozen or pulled back: a key of `method.held.HELD`
    moments: Path | None = None  # second moments of `model`, by which a penalty is weighted
    shares: Mapping[str, float] | None = None  # by task, where a stage goes over some of its rows alone
    keep_moments: bool = False  # of the last stage, beside the model
    samples_per_task: int | None = None
    balanced: bool = False
    tracking: tuple[Tracker, ...] = ()
    rows: Mapping[str, str] | None = None  # what identifies each task's training rows; None where nobody asks

    def steps(self, stage: int) -> int | None:
        """Optimizer steps of a stage; None where its length is given in epochs."""
        each = entry(STEPS_PER, self.training.steps_per, "steps_per")
        return self.training.steps and self.training.steps * each(self.stages[stage].tasks)

    def stage_title(self, index: int) -> str:
        """For logs and trackers."""
        return self.title if len(self.stages) == 1 else f"{self.title}, stage {index}"

    def stage_folder(self, index: int) -> Path:
        """Where a stage keeps its checkpoints."""
        return self.scratch / f"stage-{index}"

    @property
    def remote_storage(self) -> bool:
        """Whether checkpoints are uploaded to an object store."""
        return self.resources.remote_storage

    def drop_checkpoints(self) -> None:
        """Free what the fine-tune would have gone on from, several times the size of the model that is exported."""
        for pattern in ("stage-*", "kept-*"):
            for folder in self.scratch.glob(pattern):
                shutil.rmtree(folder, ignore_errors=True)

    def accumulation(self, workers: int) -> int:
        """Batches that each worker adds up to a step: where fewer work than were asked for, so many more each."""
        return math.ceil(self.training.gradient_accumulation * self.resources.workers / workers)


# `integration.freeze` → the groups whose cores are frozen in stage k
FREEZES: dict[str, Callable[[Sequence[Sequence[str]], int], Sequence[Sequence[str]]]] = {
    "earlier": lambda groups, k: groups[:k],
    "all": lambda groups, k: groups,
    "none": lambda groups, k: (),
}


def stages_of(groups: Sequence[Sequence[str]], freeze: Freeze | None) -> tuple[StageSpec, ...]:
    """One stage a group, in order.

    freeze: None (backbone) and "none" nothing; "earlier" the cores of the groups before (paper); "all" every core in
    every stage.
    """
    stages = []
    for k, group in enumerate(groups):
        frozen_groups = [] if freeze is None else entry(FREEZES, freeze, "integration.freeze")(groups, k)
        stages.append(StageSpec(tuple(group), tuple(task for earlier in frozen_groups for task in earlier)))
    return tuple(stages)
