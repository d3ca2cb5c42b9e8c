"""Stage 2: every task's core region, the elements that its fine-tune moved most, as masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.opening import open_models
from cpift.config.identity import identity_of
from cpift.config.run import RegionsConfig, RunConfig
from cpift.disk.artifacts import Artifact
from cpift.disk.files import read_json, write_json
from cpift.merging.engine import Selects
from cpift.method.changes import Change, ChangesInPassing
from cpift.method.measures import measure_named
from cpift.method.moments import open_moments
from cpift.method.regions import Streaming, join_regions, parameter_space, write_regions
from cpift.pipeline.run import Run, unless_damaged
from cpift.pipeline.stages import model, probe
from cpift.pipeline.stages.inputs import INPUTS_RECORD, Inputs
from cpift.pipeline.stages.names import Known, ModelRef, Names, once
from cpift.pipeline.stages.step import Step, step_of

VERSION = 1
CHANGES = "changes.json"


def wanted(config: RunConfig) -> bool:
    """Whether anything needs regions and groups: other merges know neither, but integration does."""
    return config.fusion.isolates or config.integration is not None


@once
def artifact(names: Names) -> Artifact:
    """Named by θ0, θ1..θN of every task, and how elements are chosen."""
    inputs = {"model": model.base(names).fingerprint} | probe.every_fingerprint(names)
    if _needs_moments(names):
        inputs |= probe.moments_given(names)
    return names.artifact("regions", VERSION, inputs, identity_of(names.config.regions, "regions"))


def _needs_moments(names: Names) -> bool:
    return measure_named(names.config.regions.measure).needs_moments


@unless_damaged
def make(run: Run) -> Artifact:
    """The masks of all tasks, with what they have in common."""
    probe.make(run)
    return run.make(artifact(run.artifacts), "core regions", lambda out: build(run, out), read(run.artifacts))


def read(names: Names) -> list[Path]:
    """The folders that are read for it."""
    return [source.path for source in (model.base(names), *probe.tuned(names).values())]


def build(run: Run, out: Path) -> None:
    """Select every task's core region and keep masks, summaries and intersections; what the run that this one goes on
    from has selected is taken from there."""
    known = known_tasks(run.artifacts)
    select(run, {run.config.regions.p: out}, known)
    if known and (parent := run.artifacts.parent):
        order = [task.name for task in run.config.every_task]
        join_regions(out, parent.regions.path, known, order)
        changed = _read_json(out / CHANGES)
        earlier = {
            task: tensors for task, tensors in _read_json(parent.regions.path / CHANGES).items() if task in known
        }
        if earlier or changed:
            write_json(out / CHANGES, earlier | changed)


def known_tasks(names: Names) -> list[str]:
    """The tasks whose regions the run that this one goes on from has selected as this one would."""
    parent, wanted = names.parent, artifact(names)
    return [task.name for task in names.config.every_task if parent and parent.knows_regions(wanted, task.name)]


def select(run: Run, outputs: Mapping[float, Path], known: Sequence[str] = ()) -> None:
    """Core regions for every p of `outputs`, each into its folder, from one pass over the checkpoints; but for those
    of tasks that are `known`."""
    base = model.base(run.artifacts)
    tuned = {task: probed for task, probed in probe.tuned(run.artifacts).items() if task not in known}
    if not tuned:
        return
    folders = {task: probed.path for task, probed in tuned.items()}
    opened, others = open_models(base.path, folders, run.config.fusion.fitted)
    mark = run.merging.mark if run.merging else None
    whole = run.merging.select if isinstance(run.merging, Selects) else None
    here = run.merging is None or run.merging.in_passing  # else models pass by other machines or a GPU
    passing = ChangesInPassing() if here else None
    given = probe.moments(run.artifacts) if _needs_moments(run.artifacts) else {}
    files = {task: file for task, file in given.items() if task in tuned}
    moments = open_moments(files, opened)
    budget = run.config.resources.memory_budget
    streaming = Streaming(budget, mark=mark, select=whole, passing=passing, moments=moments)
    inputs = Inputs.of({"pretrained": base, **tuned}, run.config.resources, files)
    with inputs.looked_at():
        write_regions(opened, others, run.config.regions, outputs, streaming)
    for read_there in moments.values():
        read_there.require_unchanged()
    changed = _changes(passing, opened, list(others), run.config.regions) if passing else {}
    described = inputs.described()
    for out in outputs.values():
        write_json(out / INPUTS_RECORD, described)
        if changed:
            write_json(out / CHANGES, changed)


def _changes(
    passing: ChangesInPassing, base: Checkpoint, tasks: list[str], config: RegionsConfig
) -> dict[str, dict[str, dict[str, float]]]:
    """By task and tensor what its fine-tune changed."""
    sizes = {name: numel for name in parameter_space(base, config) if (numel := base.tensors[name].numel)}
    found = {task: passing.of(number, sizes) for number, task in enumerate(tasks)}
    return {
        task: {name: asdict(change) for name, change in tensors.items()} for task, tensors in found.items() if tensors
    }


def read_changes(folder: Path) -> dict[str, dict[str, Change]]:
    """By task and tensor what the regions in `folder` were selected from; empty where it was not measured."""
    tasks = _read_json(folder / CHANGES).items()
    return {task: {name: Change(**change) for name, change in tensors.items()} for task, tensors in tasks}


def _read_json(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}


def title(names: Names) -> str:
    return "core regions" if wanted(names.config) else ""


def plan(names: Names, known: Known) -> Iterator[Step]:
    if wanted(names.config):
        regions = names.config.regions
        there = known_tasks(names)
        kept = f"; those of {', '.join(there)} are there" if there else ""
        by = "" if regions.measure == "update" else f", by {regions.measure}"
        yield step_of(artifact(names), f"p = {regions.p:g}, {regions.scope}{by}{kept}")


def outputs(names: Names, known: Known) -> dict[str, Artifact]:
    return {"regions": artifact(names)} if wanted(names.config) else {}


def models(names: Names, known: Known) -> list[ModelRef]:
    return []
