"""What each command needs of what a config may leave out."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cpift.config.run import RunConfig, TaskConfig, TrainingConfig
from cpift.errors import ConfigError, Problem


@dataclass(frozen=True)
class Need:
    """What a command makes of what a config may leave out. integrates: always, or only where `integration` is there."""

    command: str
    fuses: bool = False
    integrates: Literal["always", "if configured", "never"] = "never"
    scores: bool = False

    def integrates_of(self, config: RunConfig) -> bool:
        return self.integrates == "always" or (self.integrates == "if configured" and config.integration is not None)


# Every command that a config is checked for; one that is not here cannot be asked about.
NEEDS = {
    None: Need("plan"),
    "probe": Need("probe"),
    "regions": Need("regions"),
    "group": Need("group"),
    "fuse": Need("fuse", fuses=True),
    "integrate": Need("integrate", fuses=True, integrates="always"),
    "evaluate": Need("evaluate", fuses=True, integrates="if configured", scores=True),
    "report": Need("report", fuses=True, integrates="always", scores=True),
    "run": Need("run", fuses=True, integrates="always", scores=True),
    "compare": Need("compare", fuses=True, integrates="always", scores=True),
    "sweep fused": Need("sweep", fuses=True, scores=True),
    "sweep final": Need("sweep", fuses=True, integrates="always", scores=True),
}
# The modules that an extra brings, and which of a command's words need one; what methods need, they say themselves.
EXTRAS = {"optuna": ("optuna",), "cmaes": ("optuna", "cmaes"), "eval": ("lm_eval",), "peft": ("peft",)}
_NEEDED_BY = {"optuna": "optuna", "cmaes": "cmaes", "standard": "eval"}
_STOPS_BEFORE = "add it; `cpift fuse`, `evaluate`, and `sweep` with `model: fused` do without"


def require_extra(word: str, where: str) -> None:
    """Raise ConfigError, before anything is read, where what `word` needs is not installed."""
    if problems := absent_extra(_NEEDED_BY.get(word, ""), word, where):
        raise ConfigError("extras", problems)


def absent_extra(extra: str, word: str, where: str) -> list[Problem]:
    """What `word` needs of an extra, "" for none, and is not installed."""
    absent = [name for name in EXTRAS.get(extra, ()) if importlib.util.find_spec(name) is None]
    what = f"{word} needs {', '.join(absent)}, which is not installed"
    return [Problem(where, what, f"pip install 'cpift[{extra}]'")] if absent else []


def missing(config: RunConfig, stage: str | None) -> Iterator[Problem]:
    """Fields that may be left out, but not for this stage, a key of `NEEDS`."""
    need = NEEDS[stage]
    integrates = need.integrates_of(config)
    if integrates and config.integration is None:
        yield Problem("integration", f"is not there, and `cpift {need.command}` needs it", _STOPS_BEFORE)
    staged = config.backbone_source == "staged" and need.fuses
    if staged and config.probe is None and config.backbone.training is None:
        remedy = "add it, or set backbone.source: pretrained"
        yield Problem("backbone.training", "is not there, and the staged backbone has to be trained", remedy)
    yield from dict.fromkeys(_watched(config, stage))
    yield from dict.fromkeys(problem for task in config.tasks for problem in _optimizers(config, task, stage))
    if config.baselines is not None and (need.scores or stage is None):
        yield from _of_baselines(config)
    for task in config.tasks:
        if task.train is None and (integrates or staged):
            why = "`integration` trains on it" if integrates else "backbone.source: staged trains on it"
            remedy = "leave `integration` out" if integrates else "set backbone.source: pretrained"
            yield Problem(f"tasks.{task.name}.train", f"is not there, and {why}", f"give training rows, or {remedy}")
        if task.source("test") is None and need.scores:
            why = f"`cpift {need.command}` scores on it"
            yield Problem(f"tasks.{task.name}.test", f"is not there, and {why}", "give rows")


def trained_in(config: RunConfig, task: TaskConfig, stage: str | None) -> dict[str, TrainingConfig]:
    """The fine-tunes that go over a task's rows, if all up to `stage`, a key of `NEEDS`, is made: by their section."""
    fits: dict[str, TrainingConfig] = {}
    if task in config.tasks and task.checkpoint is None and config.probe is not None:
        fits["probe"] = config.probe
    training = config.backbone.training or config.probe
    if training and config.backbone_source == "staged" and stage not in ("probe", "regions", "group"):
        fits["backbone.training" if config.backbone.training else "probe"] = training
    if task in config.integrated and config.integration is not None and NEEDS[stage or "run"].integrates_of(config):
        fits["integration"] = config.integration
    return fits


# `optimizer` → the module that it needs, and whether it knows the shares of a model that FSDP2 makes.
_OPTIMIZERS = {"adafactor": ("", False), "adamw_8bit": ("bitsandbytes", False), "muon": ("", True)}


def _optimizers(config: RunConfig, task: TaskConfig, stage: str | None) -> Iterator[Problem]:
    resources = config.resources
    sharded = {True: resources.overridden(task.resources).workers > 1, False: resources.workers > 1}
    for section, training in trained_in(config, task, stage).items():
        module, shares = _OPTIMIZERS.get(training.optimizer, ("", True))
        where, name = f"{section}.optimizer", training.optimizer
        if module and importlib.util.find_spec(module) is None:
            what = f"{name} needs {module}, which is not installed"
            yield Problem(where, what, f"pip install {module}, or name another")
        if not shares and resources.sharded and sharded[section == "probe"]:
            what = f"{name} keeps whole tensors, and resources.strategy: fsdp shares them out"
            yield Problem(where, what, "name another, or set resources.strategy: ddp")


def _watched(config: RunConfig, stage: str | None) -> Iterator[Problem]:
    """Held-out losses need rows; and budgets are counted before anybody loses patience."""
    for task in config.every_task:
        for section, training in trained_in(config, task, stage).items():
            if training.evaluate_every and task.validation is None and training.validation is None:
                what = f"watches a loss on held-out rows, and task {task.name} has none"
                remedy = f"give tasks.{task.name}.validation, or {section}.validation: {{rows: 200}}"
                yield Problem(f"{section}.evaluate_every", what, remedy)
            if training.patience and (stage == "compare" or (config.baselines and config.baselines.full_sft)):
                what = "ends stages early, and SFT as a baseline has as many tokens as the stages were to have"
                yield Problem(f"{section}.patience", what, "leave it out, or the baseline")


def _of_baselines(config: RunConfig) -> Iterator[Problem]:
    """What `baselines` needs: full_sft has as many tokens as the run's fine-tunes, all of which have to be its own."""
    assert config.baselines is not None
    if config.baselines.full_sft is not None:
        remedy = "give it, or leave baselines.full_sft out"
        if config.integration is None:
            yield Problem("baselines.full_sft", "trains as many tokens as the run, and has no `integration`", remedy)
        for task in config.tasks:
            if task.train is None:
                yield Problem("baselines.full_sft", f"trains on tasks.{task.name}.train, which is not there", remedy)
            elif task.checkpoint is not None:
                what = f"trains as many tokens as the run, and how many tasks.{task.name}.checkpoint saw is not known"
                yield Problem("baselines.full_sft", what, "leave it out, or give no checkpoint")
