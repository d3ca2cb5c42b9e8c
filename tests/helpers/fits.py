"""Fine-tunes for tests: what is the same in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpift.config.run import DataSource, ResourcesConfig, TaskConfig, TrainingConfig
from cpift.disk.files import file_sha256
from cpift.training.spec import FitSpec, StageSpec


def procedural(name: str, kind: str, size: int = 40) -> TaskConfig:
    """A task whose rows are made on the spot."""
    rows = DataSource(procedural=kind, size=size)
    return TaskConfig(name=name, train=rows, test=DataSource(procedural=kind, size=8, split="test"))


def fit_spec(
    base: Path,
    out: Path,
    tasks: tuple[TaskConfig, ...],
    stages: tuple[StageSpec, ...],
    training: TrainingConfig,
    **fields: Any,
) -> FitSpec:
    """Everything it makes goes below `out`."""
    settings: dict[str, Any] = {"title": "fit", "seed": 3, "threads": 1, "resources": ResourcesConfig()} | fields
    folders = {"export": out / "export", "scratch": out / "scratch", "tokens": out / "tokens", "logs": out / "logs"}
    return FitSpec(model=base, tasks=tasks, stages=stages, training=training, **folders, **settings)


def weights(folder: Path) -> str:
    """SHA-256 of an exported model."""
    return file_sha256(folder / "model.safetensors")


TASKS = (procedural("add", "addition"), procedural("rev", "reverse"))


def spec(base: Path, out: Path, *stages: StageSpec, **training: Any) -> FitSpec:
    settings = {"steps": 6, "learning_rate": 3e-3, "weight_decay": 0.1, "batch_size": 4, "gradient_accumulation": 2}
    settings |= {"checkpoint_every": 0, "log_every": 2}
    return fit_spec(base, out, TASKS, stages or (StageSpec(("add",)),), TrainingConfig(**(settings | training)))
