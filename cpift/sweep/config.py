"""One sweep, described: the run it varies, the fields it varies, how points are chosen and what is better.

A sweep file in short (sweeps/*.yaml are commented examples):

    run: ../configs/smoke.yaml
    space: {regions.p: [0.02, 0.05, 0.1], groups.tau_chance: [1.2, 1.5]}
    seeds: [0, 1, 2]
    objectives: [mean_retention]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from cpift.config.code import require_words
from cpift.config.identity import identity
from cpift.config.inputs import Seed
from cpift.config.loading import Value, base_run, describe, read_yaml, shown, validated, with_fields
from cpift.config.run import Name, RunConfig, Section
from cpift.errors import ConfigError, Problem, entry
from cpift.merging.registry import METHODS
from cpift.sweep.objectives import DESCRIPTION, figure_problem, less_is_better
from cpift.sweep.searching import SAMPLERS, BenchmarksConfig, ReportRows, Search, Sides, on, sides_of, unknown_tests

if TYPE_CHECKING:
    from cpift.evaluation.standard import Benchmarks


class Range(Section):
    """A field's values from `low` to `high`, both included."""

    low: float = Field(**identity("sweep"), description="the smallest value")
    high: float = Field(**identity("sweep"), description="the largest")
    log: bool = Field(
        False,
        **identity("sweep"),
        description="equal ratios are equally likely, rather than equal differences",
    )
    integer: bool = Field(False, **identity("sweep"), description="whole numbers only")

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range must begin above 0, not at {self.low:g}")
        return self


MODES = {"max": 1, "min": -1}


@dataclass(frozen=True)
class Keep:
    """What `keep` may be: whose weights stay."""

    every: bool = False
    best: bool = False


KEEPS = {"best": Keep(best=True), "all": Keep(every=True, best=True), "scores": Keep()}


class Objective(Section):
    """What a trial is judged by."""

    figure: str = Field(
        **identity("sweep"),
        description=DESCRIPTION,
    )
    mode: Literal["max", "min"] | None = Field(
        None,
        **identity("sweep"),
        description="default: min for losses, max for all others; perplexity needs min",
    )

    @property
    def sign(self) -> int:
        """1 where more is better, −1 where less is."""
        return entry(MODES, self.mode or ("min" if less_is_better(self.figure) else "max"), "objectives.mode")


def _expanded(key: str, section: type[Section], bare: type[str] | type[float] = str) -> BeforeValidator:
    """A bare value stands for a section with that one field."""
    return BeforeValidator(
        lambda value: {key: value} if isinstance(value, bare) else value, json_schema_input_type=bare | section
    )


class SweepConfig(Section):
    """A whole sweep."""

    name: Name | None = Field(None, **identity(), description="default: the file's name")
    output: Path | None = Field(
        None, **identity(), description="folder for everything the sweep makes; default: runs/<name>"
    )
    run: str | dict[str, Any] = Field(
        **identity("sweep", by="the run that it gives"),
        description="the run's YAML file, relative to this one; or its fields, inline",
    )
    fixed: dict[str, Any] = Field(
        **identity("sweep", by="the run that it gives"),
        default_factory=dict,
        description="fields of the run set for the whole sweep",
    )
    space: dict[str, Annotated[tuple[Value, ...], Field(min_length=1)] | Range] = Field(
        **identity("sweep"),
        min_length=1,
        description="any fields of the run by dotted name, each with a list of values or a range",
    )
    search: Annotated[Search, _expanded("method", Search)] = Field(Search(), **identity("sweep"))
    objectives: tuple[Annotated[Objective, _expanded("figure", Objective)], ...] = Field(
        (Objective(figure="mean_retention", mode=None),),
        **identity("sweep"),
        min_length=1,
        max_length=4,
    )
    report: Annotated[ReportRows, _expanded("share", ReportRows, float)] | None = Field(
        None,
        **identity("sweep", absent=None),
        description="rows that the search never sees and that decide what is reported; a number is their `share`",
    )
    benchmarks: BenchmarksConfig | None = Field(
        None,
        **identity("sweep", absent=None),
        description="lm-eval's tasks, whose figures may be objectives: benchmark.TASK.METRIC",
    )
    model: Literal["final", "fused"] = Field(
        "final",
        **identity("sweep"),
        description="the model that is judged; with `fused` no integration is trained",
    )
    seeds: tuple[Seed, ...] = Field(
        (), **identity("sweep"), description="every point is run with each; default: the run's own seed"
    )
    confidence: float = Field(0.95, **identity(), gt=0, lt=1, description="of the intervals over seeds")
    keep: Literal["best", "all", "scores"] = Field(
        "best",
        **identity(),
        description="whose fused and final models keep their weights: best: those of the best config, with every seed; "
        "all: every trial's; scores: none. Scores, manifests and what trials share stay, and `cpift run` on any point "
        "(`cpift evaluate` where the fused model is judged) makes its models again",
    )
    concurrency: int | None = Field(None, **identity(), ge=1, description="trials at once; default: as many as fit")

    @model_validator(mode="after")
    def _consistent(self) -> SweepConfig:
        ranges = [name for name, values in self.space.items() if isinstance(values, Range)]
        if ranges and self.search.samples is None:
            raise ValueError(
                f"{', '.join(ranges)}: a grid needs lists of values; ranges need random, asha or optuna with `samples`"
            )
        if "seed" in self.space:
            raise ValueError("seed is no field to optimise: list repeats under `seeds`")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} has one twice")
        if self.search.kind.stops_early and len(self.objectives) > 1:
            raise ValueError("asha stops trials by one figure: give one objective, or use another method")
        if self.search.sampler is not None and entry(SAMPLERS, self.search.sampler, "search.sampler").numbers:
            listed = [name for name in self.space if name not in ranges]
            if listed or len(ranges) < 2 or len(self.objectives) > 1:
                raise ValueError(
                    "sampler cmaes needs two or more ranges, no list and one objective; use sampler tpe for "
                    f"{', '.join(listed) or 'others'}"
                )
        return self


@dataclass(frozen=True)
class Sweep:
    """A checked sweep and the run that its points vary."""

    name: str
    config: SweepConfig
    base: RunConfig

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.config.seeds or (self.base.seed,)

    @property
    def benchmarks(self) -> Benchmarks | None:
        """What lm-eval is to run of every trial's judged model."""
        return None if self.config.benchmarks is None else self.config.benchmarks.wanted(self.base)

    def plain(self, fields: Mapping[str, Any], seed: int) -> RunConfig:
        """The run of one point with one seed, on all its test rows. Raises ConfigError where values do not fit."""
        known = counting(fields, self.base.fusion.method)
        return with_fields(self.base, {**known, "seed": seed}, f"sweep {self.name} at {describe(fields)}")

    def run(self, fields: Mapping[str, Any], seed: int) -> RunConfig:
        """The same as the search judges it: without the rows to report on."""
        return on(self._rows.searched, self.plain(fields, seed))

    def reported(self, fields: Mapping[str, Any], seed: int) -> RunConfig:
        """The same on the rows to report on alone."""
        return on(self._rows.reported, self.plain(fields, seed))

    @cached_property
    def _rows(self) -> Sides:
        return sides_of(self.config.report, self.base.tasks)


def load_sweep(path: Path, overrides: Sequence[str] = (), output: Path | None = None) -> Sweep:
    """Read a sweep file and the run it names. `overrides` (`field.name=value`) change the run for the whole sweep.

    Raises ConfigError listing every problem of the sweep file, of the run, and of values in `space` that do not fit it.
    """
    raw, folder = read_yaml(path), path.absolute().parent
    require_words(raw, folder, str(path))
    config = validated(SweepConfig, raw, str(path))
    if config.report is not None:
        config = config.model_copy(update={"report": config.report.below(folder)})
    if config.benchmarks is not None:
        config = config.model_copy(update={"benchmarks": config.benchmarks.below(folder)})
    name = config.name or path.stem
    base = base_run(config.run, config.fixed, folder, f"{path}: run", overrides)
    target = output or config.output or Path("runs") / name
    sweep = Sweep(name, config, base.model_copy(update={"output": target.absolute()}))
    metrics = {task.name: task.metric for task in base.tasks}
    benchmarks = config.benchmarks.tasks if config.benchmarks else ()
    problems = (
        _check_device(base)
        + (config.benchmarks.problems(base) if config.benchmarks else [])
        + _check_space(sweep)
        + unknown_tests(config.report, base.tasks)
        + [
            problem
            for objective in config.objectives
            if (problem := figure_problem(objective.figure, metrics, "objectives", benchmarks))
        ]
    )
    if problems:
        raise ConfigError(str(path), problems)
    return sweep


def _check_device(base: RunConfig) -> list[Problem]:
    """Why trials could not fuse on a GPU: each is a worker of Ray, which sees none but its own, unless it asks Ray for
    processes that have one."""
    resources = base.resources
    if resources.device in ("auto", "cpu") or resources.by_train or resources.on_cluster or resources.gpus_per_worker:
        return []
    what = f"is `{resources.device}`, and a trial has no GPU"
    return [Problem("resources.device", what, "set resources.gpus_per_worker: 1, or a share of one")]


def _check_space(sweep: Sweep) -> list[Problem]:
    """Each value alone, so that a message names the one that does not fit."""
    problems = []
    for name, values in sweep.config.space.items():
        for value in (values.low, values.high) if isinstance(values, Range) else values:
            integral = isinstance(values, Range) and values.integer
            try:
                with_fields(sweep.base, {name: int(value) if integral else value}, name)
            except ConfigError as error:
                problems += [Problem(f"space.{name}", f"{shown(value)}: {problem}") for problem in error.problems]
    return problems


def counting(fields: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The fields of a point less those of `fusion` that its merge method (`method`, unless the point names one) does
    not look at: points that differ in them alone are one trial."""
    method = str(fields.get("fusion.method", method))
    if method not in METHODS:  # a user's own says nothing before it is loaded
        return dict(fields)
    others = {f"fusion.{name}" for other in METHODS.values() for name in other.fields}
    others -= {f"fusion.{name}" for name in METHODS[method].fields}
    return {name: value for name, value in fields.items() if ".".join(name.split(".")[:2]) not in others}
