"""Stage 1: one fine-tune a task, all in parallel; tasks that have their checkpoint keep it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from cpift.checkpoints.opening import MOMENTS, as_read, file_fingerprint
from cpift.config.run import CheckpointConfig, TaskConfig
from cpift.disk.artifacts import Artifact
from cpift.errors import CheckpointError, Problem
from cpift.merging.registry import reads_moments
from cpift.pipeline.run import Run, unless_damaged
from cpift.pipeline.stages import model
from cpift.pipeline.stages.fits import fit_spec, length, tokens_of, training_fields, watched_data
from cpift.pipeline.stages.names import Known, ModelRef, Names, once
from cpift.pipeline.stages.step import Step, step_of
from cpift.training.spec import FitSpec, StageSpec

VERSION = 2


@once
def artifacts(names: Names) -> dict[str, Artifact]:
    """By task, the probes that are trained here: named by θ0, the task's rows, and how they are trained."""
    return {task.name: _artifact(names, task) for task in names.config.trained}


def _artifact(names: Names, task: TaskConfig) -> Artifact:
    inputs = {"model": model.artifact(names).fingerprint, "data": names.train_rows(task.name)}
    inputs |= watched_data(names, names.config.probe_training, [task])
    resources = names.config.resources.overridden(task.resources)
    fields = training_fields(names, "probe", names.config.probe_training, resources.threads, resources)
    return names.artifact("probe", VERSION, inputs, fields, task.name)


@once
def tuned(names: Names) -> dict[str, ModelRef]:
    """θ1..θN by task: the probes, trained here or given."""
    return {
        task.name: ModelRef.of(f"probe {task.name}", artifacts(names)[task.name])
        if task.checkpoint is None
        else _named_by_user(names, task.name, task.checkpoint)
        for task in names.config.tasks
    }


def _named_by_user(names: Names, task: str, source: CheckpointConfig) -> ModelRef:
    there = model.in_place(names) or model.artifact(names).complete
    read = partial(as_read, base=model.base(names).path if there else None)
    return names.input_model(f"probe {task}", f"tasks.{task}.checkpoint", source, read)


def every_fingerprint(names: Names) -> dict[str, str]:
    """`fingerprints`, and before them those of earlier tasks, whose probes are not here."""
    made_of = names.parent.made_of if names.parent else {}
    earlier = {f"probe {task.name}": made_of.get(f"probe {task.name}", "") for task in names.config.earlier}
    return earlier | fingerprints(names)


def fingerprints(names: Names) -> dict[str, str]:
    """Of θ1..θN, as inputs of what is made of them."""
    return {f"probe {task}": probed.fingerprint for task, probed in tuned(names).items()}


@once
def moments(names: Names) -> dict[str, Path]:
    """By task, the file of its second moments: its probe's, or one that is given; it need not be there."""
    return {
        task.name: task.moments if task.moments is not None else tuned(names)[task.name].path / MOMENTS
        for task in names.config.tasks
    }


def moments_merged(names: Names) -> dict[str, Path]:
    """`moments`, of a fusion whose method reads them."""
    return moments(names) if reads_moments(names.config.fusion.method) else {}


def moments_given(names: Names) -> dict[str, str]:
    """Fingerprints of second moments as inputs of what is made of them: of files that are given, for a probe's own are
    part of it. Of earlier tasks, those that their cores were selected by."""
    labels = [f"moments {task.name}" for task in names.config.earlier]
    found = {label: names.parent.made_of[label] for label in labels if names.parent and label in names.parent.made_of}
    for task in names.config.tasks:
        if task.checkpoint is not None:
            found[f"moments {task.name}"] = _identified(names, task.name, moments(names)[task.name])
    return found


def _identified(names: Names, task: str, file: Path) -> str:
    field = f"tasks.{task}.moments"
    if not file.is_file():
        what, remedy = f"there is no {file}", "give the file that a fine-tune wrote with keep_moments: true"
        raise CheckpointError(f"second moments of {task}", [Problem(field, what, remedy)])
    return names.watch.identify(field, lambda: [file], lambda: file_fingerprint(file))


@unless_damaged
def make(run: Run) -> dict[str, ModelRef]:
    """θ1..θN by task."""
    probes = artifacts(run.artifacts)
    run.hand_over(probes.values())
    if missing := {artifact.work_dir / "export" for artifact in probes.values() if not artifact.complete}:
        run.engine.expect([spec for spec in specs(run, model.base(run.artifacts)) if spec.export in missing])
    base = model.make(run)
    if probes:
        if missing:
            check_data(run, base)
        run.train(probes.values(), title(run.artifacts), lambda: specs(run, base))
    return tuned(run.artifacts)


def check_data(run: Run, base: ModelRef) -> None:
    """What only θ0's tokenizer can tell of the data: raise DataError before the first fine-tune, not after the last.
    Training rows are kept as tokens meanwhile."""
    from cpift.evaluation.rows import check_rows
    from cpift.models.sources import load_tokenizer, source_of
    from cpift.pipeline.row_checks import keep_train_rows

    at_hand = model.in_place(run.artifacts) and source_of(run.config.model).tokenizer()
    tokenizer = at_hand or load_tokenizer(base.path)
    keep_train_rows(run.config, tokenizer, tokens_of(run.artifacts))
    check_rows(
        tokenizer, [task for task in run.config.scored if task.source("test") is not None], run.config.evaluation
    )


def specs(run: Run, base: ModelRef) -> list[FitSpec]:
    """One single-stage fine-tune from θ0 a task."""
    fits = []
    for task, artifact in artifacts(run.artifacts).items():
        stages = (StageSpec((task,)),)
        spec = fit_spec(run.artifacts, f"probe {task}", base, run.config.probe_training, stages, artifact)
        own = run.config.resources.overridden(run.config.task(task).resources)
        keeps = run.config.probe_training.keep_moments
        fits.append(replace(spec, resources=own, threads=own.threads, keep_moments=keeps))
    return fits


def title(names: Names) -> str:
    return "probes" if names.config.trained else ""


def plan(names: Names, known: Known) -> Iterator[Step]:
    for task in names.config.tasks:
        if task.checkpoint is None:
            yield step_of(artifacts(names)[task.name], length(names.config.probe_training), names.parent)
        else:
            yield Step("probe", task.name, "given", str(task.checkpoint.path or task.checkpoint.hub))


def outputs(names: Names, known: Known) -> dict[str, Artifact]:
    return {f"probe {task}": artifact for task, artifact in artifacts(names).items()}


def models(names: Names, known: Known) -> list[ModelRef]:
    return list(tuned(names).values())
