"""What a sweep may judge by: the figures of one model of one run, each a row of a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from cpift.errors import Problem
from cpift.evaluation.metrics import metric_of
from cpift.evaluation.scores import Score
from cpift.report.data import retention, standing

Value = float | None  # None: it has no meaning for this model


@dataclass(frozen=True)
class ScoredRun:
    """One run's scores, by model and task; the probes' are among them."""

    tasks: list[str]
    scores: dict[str, dict[str, Score]]


@dataclass(frozen=True)
class OfRun:
    """A figure over all tasks. less: is better. learnt: it has a value only where probes learnt their tasks."""

    value: Callable[[ScoredRun, str], Value]
    less: bool = False
    learnt: bool = False


@dataclass(frozen=True)
class OfTask:
    """A figure of one task, `task.NAME.` and its name. scored: not of a task whose metric is its loss."""

    value: Callable[[ScoredRun, str, str], Value]
    less: bool = False
    learnt: bool = False
    scored: bool = False


def _mean_loss(run: ScoredRun, model: str) -> Value:
    return mean(run.scores[model][task]["loss"] for task in run.tasks)


def _mean_retention(run: ScoredRun, model: str) -> Value:
    return None if (retained := standing(run, model)) is None else retained.mean


def _worst_retention(run: ScoredRun, model: str) -> Value:
    return None if (retained := standing(run, model)) is None else retained.worst


OF_RUN: Mapping[str, OfRun] = {
    "mean_loss": OfRun(_mean_loss, less=True),
    "mean_retention": OfRun(_mean_retention, learnt=True),
    "worst_retention": OfRun(_worst_retention, learnt=True),
}
OF_TASK: Mapping[str, OfTask] = {
    "loss": OfTask(lambda run, model, task: run.scores[model][task]["loss"], less=True),
    "score": OfTask(lambda run, model, task: run.scores[model][task]["score"], scored=True),
    "retention": OfTask(retention, learnt=True),
}
_BENCHMARK = OfRun(lambda run, model: None)  # lm-eval has the value, see `pipeline.outcomes.benchmark_figures`
DESCRIPTION = (
    f"{' | '.join(OF_RUN)}, or of one task {' | '.join(f'task.NAME.{kind}' for kind in OF_TASK)}, or of one of "
    "`benchmarks` benchmark.TASK.METRIC, as lm-eval calls it: benchmark.gsm8k.exact_match,strict-match"
)


def figures(scores: Mapping[str, Mapping[str, Score]], tasks: Sequence[str], model: str) -> dict[str, float]:
    """Every figure of one model of one run that has a meaning and is finite: of a loss that is not, none is better or
    worse. `scores` must hold the probes' too."""
    run = ScoredRun(list(tasks), {title: dict(by_task) for title, by_task in scores.items()})
    every: dict[str, Value] = {name: figure.value(run, model) for name, figure in OF_RUN.items()}
    for task in tasks:
        every |= {f"task.{task}.{kind}": figure.value(run, model, task) for kind, figure in OF_TASK.items()}
    return {name: value for name, value in every.items() if value is not None and math.isfinite(value)}


def figure_named(name: str) -> OfRun | OfTask | None:
    """The row of a figure; None for a name of none."""
    if name in OF_RUN:
        return OF_RUN[name]
    if name.startswith("benchmark."):
        return _BENCHMARK
    return OF_TASK.get(name.rpartition(".")[2]) if name.startswith("task.") and name.count(".") > 1 else None


def less_is_better(name: str) -> bool:
    """Of what is no figure, whatever an older record holds, False."""
    figure = figure_named(name)
    return figure is not None and figure.less


def figure_problem(name: str, metrics: Mapping[str, str], where: str, benchmarks: Sequence[str] = ()) -> Problem | None:
    """Why a run with these tasks has no such figure. metrics: by task; benchmarks: lm-eval's tasks."""
    figure = figure_named(name)
    if figure is None:
        return Problem(where, f"{name!r} is no figure", DESCRIPTION)
    if figure is _BENCHMARK and not any(name.startswith(f"benchmark.{task}.") for task in benchmarks):
        what = f"{name!r}: is of none of the benchmarks"
        return Problem(where, what, f"name its task under `benchmarks`; there are {', '.join(benchmarks) or 'none'}")
    if isinstance(figure, OfRun):
        return None
    task = name.removeprefix("task.").rpartition(".")[0]
    if task not in metrics:
        return Problem(where, f"{name!r}: there is no task {task!r}", f"the run has {', '.join(metrics)}")
    if figure.scored and metric_of(metrics[task]).by_loss:
        return Problem(where, f"{name!r}: the metric of {task} is its loss", f"write task.{task}.loss")
    return None
