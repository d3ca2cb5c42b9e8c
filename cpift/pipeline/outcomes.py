"""What becomes of a run that is one of several: the models and scores it ends with, made or not."""

from __future__ import annotations

from collections.abc import Sequence

from cpift.disk.artifacts import Artifact
from cpift.errors import entry
from cpift.evaluation.scores import Score, read_scores
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.stages import order
from cpift.pipeline.stages.names import NOTHING, ModelRef

INTEGRATES = {"final": True, "fused": False}  # the judged model → whether a run integrates for it


def _own(model: str) -> tuple[str, ...]:
    """The stages that a trial goes through for itself."""
    return order.LAST if entry(INTEGRATES, model, "model") else order.LAST[:1]


def outcome(run: Pipeline, model: str) -> Artifact:
    """The scores of a run's final (or fused) model: an artifact that names everything they depend on."""
    return run.artifacts.evaluate(ModelRef.of(model, own_models(run, model)[model]))


def own_models(run: Pipeline, model: str) -> dict[str, Artifact]:
    """The models that a trial makes for itself, made or not: fused, and where `model` says so final."""
    known = run.known()
    titles = [own.title for own in order.models(run.artifacts, known, *_own(model))]
    return dict(zip(titles, order.outputs(run.artifacts, known, *_own(model)).values(), strict=True))


def shared_models(run: Pipeline) -> list[ModelRef]:
    """θ0 and the probes."""
    return order.models(run.artifacts, NOTHING, "model", "probe")


def trial_models(run: Pipeline, model: str) -> list[ModelRef]:
    """The models that differ from trial to trial: the backbone, the fused and, where `model` says so, the final one."""
    return order.models(run.artifacts, run.known(), "backbone", *_own(model))


def scored_models(run: Pipeline, model: str) -> list[ModelRef]:
    """Every model that a trial with this judged model scores, in the report's order, made or not."""
    return shared_models(run) + trial_models(run, model)


def scores_of(run: Pipeline, models: Sequence[ModelRef]) -> dict[str, dict[str, Score]]:
    """Scores by model and task, which must be there."""
    return {model.title: read_scores(run.artifacts.evaluate(model).path) for model in models}


def known_scores(run: Pipeline, model: str) -> dict[str, dict[str, Score]] | None:
    """Scores by model and task of a trial that has made them all, be its models' weights there or dropped."""
    models = scored_models(run, model)
    needed = [*own_models(run, model).values(), *map(run.artifacts.evaluate, models)]
    return scores_of(run, models) if all(artifact.complete for artifact in needed) else None
