"""One comparison, described: a run, the methods it is compared with, and what counts as the same budget.

A file in short (benchmarks/study/*.yaml are commented examples); a run's own YAML file will do as well:

    run: ../../configs/smoke.yaml
    seeds: [0, 1, 2]
    budgets: [total, after_probes]
    variants: {delta space: {fusion.space: delta}}
    curves: {regions.p: [0.01, 0.05, 0.2]}
    forgetting: [[addition, spelling]]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from cpift.config.code import require_words
from cpift.config.inputs import Seed
from cpift.config.loading import Value, base_run, read_yaml, validated, with_fields
from cpift.config.run import Name, RunConfig, Section
from cpift.errors import ConfigError, Problem
from cpift.evaluation.metrics import metric_of
from cpift.text.escaping import markdown

Budget = Literal["total", "after_probes"]


def _title(name: str) -> str:
    if not name.strip() or name != markdown(name) or len(name) > 60:
        raise ValueError("give a name of at most 60 characters on one line, without Markdown in it: pages show it")
    return name


class Contrast(Section):
    """A difference that was named before any score was seen."""

    method: str = Field(description="the method that is asked for; its name as tables show it")
    rival: str = Field(description="what it is measured against")
    by: Literal["retention", "worst", "loss", "arrival"] = Field(
        "retention",
        description="mean retention | the worst task's | loss: mean over tasks that are measured by their loss of "
        "ln(the rival's ÷ its own) | arrival: of methods of `arrival`, ΔA at equal ΔB, mean over pairs",
    )


class ArrivalMethod(Section):
    """How B is learnt by a model that has learnt A, whose rows are gone."""

    hold: Literal["none", "core", "random", "others", "half", "all"] = Field(
        "none",
        description="elements that B's fine-tune leaves as A's model has them. core: A's core region; random: as many "
        "of every tensor, drawn by the seed; others: all but B's own core region; half: each with chance ½, drawn by "
        "the seed; all: every one, with a penalty",
    )
    penalty: float | None = Field(
        None, gt=0, description="instead of holding them: every step takes them this · learning rate of the way back"
    )
    weighted: bool = Field(
        False,
        description="the penalty by element: times A's second moment over their mean (needs probe.keep_moments: true)",
    )
    replay: float = Field(0.0, ge=0, le=1, description="share of A's rows, at random, that are mixed with B's")
    keep: float = Field(
        0.0, ge=0, lt=1, description="share of the weights from before: keep·θ_A + (1 − keep)·θ, after the fine-tune"
    )

    @model_validator(mode="after")
    def _does_what_it_says(self) -> ArrivalMethod:
        if self.hold == "none" and self.penalty is not None:
            raise ValueError("penalty: pulls back what `hold` names; give hold, for example all")
        if self.hold == "all" and self.penalty is None:
            raise ValueError("hold: all leaves nothing to train; give a penalty")
        if self.weighted and self.penalty is None:
            raise ValueError("weighted: is of a penalty; give one")
        return self


class Arrival(Section):
    """Tasks that arrive one after another: A is learnt by its probe, then B from there without A's rows. Every method
    is trained at every learning rate; its line of ΔA against ΔB says what it costs to learn B."""

    pairs: tuple[tuple[str, str], ...] = Field(min_length=1, description="[A, B]: A is learnt first")
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        min_length=1, description="of B's fine-tune, which else is as `probe` says"
    )
    methods: dict[Annotated[str, AfterValidator(_title)], ArrivalMethod] = Field(
        min_length=1, description="by the name to show; {} is plain sequential SFT"
    )
    at: tuple[str, float] | None = Field(
        None,
        description="[method, learning rate]: ΔA of all methods is compared at the ΔB of this one, in a straight line "
        "between the points of their learning rates; default: not compared",
    )

    @model_validator(mode="after")
    def _no_twins(self) -> Arrival:
        if len({*self.pairs}) < len(self.pairs) or len({*self.learning_rates}) < len(self.learning_rates):
            raise ValueError("pairs or learning_rates has an entry twice")
        if self.at is not None and not (self.at[0] in self.methods and self.at[1] in self.learning_rates):
            raise ValueError(f"at: {self.at[0]!r} at {self.at[1]:g} is none of methods and learning_rates")
        return self


class CompareConfig(Section):
    """A whole comparison."""

    name: Name | None = Field(None, description="default: the file's name")
    output: Path | None = Field(None, description="folder for everything it makes; default: runs/<name>")
    run: str | dict[str, Any] = Field(description="the run's YAML file, relative to this one; or its fields, inline")
    fixed: dict[str, Any] = Field(default_factory=dict, description="fields of the run set for all methods")
    seeds: tuple[Seed, ...] = Field((), description="every method is trained with each; default: the run's own seed")
    budgets: tuple[Budget, ...] = Field(
        ("total",),
        min_length=1,
        description="what plain SFT may use. total: as many tokens as CPI-FT's probes, backbone and integration "
        "together; after_probes: as many as its backbone and integration",
    )
    stages: int = Field(3, ge=2, description="K of multi-stage SFT (paper: 3); at most one a task")
    heuristic: tuple[tuple[str, ...], ...] = Field(
        (), description="groups of multi-stage SFT in a chosen order; default: K groups, tasks of most rows first"
    )
    methods: tuple[str, ...] = Field(
        ("*",), min_length=1, description="glob patterns of the methods to compare, beside θ0, the probes and CPI-FT"
    )
    recommended: dict[str, Any] = Field(
        default_factory=dict,
        description="fields of a second recipe that is judged as CPI-FT is, in the forgetting protocol too; shown as "
        "`CPI-FT, recommended`",
    )
    sft: dict[Annotated[str, AfterValidator(_title)], dict[str, Any]] = Field(
        default_factory=dict,
        description="plain SFT with other fields of its training (`learning_rate`, `schedule`, …), by the name to "
        "show: a rival must be tuned as CPI-FT is. Its length is the budget's",
    )
    variants: dict[Annotated[str, AfterValidator(_title)], dict[str, Any]] = Field(
        default_factory=dict, description="CPI-FT with other fields, by the name to show"
    )
    curves: dict[str, Annotated[tuple[Value, ...], Field(min_length=2)]] = Field(
        default_factory=dict, description="fields of the run, each with the values to draw a curve over"
    )
    forgetting: tuple[tuple[str, str], ...] = Field(
        (), description="pairs of tasks that are learnt one after the other, in both orders"
    )
    arrival: Arrival | None = Field(
        None,
        description="methods to learn tasks that arrive one after another; CPI-FT itself then takes part only if "
        "`methods` names it",
    )
    contrasts: tuple[Contrast, ...] = Field(
        (),
        description="primary differences, shown first and tested together by Holm's procedure; all others are "
        "exploratory",
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="of every interval")
    resamples: int = Field(1000, ge=100, description="bootstrap draws of the test rows")

    @model_validator(mode="after")
    def _no_twins(self) -> CompareConfig:
        for name in ("seeds", "budgets", "forgetting", "contrasts"):
            entries = [str(entry) for entry in getattr(self, name)]
            if len(set(entries)) < len(entries):
                raise ValueError(f"{name} has an entry twice")
        if "seed" in self.curves:
            raise ValueError("seed is no field to draw a curve over: list repeats under `seeds`")
        return self

    def chosen(self, method: str) -> bool:
        """Whether a method is to be compared."""
        return any(fnmatchcase(method, pattern) for pattern in self.methods)


@dataclass(frozen=True)
class Comparison:
    """A checked comparison and the run that all methods share."""

    name: str
    config: CompareConfig
    base: RunConfig

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.config.seeds or (self.base.seed,)

    def run(self, fields: Mapping[str, Any], seed: int) -> RunConfig:
        """The run with a method's fields and a seed. Raises ConfigError where they do not fit."""
        return with_fields(self.base, {**fields, "seed": seed}, f"comparison {self.name}")

    def pair(self, fields: Mapping[str, Any], seed: int, pair: tuple[str, str]) -> RunConfig:
        """The run on two tasks alone, each a stage of its own, in this order."""
        apart = {"groups.tau": 1.0, "groups.order": "given"}
        run = self.run({**fields, **apart}, seed)
        return run.model_copy(update={"tasks": tuple(run.task(name) for name in pair)})


def load_comparison(path: Path, overrides: Sequence[str] = (), changes: Mapping[str, Any] | None = None) -> Comparison:
    """Read a comparison's file, or a run's. `overrides` change the run, `changes` the comparison's own fields.

    Raises ConfigError with every problem of the file, of the run, and of fields that do not fit it.
    """
    raw, folder = read_yaml(path), path.absolute().parent
    alone = "run" not in raw  # a run's own file: what its stages made is there to be used
    if alone:
        raw = {"run": raw, "name": raw.get("name", path.stem)}
    require_words(raw, folder, str(path))
    config = validated(CompareConfig, {**raw, **(changes or {})}, str(path))
    name = config.name or path.stem
    base = base_run(config.run, config.fixed, folder, f"{path}: run", overrides)
    target = config.output or (base.output_dir if alone else Path("runs") / name)
    comparison = Comparison(name, config, base.model_copy(update={"output": target.absolute()}))
    if problems := [*_check_fields(comparison), *_check_names(comparison)]:
        raise ConfigError(str(path), problems)
    return comparison


_LENGTH = ("steps", "epochs", "steps_per")


def of_training(run: RunConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of plain SFT's training as those of a run, whose staged backbone it is."""
    return {"backbone.training": run.backbone_training.model_dump(mode="json", exclude_none=True) | dict(fields)}


def _check_fields(comparison: Comparison) -> list[Problem]:
    """Each value alone, so that a message names the one that does not fit."""
    points = [("recommended", comparison.config.recommended)]
    points += [(f"variants.{name}", fields) for name, fields in comparison.config.variants.items()]
    points += [
        (f"curves.{name}", {name: value}) for name, values in comparison.config.curves.items() for value in values
    ]
    problems: list[Problem] = []
    points += [(f"sft.{name}", of_training(comparison.base, fields)) for name, fields in comparison.config.sft.items()]
    for name, fields in comparison.config.sft.items():
        for field in sorted(set(fields) & set(_LENGTH)):
            problems.append(Problem(f"sft.{name}.{field}", "is the budget's to say", "leave it out: `budgets` has it"))
    for where, fields in points:
        try:
            comparison.run(fields, comparison.seeds[0])
        except ConfigError as error:
            problems += [Problem(where, str(problem)) for problem in error.problems]
    return problems


def _check_names(comparison: Comparison) -> list[Problem]:
    tasks = [task.name for task in comparison.base.tasks]
    known, problems = f"the run has {', '.join(tasks)}", []
    arrival = comparison.config.arrival
    arriving = arrival.pairs if arrival is not None else ()
    for where, pair in [("forgetting", p) for p in comparison.config.forgetting] + [
        ("arrival.pairs", p) for p in arriving
    ]:
        problems += [Problem(where, f"there is no task {name!r}", known) for name in pair if name not in tasks]
        if pair[0] == pair[1]:
            problems.append(Problem(where, f"{pair[0]} twice", "name two tasks"))
    grouped = [name for group in comparison.config.heuristic for name in group]
    if comparison.config.heuristic and sorted(grouped) != sorted(tasks):
        problems.append(Problem("heuristic", f"holds {', '.join(grouped)}", f"name every task once; {known}"))
    problems += [
        Problem(f"contrasts.{number}.by", "arrival, and there is no arrival.at to compare at", "give it")
        for number, contrast in enumerate(comparison.config.contrasts)
        if contrast.by == "arrival" and (arrival is None or arrival.at is None)
    ]
    by_loss = any(metric_of(task.metric_name).by_loss for task in comparison.base.tasks)
    problems += [
        Problem(f"contrasts.{number}.by", "loss, and no task is measured by its loss", "take retention")
        for number, contrast in enumerate(comparison.config.contrasts)
        if contrast.by == "loss" and not by_loss
    ]
    problems += [
        Problem(f"contrasts.{number}.rival", f"is {contrast.rival!r}, the method itself", "name another")
        for number, contrast in enumerate(comparison.config.contrasts)
        if contrast.rival == contrast.method
    ]
    if len(tasks) < 2:
        problems.append(Problem("run.tasks", "one task", "a comparison needs two or more"))
    if any(task.checkpoint for task in comparison.base.tasks):
        problems.append(Problem("run.tasks", "has a `checkpoint`", "give data: baselines are trained on it"))
    return problems
