"""What else could be made of a run's fine-tunes, or of as many tokens: the models of `baselines`, over its stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from cpift.compare.budgets import Budgets, NotCounted
from cpift.compare.methods import together
from cpift.config.inputs import Section
from cpift.config.loading import Fields, with_fields
from cpift.config.run import RunConfig
from cpift.config.tasks import BASELINES, SftBaseline
from cpift.console.view import quiet
from cpift.data.use import RowFacts
from cpift.disk.artifacts import Artifact
from cpift.errors import entry
from cpift.pipeline.engine import NoEngine
from cpift.pipeline.identity import StageArtifacts
from cpift.pipeline.pipeline import Baselines, Pipeline
from cpift.pipeline.plan import Plan, plan
from cpift.pipeline.run import Fit
from cpift.pipeline.stages import backbone
from cpift.pipeline.stages.fits import threads_alone
from cpift.pipeline.stages.names import ModelRef
from cpift.pipeline.stages.step import Step, step_of

_SUBJECT = "baselines"


def make_baselines(run: Pipeline) -> dict[str, Artifact]:
    """Every baseline of a run by its title, made if need be; the run's own models must be there."""
    models = {}
    for name, settings in _chosen(run.config).items():
        title = entry(BASELINES, name, _SUBJECT).title
        models[title] = _trained(run, title) if isinstance(settings, SftBaseline) else _merged(run, name, settings)
    return models


def fits_beside(run: Pipeline) -> list[Fit]:
    """Plain SFT, unless the config gives it threads that no other fine-tune leaves free (`resources.threads_alone`)."""
    alone = threads_alone(run.artifacts) > run.config.resources.threads
    wanted = "full_sft" in _chosen(run.config) and not alone
    return [_sft_fit(run, entry(BASELINES, "full_sft", _SUBJECT).title)] if wanted else []


OF_RUNS = Baselines(make_baselines, fits_beside)


def plan_all(artifacts: StageArtifacts, notes: Sequence[str] = (), rows: Sequence[RowFacts] = ()) -> Plan:
    """The plan of a run with its baselines; `notes`, `rows`: of `preflight`. No rows are counted."""
    return plan(artifacts, notes, _steps(artifacts), rows)


def _steps(artifacts: StageArtifacts) -> Iterator[Step]:
    for name, settings in _chosen(artifacts.config).items():
        baseline = entry(BASELINES, name, _SUBJECT)
        if isinstance(settings, SftBaseline):
            detail = f"as many tokens as all fine-tunes{', every task equally' if settings.balanced else ''}"
            known = _known_training(artifacts)
            stage = "backbone"
        else:
            detail = f"{name} of {len(artifacts.config.tasks)} models"
            known = _merge_of(artifacts.config, name, settings)
            stage = "fuse"
        if known is None:
            yield Step(stage, baseline.title, "after group", detail)
            yield Step("evaluate", baseline.title, "after group", f"{len(artifacts.config.tasks)} tasks")
        else:
            yield replace(step_of(known, detail), label=baseline.title)
            scored = artifacts.evaluate(ModelRef.of(baseline.title, known))
            yield step_of(scored, f"{len(artifacts.config.tasks)} tasks")


def _chosen(config: RunConfig) -> dict[str, Section]:
    return config.baselines.chosen if config.baselines is not None else {}


# ---- merges ----------------------------------------------------------------------------------------------------------


def _merge_fields(name: str, settings: Section) -> Fields:
    """The method with what it says of itself, weights by task left aside: all fields else are the run's own."""
    own = {f"fusion.{field}": value for field, value in settings.model_dump(exclude_none=True).items()}
    plain = {"weight": 1.0, "weights": {}, "densities": {}, "normalize": None, "scale": 1.0, "t": 0.5}
    return {"fusion.method": name} | {f"fusion.{field}": value for field, value in plain.items()} | own


def _merged(run: Pipeline, name: str, settings: Section) -> Artifact:
    own = _beside(run, _merge_fields(name, settings))
    own.fuse()
    run.worked |= own.worked
    return own.artifacts.fuse((), own.pretrained())


def _merge_of(config: RunConfig, name: str, settings: Section) -> Artifact:
    own = StageArtifacts(with_fields(config, _merge_fields(name, settings), _SUBJECT))
    return own.fuse((), own.base)


def _beside(run: Pipeline, fields: Fields) -> Pipeline:
    """The run with other fields, on the same engine; what both make is told of once."""
    config = with_fields(run.config, fields, _SUBJECT)
    own = Pipeline(config, run.engine, run.view, run.artifacts.maker)
    own.said = run.said
    return own


# ---- plain SFT -------------------------------------------------------------------------------------------------------


def _trained(run: Pipeline, title: str) -> Artifact:
    artifact, spec = _sft_fit(run, title)
    run.train([artifact], title, lambda: [spec])
    return artifact


def _sft_fit(run: Pipeline, title: str) -> Fit:
    sized, artifact = _sft(run, Budgets())
    spec = backbone.spec(sized, run.pretrained(), together(sized), artifact)
    return artifact, replace(spec, title=title, logs=run.root / "logs" / title.replace(" ", "-"))


def _sft(run: Pipeline, budgets: Budgets) -> tuple[Pipeline, Artifact]:
    """The run whose staged backbone is plain SFT, and what that makes. Raises NotCounted as `budgets` does."""
    settings = run.config.baselines.full_sft if run.config.baselines is not None else None
    assert settings is not None
    training, groups = run.config.backbone_training, together(run)
    if settings.learning_rate is not None:
        training = training.model_copy(update={"learning_rate": settings.learning_rate})
    fields = {"backbone.training": training.model_dump(mode="json", exclude_none=True)}
    sized = budgets.sft(run, groups, "total", settings.balanced, fields)
    artifact = sized.artifacts.backbone(groups)
    assert artifact is not None
    return sized, artifact


def _known_training(artifacts: StageArtifacts) -> Artifact | None:
    """What plain SFT makes, where θ0 and the groups are there and the rows were counted before."""
    if artifacts.known_grouping() is None or not artifacts.model.complete:
        return None
    try:
        return _sft(Pipeline(artifacts.config, NoEngine(), quiet()), Budgets(count=False))[1]
    except NotCounted:
        return None
