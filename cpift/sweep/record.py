"""What is kept of a sweep besides its runs' artifacts: which points were tried, and how each went."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypedDict

from cpift.config.identity import identity_of, recorded
from cpift.config.loading import Fields, with_fields
from cpift.config.run import RunConfig
from cpift.disk.artifacts import Artifact
from cpift.disk.files import read_json
from cpift.hub import resolve_revision
from cpift.pipeline.pipeline import Pipeline
from cpift.sweep.config import Sweep
from cpift.sweep.points import group_points

_VERSION = 1  # raised when the same sweep would try other points


@dataclass(frozen=True)
class Attempt:
    """Points that are one trial, and how it ended: done | stopped (early, by ASHA) | failed, with the reason."""

    points: list[Fields]
    status: str
    reason: str


def sweep_record(sweep: Sweep) -> Artifact:
    """Named by everything that decides which points are tried and what they give; not by how many run at once
    or whose weights are kept."""
    base = recorded(sweep.base.model_copy(update={"output": None}))
    base = {name: value for name, value in base.items() if name not in ("name", "output", "resources")}
    threads = [sweep.base.resources.threads, sweep.base.resources.threads_alone, sweep.base.resources.workers]
    fields = {"sweep": identity_of(sweep.config, "sweep"), "base": base, "threads": threads}
    return Artifact(sweep.base.output_dir, "sweep", sweep.name, {}, fields, _VERSION)


def read_attempts(record: Artifact) -> list[Attempt]:
    return [Attempt(**attempt) for attempt in read_json(record.path / "attempts.json")]


class TrialResult(TypedDict):
    """What Tune knows of a trial: its point, and why it failed, empty if it did not."""

    fields: Fields
    error: str


def attempts_of(
    sweep: Sweep, results: Mapping[str, TrialResult], pipeline: Callable[[RunConfig], Pipeline]
) -> list[Attempt]:
    """Trials of a search that chose its points as it went: those of one outcome are put together afterwards."""
    points = [result["fields"] for result in results.values() if not result["error"]]
    runs = [[pipeline(sweep.run(point, seed)) for seed in sweep.seeds] for point in points]
    done = [
        Attempt([dict(point) for point in trial.points], "done", "")
        for trial in group_points(points, runs, sweep.config.model)
    ]
    return done + [
        Attempt([result["fields"]], "failed", result["error"]) for result in results.values() if result["error"]
    ]


def pinned(sweep: Sweep) -> Sweep:
    """The sweep with hub revisions fixed to today's commits, so that all its runs mean the same and none asks again."""
    base, fields = sweep.base, Fields()
    if base.model.hub is not None:
        fields["model.revision"] = resolve_revision("model", base.model.hub, base.model.revision)
    for number, task in enumerate(base.tasks):
        if task.checkpoint is not None and task.checkpoint.hub is not None:
            commit = resolve_revision("model", task.checkpoint.hub, task.checkpoint.revision)
            fields[f"tasks.{number}.checkpoint.revision"] = commit
        for split, source in (("train", task.train), ("test", task.test), ("validation", task.validation)):
            if source is not None and source.hub is not None:
                commit = resolve_revision("dataset", source.hub, source.revision)
                fields[f"tasks.{number}.{split}.revision"] = commit
    return replace(sweep, base=with_fields(base, fields, f"sweep {sweep.name}")) if fields else sweep
