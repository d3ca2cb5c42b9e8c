"""What a run's fine-tunes take: steps, tokens, and time where one of the same kind was timed on this machine.

Nothing is guessed. Tokens follow from the rows that were looked at; a time follows from what earlier fine-tunes of as
many parameters and the same shape of steps took here, and is None until there was one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cpift.config.run import ResourcesConfig, RunConfig, TrainingConfig
from cpift.data.use import RowFacts
from cpift.pipeline.identity import StageArtifacts
from cpift.training.speed import known_speed


@dataclass(frozen=True)
class FitCost:
    """A fine-tune. None: not known yet. steps: optimizer steps of all its stages; tokens: input tokens, about."""

    stage: str
    label: str
    stages: int | None
    steps: int | None
    tokens: int | None
    seconds: float | None


def fit_costs(artifacts: StageArtifacts, rows: Sequence[RowFacts], parameters: int | None) -> list[FitCost]:
    """Of every fine-tune of a run, in order."""
    return list(_costs(artifacts, rows, parameters))


def total_seconds(config: RunConfig, costs: Sequence[FitCost]) -> float | None:
    """Of fine-tunes that are to do: probes side by side as far as this machine's CPUs go, the rest one by one."""
    if not costs or any(cost.seconds is None for cost in costs):
        return None
    resources, probes = config.resources, [cost.seconds or 0.0 for cost in costs if cost.stage == "probe"]
    if resources.cluster:
        return None  # how many go side by side is the cluster's to say
    room = int((os.cpu_count() or 1) // max(resources.workers * resources.cpus_per_worker, 1))
    at_once = max(min(resources.parallel or len(probes), len(probes), room), 1)
    return sum(probes) / at_once + sum(cost.seconds or 0.0 for cost in costs if cost.stage != "probe")


def _costs(artifacts: StageArtifacts, rows: Sequence[RowFacts], parameters: int | None) -> Iterator[FitCost]:
    config, threads = artifacts.config, artifacts.config.resources.threads
    names = [task.name for task in config.tasks]
    grouping = artifacts.known_grouping() if config.fusion.isolates or config.integration is not None else None
    groups = None if grouping is None else [list(group) for group in grouping.groups]
    for task in config.trained:
        settings, seen = config.probe_training, _of(rows, "probe.max_length", [task.name])
        resources = config.resources.overridden(task.resources)
        yield _cost("probe", task.name, settings, [seen], resources, threads, parameters)
    if config.backbone_source == "staged" and (config.fusion.isolates or config.integration is not None):
        field = "backbone.training.max_length" if config.backbone.training else "probe.max_length"
        stages = None if groups is None else [_of(rows, field, group) for group in groups]
        every = [_of(rows, field, names)]
        yield _cost("backbone", "", config.backbone_training, stages, config.resources, threads, parameters, every)
    if config.integration is not None:
        field, training = "integration.max_length", config.integration
        names = [task.name for task in config.integrated]
        groups = [names] if groups and config.earlier else groups
        stages = None if groups is None or training.steps is None else [_of(rows, field, names)] * len(groups)
        yield _cost("integrate", "", training, stages, config.resources, threads, parameters)


@dataclass(frozen=True)
class _Seen:
    """Rows that a stage goes over, about, and tokens of one on average; None where rows were not looked at."""

    rows: float | None
    mean: float | None


def _of(rows: Sequence[RowFacts], field: str, tasks: Sequence[str]) -> _Seen:
    facts = [row for row in rows if row["field"] == field and row["task"] in tasks and row["rows"] and row["used"]]
    if {row["task"] for row in facts} != set(tasks):
        return _Seen(None, None)
    used = [row["in_all"] * row["used"] / row["rows"] for row in facts]
    means = [row["tokens"] / row["used"] for row in facts]
    return _Seen(sum(used), sum(n * mean for n, mean in zip(used, means, strict=True)) / sum(used))


def _cost(
    stage: str,
    label: str,
    training: TrainingConfig,
    stages: list[_Seen] | None,
    resources: ResourcesConfig,
    threads: int,
    parameters: int | None,
    instead: list[_Seen] | None = None,
) -> FitCost:
    """instead: where groups are not known, the rows of all of them, which an epoch of each stage goes over together."""
    batch = training.batch_size * training.gradient_accumulation * resources.workers  # rows of a step
    counted = stages if stages is not None or training.steps is not None else instead
    steps = None if counted is None else _sum(_steps(training, seen, batch) for seen in counted)
    tokens = None if counted is None else _sum(_tokens(training, seen, batch) for seen in counted)
    speed = None
    if tokens is not None and parameters is not None:
        speed = known_speed(parameters, training, resources, threads)
    seconds = None if tokens is None or speed is None else tokens / speed
    number = None if stages is None else len(stages)
    return FitCost(stage, label, number, None if steps is None else int(steps), _whole(tokens), seconds)


def _sum(values: Iterator[float | None]) -> float | None:
    known = list(values)
    return None if any(value is None for value in known) else sum(value or 0.0 for value in known)


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _steps(training: TrainingConfig, seen: _Seen, batch: int) -> float | None:
    if training.steps is not None:
        return training.steps
    if seen.rows is None or seen.mean is None:
        return None
    rows = seen.rows * seen.mean / training.max_length if training.packing else seen.rows
    return math.ceil(math.ceil(rows / batch) * (training.epochs or 0))


def _tokens(training: TrainingConfig, seen: _Seen, batch: int) -> float | None:
    steps = _steps(training, seen, batch)
    if steps is None or seen.mean is None:
        return None
    if training.steps is None:
        return (seen.rows or 0.0) * seen.mean * (training.epochs or 0)
    row = float(training.max_length) if training.packing else seen.mean
    return steps * batch * row
