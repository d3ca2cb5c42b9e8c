"""Stage 2: every task's core region, the elements that its fine-tune moved most, as masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from cpift.checkpoints.opening import open_models
from cpift.config.identity import identity_of
from cpift.config.run import RunConfig
from cpift.disk.artifacts import Artifact
from cpift.disk.files import write_json
from cpift.method.regions import Streaming, write_regions
from cpift.pipeline.run import Run, unless_damaged
from cpift.pipeline.stages import model, probe
from cpift.pipeline.stages.inputs import INPUTS_RECORD, describe_inputs
from cpift.pipeline.stages.names import Known, ModelRef, Names, once
from cpift.pipeline.stages.step import Step, step_of

VERSION = 1


def wanted(config: RunConfig) -> bool:
    """Whether anything needs regions and groups: other merges know neither, but integration does."""
    return config.fusion.isolates or config.integration is not None


@once
def artifact(names: Names) -> Artifact:
    """Named by θ0, θ1..θN, and how elements are chosen."""
    inputs = {"model": model.base(names).fingerprint} | probe.fingerprints(names)
    return names.artifact("regions", VERSION, inputs, identity_of(names.config.regions, "regions"))


@unless_damaged
def make(run: Run) -> Artifact:
    """The masks of all tasks, with what they have in common."""
    probe.make(run)
    return run.make(artifact(run.artifacts), "core regions", lambda out: build(run, out), read(run.artifacts))


def read(names: Names) -> list[Path]:
    """The folders that are read for it."""
    return [source.path for source in (model.base(names), *probe.tuned(names).values())]


def build(run: Run, out: Path) -> None:
    """Select every task's core region and keep masks, summaries and intersections."""
    select(run, {run.config.regions.p: out})


def select(run: Run, outputs: Mapping[float, Path]) -> None:
    """Core regions for every p of `outputs`, each into its folder, from one pass over the checkpoints."""
    base, tuned = model.base(run.artifacts), probe.tuned(run.artifacts)
    folders = {task: probed.path for task, probed in tuned.items()}
    opened, others = open_models(base.path, folders, run.config.fusion.vocabulary)
    mark = run.merging.mark if run.merging else None
    streaming = Streaming(budget=run.config.resources.memory_budget, mark=mark)
    write_regions(opened, others, run.config.regions, outputs, streaming)
    described = describe_inputs({"pretrained": base, **tuned}, hashed=run.config.resources.verify)
    for out in outputs.values():
        write_json(out / INPUTS_RECORD, described)


def title(names: Names) -> str:
    return "core regions" if wanted(names.config) else ""


def plan(names: Names, known: Known) -> Iterator[Step]:
    if wanted(names.config):
        regions = names.config.regions
        yield step_of(artifact(names), f"p = {regions.p:g}, {regions.scope}")


def outputs(names: Names, known: Known) -> dict[str, Artifact]:
    return {"regions": artifact(names)} if wanted(names.config) else {}


def models(names: Names, known: Known) -> list[ModelRef]:
    return []
