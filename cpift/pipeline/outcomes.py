"""What becomes of a run that is one of several: the models and scores it ends with, made or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpift.disk.artifacts import Artifact
from cpift.disk.files import read_json
from cpift.errors import entry
from cpift.pipeline.identity import Model
from cpift.pipeline.pipeline import Pipeline

INTEGRATES = {"final": True, "fused": False}  # the judged model → whether a run integrates for it


def outcome(run: Pipeline, model: str) -> Artifact:
    """The scores of a run's final (or fused) model: an artifact that names everything they depend on."""
    return run.artifacts.evaluate(Model.of(model, own_models(run, model)[model]))


def expected_backbone(run: Pipeline) -> Model:
    """θ_base as it is or will be: a staged one is not trained here."""
    staged = run.artifacts.backbone(run.group().groups)
    return run.backbone() if staged is None else Model.of("backbone", staged)


def own_models(run: Pipeline, model: str) -> dict[str, Artifact]:
    """The models that a trial makes for itself, made or not: fused, and where `model` says so final."""
    groups = run.group().groups
    fused = run.artifacts.fuse(groups, expected_backbone(run))
    integrated = {"final": run.artifacts.integrate(groups, fused)} if entry(INTEGRATES, model, "model") else {}
    return {"fused": fused} | integrated


def shared_models(run: Pipeline) -> list[Model]:
    """θ0 and the probes."""
    return [run.artifacts.base, *run.artifacts.tuned.values()]


def backbone_models(run: Pipeline) -> list[Model]:
    """θ_base as it is or will be; empty where θ0 itself is the backbone."""
    return [expected_backbone(run)] if run.config.backbone_source != "pretrained" else []


def trial_models(run: Pipeline, model: str) -> list[Model]:
    """The models that differ from trial to trial: the backbone, the fused and, where `model` says so, the final one."""
    return backbone_models(run) + [Model.of(title, made) for title, made in own_models(run, model).items()]


def scored_models(run: Pipeline, model: str) -> list[Model]:
    """Every model that a trial with this judged model scores, in the report's order, made or not."""
    return shared_models(run) + trial_models(run, model)


def scores_of(run: Pipeline, models: Sequence[Model]) -> dict[str, dict[str, Any]]:
    """Scores by model and task, which must be there."""
    return {model.title: read_json(run.artifacts.evaluate(model).path / "scores.json") for model in models}


def known_scores(run: Pipeline, model: str) -> dict[str, dict[str, Any]] | None:
    """Scores by model and task of a trial that has made them all, be its models' weights there or dropped."""
    scored = {one.title: run.artifacts.evaluate(one) for one in scored_models(run, model)}
    if not all(made.complete for made in (*own_models(run, model).values(), *scored.values())):
        return None
    return {title: read_json(made.path / "scores.json") for title, made in scored.items()}
