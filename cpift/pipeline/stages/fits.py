"""What probes, backbone and integration have in common: what fixes a fine-tune's bits, and what its worker is told."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cpift.config.identity import identity_of
from cpift.config.run import ResourcesConfig, TaskConfig, TrainingConfig
from cpift.disk.artifact_state import TOKENS
from cpift.disk.artifacts import Artifact
from cpift.pipeline.stages.names import ModelRef, Names, once
from cpift.training.spec import FitSpec, StageSpec


def training_fields(
    names: Names, stage: str, training: TrainingConfig, threads: int, resources: ResourcesConfig
) -> dict[str, Any]:
    """What fixes the bits of a fine-tune."""
    fields = identity_of(training, stage) | identity_of(resources, stage)
    fields |= {"seed": names.config.seed, "threads": threads}
    return fields | ({"strategy": resources.strategy} if resources.workers > 1 else {})


def threads_alone(names: Names) -> int:
    """Threads of a fine-tune that runs beside no other."""
    return names.config.resources.threads_alone or names.config.resources.threads


@once
def train_data(names: Names) -> dict[str, str]:
    """What identifies the training rows of all tasks that are trained on."""
    return {f"data {task.name}": names.train_rows(task.name) for task in names.config.integrated}


def watched_data(names: Names, training: TrainingConfig, tasks: Iterable[TaskConfig]) -> dict[str, str]:
    """What identifies tasks' own rows whose loss is watched. (Those held out of training rows follow from these.)"""
    own = {task.name: task.validation for task in tasks if training.evaluate_every and task.validation is not None}
    return {f"held out {task}": names.validation_rows(task, source) for task, source in own.items()}


def fit_spec(
    names: Names,
    title: str,
    model: ModelRef,
    training: TrainingConfig,
    stages: tuple[StageSpec, ...],
    artifact: Artifact,
) -> FitSpec:
    """The fine-tune of `model` that exports for `artifact`."""
    return FitSpec(
        title=title,
        model=model.path,
        tasks=names.config.every_task,
        stages=stages,
        training=training,
        seed=names.config.seed,
        threads=names.config.resources.threads,
        export=artifact.work_dir / "export",
        scratch=artifact.work_dir,
        tokens=tokens_of(names),
        logs=names.root / "logs" / title.replace(" ", "-"),
        tracking=names.config.tracking,
        resources=names.config.resources,
        rows={task: names.train_rows(task) for stage in stages for task in stage.tasks},
    )


def tokens_of(names: Names) -> Path:
    """Where a run's training rows are kept as tokens."""
    return names.root / ".work" / TOKENS


def length(training: TrainingConfig) -> str:
    """How long a stage is, as plans say it."""
    return f"{training.length} of {training.batch_size * training.gradient_accumulation} examples"
