"""What can be found wrong with a task before any training: its sources, its rows, and what its metric asks of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from cpift.config.run import TaskConfig
from cpift.data.tasks import load_examples, read_examples
from cpift.errors import CpiftError, DataError, Problem
from cpift.evaluation.metrics import load_metric
from cpift.hub import HubError
from cpift.rows.examples import Example
from cpift.rows.problems import RowProblems


def check_task(
    task: TaskConfig,
    *,
    download: bool = True,
    splits: Sequence[Literal["train", "test", "validation"]] = ("train", "test", "validation"),
    see: Callable[[str, str, Example], None] = lambda task, split, example: None,
) -> list[Problem]:
    """What can be found wrong with a task before any training: sources, rows, and the columns that its metric needs.

    With `download=False` hub data sets are not looked at, so nothing is fetched. `see` gets every row that is read.
    """
    problems: list[Problem] = []
    for split in splits:
        source = task.validation if split == "validation" else task.source(split)
        if source is None or (source.hub is not None and not download):
            continue
        try:
            if split == "test":
                examples = load_examples(source)
                problems += _metric_problems(task, examples)
            for example in examples if split == "test" else read_examples(source):
                see(task.name, split, example)
        except (DataError, HubError) as error:
            if split != "test" or task.holdout is None:  # else both are the same rows
                problems += _located(f"tasks.{task.name}.{split}", error)
    return problems


def _located(where: str, error: CpiftError) -> list[Problem]:
    if isinstance(error, DataError):
        return [Problem(f"{where}, {problem.where}", problem.what, problem.remedy) for problem in error.problems]
    return [Problem(where, str(error))]


def _metric_problems(task: TaskConfig, examples: Sequence[Example]) -> list[Problem]:
    metric, bad = load_metric(task.metric), RowProblems(f"tasks.{task.name}.test, ")
    for number, example in enumerate(examples, start=1):
        if (fault := metric.doubtful(example) or metric.wrong_with(example)) is not None:
            bad.add(number, *fault)
    return bad.problems(len(examples))
