"""Rows to score on that a command is given, `--test NAME=FILE`: what they are, and how they are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.config.loading import validated
from cpift.config.tasks import TaskConfig
from cpift.errors import ConfigError, CpiftError, DataError, Problem
from cpift.evaluation.metrics import METRICS
from cpift.init.files import rows_at
from cpift.init.rows import Guess, Lengths, Look, guess_metric, lengths_of, look_at
from cpift.init.run import AT_ONCE, MOST_SCORED, longest, reply_limit, rounded, with_choices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class GivenTest:
    """Rows to score on, and how. longest: tokens of the longest row, with what is generated."""

    name: str
    look: Look
    guess: Guess
    lengths: Lengths
    longest: int

    @property
    def fields(self) -> dict[str, Any]:
        """`test` and how it is scored, as a task has them in a run's file."""
        return _task(self.name, self.look, self.guess, self.lengths).model_dump(
            mode="json", include={"test", "metric", "max_new_tokens"}, exclude_defaults=True
        )

    @property
    def summary(self) -> str:
        """What was recognised, for people."""
        file = self.look.source.file
        where = file.name if file is not None else self.look.source.hub
        return f"{self.name}: {where} is {self.look.title}, {self.look.rows:,} rows"


def given_tests(arguments: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[GivenTest]:
    """A test for each `NAME=FILE` or `FILE`. Raises ConfigError with all that is wrong with any of them."""
    problems: list[Problem] = []
    tests: list[GivenTest] = []
    for argument in arguments:
        try:
            tests.append(_test(*_named(argument), tokenizer))
        except DataError as error:
            problems += [Problem(f"--test {argument}, {each.where}", each.what, each.remedy) for each in error.problems]
        except ConfigError as error:
            problems += [Problem(f"--test {argument}", each.what, each.remedy) for each in error.problems]
        except CpiftError as error:
            problems.append(Problem(f"--test {argument}", str(error)))
    names = [test.name.lower() for test in tests]
    problems += [
        Problem(f"--test {name}", "is the name of two tests", "name them apart: --test NAME=FILE")
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if problems:
        raise ConfigError("test rows", problems)
    return tests


def scoring_fields(tests: Sequence[GivenTest]) -> dict[str, int]:
    """Fields of `evaluation` that hold all rows."""
    most = max(test.longest for test in tests)
    length = min(max(rounded(most, 32), 32), MOST_SCORED)
    return {"batch_size": min(16, max(1, 2 * AT_ONCE // length)), "max_length": length}


def _named(argument: str) -> tuple[str | None, str]:
    name, equals, source = argument.partition("=")
    return (name, source) if equals and not Path(argument).expanduser().exists() else (None, argument)


def _test(name: str | None, argument: str, tokenizer: PreTrainedTokenizerBase) -> GivenTest:
    called, source = rows_at(argument)
    look = look_at(source)
    guess, lengths = guess_metric(look), lengths_of(look, tokenizer)
    task = _task(name or called, look, guess, lengths)
    return GivenTest(task.name, look, guess, lengths, longest(task, tokenizer))


def _task(name: str, look: Look, guess: Guess, lengths: Lengths) -> TaskConfig:
    limit = {"max_new_tokens": reply_limit(lengths)} if METRICS[guess.metric].generates else {}
    fields = {"name": name, "test": with_choices(look, guess), "metric": guess.metric, **limit}
    return validated(TaskConfig, fields, f"test {name}")
