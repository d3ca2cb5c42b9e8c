"""Fields of a config that say something and change nothing, beside what else it says.

They are told of and not refused: the same file may serve commands and comparisons in which they count, and one that
was run once has to run again. A field at its default says nothing; `freeze: earlier` is the exception, for people who
ask for one mixed stage mean something by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pydantic import BaseModel

from cpift.config.needs import trained_in
from cpift.config.run import RunConfig
from cpift.evaluation.metrics import METRICS
from cpift.merging.registry import METHODS, OF_ALL, reads_moments
from cpift.method.measures import measure_named

Idle = tuple[str, str]  # the field, and why it changes nothing


def idle_notes(config: RunConfig) -> Iterator[str]:
    """A sentence for each field that is given and changes nothing in a run of this config."""
    for rule in RULES:
        yield from (f"{field} does nothing: {why}" for field, why in rule(config))


def given(section: BaseModel) -> list[str]:
    """The fields of a section that are not at their defaults."""
    return [
        name
        for name, field in type(section).model_fields.items()
        if getattr(section, name) != field.get_default(call_default_factory=True)
    ]


def _freezing(config: RunConfig) -> Iterator[Idle]:
    settings = config.integration
    if settings is None or config.earlier:  # those are earlier than any stage
        return
    mixed = settings.stages == "mixed" and settings.freeze == "earlier"
    if mixed:
        what = "integration.stages: mixed has one stage, and no cores of earlier ones"
        yield "integration.freeze: earlier", f"{what}; freeze: all holds every core"
    elif settings.freeze == "earlier" and len(config.tasks) == 1:
        yield "integration.freeze: earlier", "there is one task, and no cores of earlier ones"
    if settings.penalty is not None and (mixed or settings.freeze == "none"):
        yield "integration.penalty", "it pulls back the cores that integration.freeze names, and there are none"


def _mixing(config: RunConfig) -> Iterator[Idle]:
    staged = config.backbone_source == "staged" and config.backbone.training is None
    if config.probe is not None and given(config.probe.mixing) and not staged:
        yield "probe.mixing", "a probe has one task, and no staged backbone is trained as probes are"


def _regions(config: RunConfig) -> Iterator[Idle]:
    if config.fusion.isolates or config.integration is not None:
        return
    for name in ("regions", "groups"):
        if fields := _given_of(config, name):
            why = f"fusion.method {config.fusion.method_name} knows no core regions, and nothing is trained after it"
            yield f"{name}.{', '.join(fields)}", why


def _given_of(config: RunConfig, name: str) -> list[str]:
    """The fields of a run's section that are not as in a run that leaves it out."""
    section, absent = getattr(config, name), RunConfig.model_fields[name].get_default(call_default_factory=True)
    return [field for field in type(section).model_fields if getattr(section, field) != getattr(absent, field)]


def _backbone(config: RunConfig) -> Iterator[Idle]:
    backbone, fusion = config.backbone, config.fusion
    if not fusion.isolates and "source" in given(backbone):
        yield "backbone.source", f"fusion.method {fusion.method_name} merges onto θ0"
    if backbone.revision is not None and backbone.source in ("staged", "pretrained"):
        yield "backbone.revision", "it is of a hub id"
    plain_sft = config.baselines is not None and config.baselines.full_sft is not None
    if backbone.training is not None and config.backbone_source != "staged" and not plain_sft:
        yield "backbone.training", "no backbone is trained here; `cpift compare` trains plain SFT by it"


def _fusion(config: RunConfig) -> Iterator[Idle]:
    fusion = config.fusion
    if (
        fusion.method not in METHODS or fusion.slices
    ):  # of a user's own that is not asked; a slice has settings of its own
        return
    read = {*METHODS[fusion.method].fields, *OF_ALL}
    for name in given(fusion):
        if name not in read:
            yield f"fusion.{name}", f"method {fusion.method} does not read it"
    if fusion.isolates and not fusion.transplant and "conflict" in given(fusion):
        yield "fusion.conflict", "with transplant: false there are no cores that could meet"
    if fusion.rank is not None and not fusion.as_lora:
        yield "fusion.rank", "it is of as_lora: true"
    for name in () if fusion.by_tokens else ("missing_tokens",):
        if name in given(fusion):
            yield f"fusion.{name}", "it is of a vocabulary by tokens"


def _rows(config: RunConfig) -> Iterator[Idle]:
    measured = measure_named(config.regions.measure).needs_moments or reads_moments(config.fusion.method)
    for task in config.tasks:
        watched = any(fit.evaluate_every for fit in trained_in(config, task, "run").values())
        if task.validation is not None and not watched:
            yield f"tasks.{task.name}.validation", "no fine-tune over the task has evaluate_every"
        if task.moments is not None and not measured:
            yield f"tasks.{task.name}.moments", "nothing reads second moments"
        if "max_new_tokens" in given(task) and not _generates(task.metric):
            yield f"tasks.{task.name}.max_new_tokens", f"metric {task.metric} generates nothing"
    if config.evaluation.judge is not None and all(task.metric != "judge" for task in config.scored):
        yield "evaluation.judge", "no task has metric: judge"


def _generates(metric: str) -> bool:
    return metric not in METRICS or METRICS[metric].generates


def _workers(config: RunConfig) -> Iterator[Idle]:
    resources = config.resources
    several = resources.workers > 1 or any((task.resources.workers or 1) > 1 for task in config.tasks)
    if resources.sharded and not several:
        yield "resources.strategy: fsdp", "one worker has nothing to share out; give resources.workers"
    sections = {"probe": config.probe, "backbone.training": config.backbone.training, "integration": config.integration}
    for name, training in sections.items():
        if training is not None and training.gather != "auto" and not (resources.sharded and several):
            yield f"{name}.gather", "it is of several workers and resources.strategy: fsdp"


RULES: tuple[Callable[[RunConfig], Iterator[Idle]], ...] = (
    _freezing,
    _mixing,
    _regions,
    _backbone,
    _fusion,
    _rows,
    _workers,
)
