"""Test rows as tokens: what of a row is scored, and which rows cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from cpift.config.run import TaskConfig
from cpift.config.tasks import EvaluationConfig
from cpift.data.tasks import load_examples
from cpift.data.tokenise import IGNORED, UNCUT, Labelled, tokenise
from cpift.errors import DataError, Problem
from cpift.evaluation.metrics import Metric, load_metric
from cpift.rows.examples import Example, Message
from cpift.rows.problems import RowProblems
from cpift.rows.shapes import size_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ScoredRow:
    """One test row, tokenised. `options` are scored on their last turn; `prompt` ends where the last reply begins."""

    example: Example
    reply: Labelled
    options: tuple[Labelled, ...]
    prompt: list[int]
    end_of_turn: int

    @property
    def length(self) -> int:
        return max(len(sequence.ids) for sequence in (self.reply, *self.options))


def check_rows(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[TaskConfig],
    settings: EvaluationConfig,
    first: int | None = None,
) -> int:
    """Find rows that could not be scored, with θ0's tokenizer alone: of all, or of the `first` texts and the longest.

    Returns the most tokens that the model sees of a row, those included that it may generate.

    Raises:
        DataError: as `evaluate_model` would, for all tasks at once.
    """
    problems: list[Problem] = []
    longest = 0
    for task in tasks:
        generates = load_metric(task.metric).generates
        try:
            for row in scored_rows(tokenizer, settings, task, first):
                generated = len(row.prompt) + task.max_new_tokens if generates else 0
                longest = max(longest, row.length, generated)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError("test rows", problems)
    return longest


def scored_rows(
    tokenizer: PreTrainedTokenizerBase, settings: EvaluationConfig, task: TaskConfig, first: int | None = None
) -> list[ScoredRow]:
    """The task's test rows, tokenised; every unusable one is reported at once. first: of so many texts, a reply or
    an option each, and the longest row."""
    examples = load_examples(task.test_data)[: settings.limit]
    metric = load_metric(task.metric)
    places = _first(examples, first, metric.by_options)
    rows = [_tokenised(tokenizer, examples[place], metric.by_options) for place in places]
    if not rows:
        problem = Problem(f"tasks.{task.name}.test", "no test rows", "give at least one")
        raise DataError(f"evaluation of {task.name}", [problem])
    bad = RowProblems(f"tasks.{task.name}.test ")
    for place, row in zip(places, rows, strict=True):
        for unfit in _row_problems(row, metric, settings.max_length):
            bad.add(place + 1, *unfit)
    if bad:
        raise DataError(f"evaluation of {task.name}", bad.problems(len(rows)))
    return [replace(row, reply=_cut(row.reply, settings.max_length)) for row in rows]


def _first(examples: Sequence[Example], texts: int | None, by_options: bool) -> list[int]:
    """Places of the rows with so many texts, and of the longest of the others; None: of all rows."""
    sizes = accumulate(1 + len(example.choices) * by_options for example in examples)
    rows = sum(texts is None or size <= texts for size in sizes)
    others = range(rows, len(examples))
    return [*range(rows), *([max(others, key=lambda place: size_of(examples[place]))] if others else [])]


def _tokenised(tokenizer: PreTrainedTokenizerBase, example: Example, by_options: bool) -> ScoredRow:
    def encode(last: Message) -> Labelled:
        encoded = tokenise(
            replace(example, messages=(*example.messages[:-1], last)), tokenizer, UNCUT
        )  # what does not fit is this module's decision
        return Labelled(encoded["input_ids"], encoded["labels"])

    reply = encode(replace(example.messages[-1], trained=True))  # a flag for training does not take the reply away
    choices = example.choices if by_options else ()
    options = tuple(_last_turn_only(encode(Message("assistant", choice))) for choice in choices)
    start, end = _last_turn(reply.labels)
    return ScoredRow(example, reply, options, reply.ids[:start], reply.ids[end])


def _last_turn(labels: Sequence[int]) -> tuple[int, int]:
    """Where the last run of labels begins and ends: the first token of the last reply, and its end-of-turn token."""
    end = max(i for i, label in enumerate(labels) if label != IGNORED)
    start = end
    while start > 0 and labels[start - 1] != IGNORED:
        start -= 1
    return start, end


def _last_turn_only(sequence: Labelled) -> Labelled:
    start, _ = _last_turn(sequence.labels)
    return Labelled(sequence.ids, [IGNORED] * start + sequence.labels[start:])


def _cut(sequence: Labelled, length: int) -> Labelled:
    return Labelled(sequence.ids[:length], sequence.labels[:length])


def _row_problems(row: ScoredRow, metric: Metric, max_length: int) -> Iterator[tuple[str, str]]:
    example, raise_it = row.example, "raise evaluation.max_length or leave the row out"
    if _cut(row.reply, max_length).scored() == 0:
        yield f"no answer token within evaluation.max_length = {max_length}", raise_it
    elif row.options and row.length > max_length:
        yield f"an option ends after {row.length} tokens, evaluation.max_length is {max_length}", raise_it
    if (fault := metric.wrong_with(example)) is not None:
        yield fault
