"""Stage 4: θ_base, a fine-tune of θ0 that goes over the groups; or θ0 itself, or a model that the user names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cpift.checkpoints.opening import pinned
from cpift.config.run import ModelConfig, RunConfig
from cpift.disk.artifacts import Artifact
from cpift.lineage.history import BEFORE
from cpift.pipeline.run import Run, unless_damaged
from cpift.pipeline.stages import group, model, regions
from cpift.pipeline.stages.fits import fit_spec, length, threads_alone, train_data, training_fields, watched_data
from cpift.pipeline.stages.names import Groups, Known, ModelRef, Names
from cpift.pipeline.stages.step import Step, step_of
from cpift.training.spec import FitSpec, stages_of

VERSION = 2
_TITLES = {"staged": "staged backbone", "pretrained": "", "parent": ""}
_GIVEN = "given backbone"


def artifact(names: Names, groups: Groups) -> Artifact | None:
    """Named by θ0, the rows of all tasks, the groups, and how it is trained. None where none is trained."""
    config = names.config
    if config.backbone_source != "staged":
        return None
    inputs = {"model": model.artifact(names).fingerprint} | train_data(names)
    inputs |= watched_data(names, config.backbone_training, config.tasks)
    fields = training_fields(names, "backbone", config.backbone_training, threads_alone(names), config.resources)
    fields |= {"groups": [list(group) for group in groups]}
    return names.artifact("backbone", VERSION, inputs, fields)


@unless_damaged
def make(run: Run) -> ModelRef:
    """θ_base."""
    if run.config.backbone_source == "pretrained":
        return model.make(run)
    if run.config.backbone_source == "parent":
        return before(run.artifacts)[0]
    groups = group.make(run).groups
    staged = artifact(run.artifacts, groups)
    if staged is None:
        return _named_by_user(run)
    base = model.make(run)
    run.train([staged], title(run.artifacts), lambda: [spec(run, base, groups, staged)])
    return ModelRef.of("backbone", staged)


def before(names: Names) -> list[ModelRef]:
    """The final model of the run that this one goes on from, if there is one."""
    return [ModelRef.of(BEFORE, names.parent.final)] if names.parent else []


def _named_by_user(run: Run) -> ModelRef:
    """A backbone that the user names: a local directory or a hub id."""
    source, local = run.config.backbone.source, Path(run.config.backbone.source).is_dir()
    config = ModelConfig(
        path=Path(source) if local else None,
        hub=None if local else source,
        revision=run.config.backbone.revision,
        dtype=run.config.model.dtype,
        gguf=None,
        scratch=None,
    )
    if run.config.merges_only and config.dtype == "auto":
        return run.artifacts.input_model("backbone", "backbone.source", config)
    config = pinned(config)
    copied = model.copy_of(run.artifacts, "backbone.source", "backbone", config)
    run.make(copied, _GIVEN, lambda out: model.copy(config, out, chats=not run.config.merges_only))
    return ModelRef.of("backbone", copied)


def spec(run: Run, base: ModelRef, groups: Groups, staged: Artifact) -> FitSpec:
    """Multi-stage SFT from θ0, group after group, nothing frozen."""
    training, stages = run.config.backbone_training, stages_of(groups, None)
    staged_fit = fit_spec(run.artifacts, "backbone", base, training, stages, staged)
    return replace(staged_fit, threads=threads_alone(run.artifacts))


def title(names: Names) -> str:
    return _TITLES.get(names.config.backbone_source, _GIVEN) if regions.wanted(names.config) else ""


def plan(names: Names, known: Known) -> Iterator[Step]:
    source = names.config.backbone_source
    if source == "pretrained":
        return
    if source == "parent" and names.parent:
        yield Step("backbone", "", "given", f"the final model of {names.parent.root}")
    elif source != "staged":
        yield Step("backbone", "", "given", source)
    elif known.groups is None:
        yield Step("backbone", "", "after group", f"its groups decide the stages, {_length(names.config)}")
    elif (staged := artifact(names, known.groups)) is not None:
        yield step_of(staged, f"{len(known.groups)} stages, {_length(names.config)}")


def _length(config: RunConfig) -> str:
    return f"{length(config.backbone_training)} each"


def outputs(names: Names, known: Known) -> dict[str, Artifact]:
    staged = None if known.groups is None else artifact(names, known.groups)
    return {} if staged is None else {"backbone": staged}


def models(names: Names, known: Known) -> list[ModelRef]:
    own = known.backbone if names.config.backbone_source not in ("pretrained", "parent") else None
    return [*before(names), *([] if own is None else [own])]
