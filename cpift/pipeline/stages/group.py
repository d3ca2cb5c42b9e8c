"""Stage 3: tasks whose cores overlap, in one group; the groups in stage order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cpift.config.identity import identity_of
from cpift.config.run import RunConfig
from cpift.disk.artifacts import Artifact
from cpift.disk.files import read_json, write_json
from cpift.method.groups import Grouping, group_tasks
from cpift.method.masks import read_summary
from cpift.pipeline.run import Run, unless_damaged
from cpift.pipeline.stages import regions
from cpift.pipeline.stages.names import Known, ModelRef, Names, once
from cpift.pipeline.stages.step import Step, step_of

VERSION = 1


@once
def artifact(names: Names) -> Artifact:
    """Named by the regions, the threshold and the order of tasks."""
    fields = identity_of(names.config.groups, "group") | {"seed": names.config.seed}
    fields |= {"tasks": [task.name for task in names.config.every_task]}  # stages are ordered by it; regions are not
    return names.artifact("group", VERSION, {"regions": regions.artifact(names).fingerprint}, fields)


def grouping(names: Names) -> Grouping | None:
    """What came out if it has been made, else None."""
    if not artifact(names).complete:
        return None
    record = read_json(artifact(names).path / "groups.json")
    groups = tuple(tuple(group) for group in record["groups"])
    jaccard = np.array(record["jaccard"])
    return Grouping(tuple(record["tasks"]), jaccard, record["chance"], record["tau"], groups, tuple(record["warnings"]))


@unless_damaged
def make(run: Run) -> Grouping:
    """Task groups in stage order; what there is to warn of is said once."""
    selected = regions.make(run)
    run.make(artifact(run.artifacts), "task groups", lambda out: build(run, selected, out))
    grouped = grouping(run.artifacts)
    assert grouped is not None
    for warning in set(grouped.warnings) - run.said:
        run.view.warn(warning)
    run.said.update(grouped.warnings)
    return grouped


def build(run: Run, selected: Artifact, out: Path) -> None:
    """Group the tasks by their cores' overlaps."""
    summary, tasks = read_summary(selected.path), [task.name for task in run.config.every_task]
    places = [summary["tasks"].index(task) for task in tasks]  # another order of tasks may have made the regions
    overlaps = np.array(summary["overlaps"])[np.ix_(places, places)]
    grouped = group_tasks(tasks, overlaps, run.config.regions.p, run.config.groups, run.config.seed)
    write_json(out / "groups.json", asdict(grouped) | {"jaccard": grouped.jaccard.tolist()})


def title(names: Names) -> str:
    return "task groups" if regions.wanted(names.config) else ""


def plan(names: Names, known: Known) -> Iterator[Step]:
    if regions.wanted(names.config):
        yield step_of(artifact(names), _threshold(names.config))


def _threshold(config: RunConfig) -> str:
    groups = config.groups
    tau = f"τ = {groups.tau:g}" if groups.tau is not None else f"τ = {groups.tau_chance:g} × chance"
    return f"{tau}, order {groups.order}"


def outputs(names: Names, known: Known) -> dict[str, Artifact]:
    return {"group": artifact(names)} if regions.wanted(names.config) else {}


def models(names: Names, known: Known) -> list[ModelRef]:
    return []
