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
    by: Literal["retention", "worst", "loss"] = Field(
        "retention",
        description="mean retention | the worst task's | loss: mean over tasks that are measured by their loss of "
        "ln(the rival's ÷ its own)",
    )


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
    for pair in comparison.config.forgetting:
        problems += [Problem("forgetting", f"there is no task {name!r}", known) for name in pair if name not in tasks]
        if pair[0] == pair[1]:
            problems.append(Problem("forgetting", f"{pair[0]} twice", "name two tasks"))
    grouped = [name for group in comparison.config.heuristic for name in group]
    if comparison.config.heuristic and sorted(grouped) != sorted(tasks):
        problems.append(Problem("heuristic", f"holds {', '.join(grouped)}", f"name every task once; {known}"))
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
