"""Stage 6: the staged fine-tune of the fused model, with the cores of earlier groups frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cpift.config.run import RunConfig
from cpift.disk.artifacts import Artifact
from cpift.errors import entry
from cpift.pipeline.run import Fit, Run, unless_damaged
from cpift.pipeline.stages import backbone, fuse, group, regions
from cpift.pipeline.stages.fits import fit_spec, length, threads_alone, train_data, training_fields, watched_data
from cpift.pipeline.stages.names import Groups, Known, ModelRef, Names
from cpift.pipeline.stages.step import Step, step_of
from cpift.training.spec import STEPS_PER, FitSpec, stages_of

VERSION = 2
# `integration.stages` → the groups that are trained one after the other
STAGES: dict[str, Callable[[Groups], Groups]] = {
    "groups": lambda groups: groups,
    "mixed": lambda groups: [tuple(task for group in groups for task in group)],
}


def artifact(names: Names, groups: Groups, fused: Artifact) -> Artifact:
    """Named by the fused model, the regions, the rows of all tasks, the groups, and how it is trained."""
    config, training = names.config, names.config.integration_training
    fields = training_fields(names, "integrate", training, threads_alone(names), config.resources)
    fields |= {"groups": [list(group) for group in in_order(config, groups)]}
    inputs = {"fused": fused.fingerprint, "regions": regions.artifact(names).fingerprint} | train_data(names)
    inputs |= watched_data(names, training, config.integrated)
    return names.artifact("integrate", VERSION, inputs, fields)


def in_order(config: RunConfig, groups: Groups) -> Groups:
    """What is trained one after the other. Earlier tasks, inside the model already, are the first of all, whatever
    group they came into; then there is one stage, of this run's own tasks and those that are replayed."""
    if not config.earlier:
        return groups
    return [[task.name for task in config.earlier], [task.name for task in config.integrated]]


@unless_damaged
def make(run: Run, beside: Sequence[Fit] = ()) -> ModelRef:
    """The final model. `beside`: fine-tunes that are trained at the same time, if this one is to be trained."""
    groups, fused = group.make(run).groups, fuse.make(run)
    final = artifact(run.artifacts, groups, fuse.artifact(run.artifacts, groups, backbone.make(run)))
    others = () if final.has_weights else beside
    specs = [spec(run, fused, groups, final), *(other for _, other in others)]

    def finish(artifact: Artifact, out: Path) -> None:
        if artifact.path == final.path:
            fuse.add_card(run, "final", groups, artifact, out)

    run.train([final, *(output for output, _ in others)], title(run.artifacts), lambda: specs, finish)
    run.said.update(other.title for _, other in others)
    return ModelRef.of("final", final)


def spec(run: Run, fused: ModelRef, groups: Groups, final: Artifact) -> FitSpec:
    """Multi-stage SFT of the fused model on balanced samples, cores frozen; or one stage of the same length."""
    settings = run.config.integration_training
    if run.config.earlier:
        stages, groups = stages_of(in_order(run.config, groups), settings.freeze)[1:], in_order(run.config, groups)[1:]
    else:
        stages = stages_of(entry(STAGES, settings.stages, "integration.stages")(groups), settings.freeze)
    each = entry(STEPS_PER, settings.steps_per, "steps_per")
    times = sum(map(each, groups)) // sum(each(stage.tasks) for stage in stages)
    training = settings.model_copy(update={"steps": settings.steps and settings.steps * times})
    return replace(
        fit_spec(run.artifacts, "integration", fused, training, stages, final),
        threads=threads_alone(run.artifacts),
        regions=regions.artifact(run.artifacts).path,
        penalty=settings.penalty,
        samples_per_task=settings.samples_per_task,
        balanced=True,
    )


def title(names: Names) -> str:
    return "integration" if names.config.integration is not None else ""


def trains(config: RunConfig) -> bool:
    """Whether the config has the fields and the rows for it."""
    return config.integration is not None and all(task.train is not None for task in config.integrated)


def plan(names: Names, known: Known) -> Iterator[Step]:
    if not trains(names.config):
        return
    fused = fuse.known_artifact(names, known)
    if known.groups is None:
        each = f"{length(names.config.integration_training)} each"
        yield Step("integrate", "", "after group", f"its groups decide the stages, {each}")
    elif fused is None:
        yield Step("integrate", "", "after fuse", "")
    else:
        yield step_of(artifact(names, known.groups, fused), detail(names.config, known.groups))


def detail(config: RunConfig, groups: Groups) -> str:
    """How the integration is trained, in a plan's words."""
    settings = config.integration_training
    each = length(settings)
    if config.earlier:
        return f"1 stage, {each} each, earlier cores frozen"
    if len(entry(STAGES, settings.stages, "integration.stages")(groups)) == len(groups):
        return f"{len(groups)} stages, {each} each"
    several = settings.steps is not None and settings.steps_per == "stage"
    return f"1 stage of all tasks, {f'{len(groups)} × ' if several else ''}{each}"


def outputs(names: Names, known: Known) -> dict[str, Artifact]:
    fused = fuse.known_artifact(names, known)
    if names.config.integration is None or known.groups is None or fused is None:
        return {}
    return {"integrate": artifact(names, known.groups, fused)}


def models(names: Names, known: Known) -> list[ModelRef]:
    return [ModelRef.of("final", final) for final in outputs(names, known).values()]
