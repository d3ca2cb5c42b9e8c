"""What `tasks.*.metric` may be: how each is computed, and what it needs of a row. A user's own is a `Metric` too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from cpift.errors import DataError, Problem
from cpift.evaluation.text import last_number, rouge_l, same_final_number
from cpift.extensions import loaded, short_name
from cpift.rows.examples import Example
from cpift.rows.problems import RowProblems

RowFault = tuple[str, str]  # what is wrong with a row, and the remedy


@dataclass(frozen=True)
class Reply:
    """What a model wrote to a test row: `text`, without special tokens, by greedy decoding."""

    example: Example
    text: str

    @property
    def prompt(self) -> str:
        """The last message before the reply, mostly the user's; `example.prompt` has them all."""
        return self.example.prompt[-1].content if self.example.prompt else ""

    @property
    def reference(self) -> str:
        """The row's answer: its column `answer` where there is one, else the reply that it has."""
        return right_answer(self.example)


_ONE_EACH = "give one for each reply, in their order"
ScoreReplies = Callable[[Sequence[Reply]], Sequence[float]]


@dataclass(frozen=True)
class Metric:
    """One way to score a task. Exactly one of `by_loss`, `by_options`, `scores` and `by_judge` says how.

    A metric of your own has `title`, `scores` and what of the following it needs:

        title: in reports.
        scores: of replies to the test rows, a score each, within `range`; larger is better. The same replies get the
            same scores, however many there are at once and in whatever order.
        range: the lowest and the highest score; records and reports hold their place within it, from 0 to 1.
        counted: a row is right or wrong, that is the highest or the lowest score.
        chance: what guessing scores, within `range`; a task that was learnt no better is left out of means.
        problem: of a row that it cannot score, what is wrong and the remedy, asked before anything is trained.
    """

    title: str
    scores: ScoreReplies | None = None
    range: tuple[float, float] = (0.0, 1.0)
    counted: bool = False
    chance: float | None = None
    problem: Callable[[Example], RowFault | None] | None = None
    doubt: Callable[[Example], RowFault | None] | None = None  # of a row whose score would say nothing
    by_loss: bool = False  # the loss itself, less is better; all others score from 0 to 1
    by_options: bool = False  # which of the row's choices is likeliest
    by_judge: bool = False  # a generated reply is rated by another model
    needs: str = ""  # what it needs of a row beside the prompt; of ours, for docs/reference.md

    def __post_init__(self) -> None:
        """Raises ValueError for what could not be computed, or would mislead."""
        if (self.scores is not None) + self.by_loss + self.by_options + self.by_judge != 1:
            raise ValueError(f"metric {self.title!r}: give `scores`, a function of replies")
        if not isinstance(self.title, str) or not (self.scores is None or callable(self.scores)):
            raise ValueError(f"metric {self.title!r}: give a text as `title`, and a function as `scores`")
        low, high = self.range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"metric {self.title!r}: range {self.range!r} → give two numbers, the lower first")
        if self.chance is not None and not low <= self.chance < high:
            raise ValueError(f"metric {self.title!r}: chance {self.chance!r} is not within range {self.range!r}")

    @property
    def generates(self) -> bool:
        return self.scores is not None or self.by_judge

    @property
    def passes(self) -> int:
        """How often all rows are gone over: for the loss, for replies, for the judge."""
        return 1 + self.generates + self.by_judge

    @property
    def guessed(self) -> float | None:
        """What guessing scores, from 0 to 1."""
        return None if self.chance is None else self._share(self.chance)

    def wrong_with(self, example: Example) -> RowFault | None:
        """Why a row cannot be scored, and the remedy."""
        try:
            fault = None if self.problem is None else self.problem(example)
            if fault is not None and [type(text) for text in fault] != [str, str]:
                raise TypeError(f"gives {_shown(fault)}, neither None nor two texts")
        except (Exception, SystemExit) as error:
            fault = f"metric {self.title!r} fails on it ({type(error).__name__}: {error})", "mend its `problem`"
        return fault or (_no_prompt(example) if self.generates else None)

    def doubtful(self, example: Example) -> RowFault | None:
        """Why a row's score would say nothing, and the remedy; asked before a run, not of what is scored."""
        return None if self.doubt is None else self.doubt(example)

    def scored(self, replies: Sequence[Reply], subject: str) -> list[float]:
        """The score of each reply from 0 to 1.

        Raises DataError naming the row where `scores` fails, or gives what is no score of its range.
        """
        assert self.scores is not None
        try:
            results: Any = self.scores(replies)
            results = list(results) if isinstance(results, Iterator) else results  # else it would fail later
        except (Exception, SystemExit) as error:
            raise self._refused(subject, *self._failed(replies, error)) from error
        try:
            values = list(results)
        except TypeError:
            what = f"gives {_shown(results)}, which is no list"
            raise self._refused(subject, "scores", what, _ONE_EACH) from None
        if len(values) != len(replies):
            what = f"{len(values)} scores for {len(replies)} replies"
            raise self._refused(subject, "scores", what, _ONE_EACH)
        low, high = self.range
        bad = RowProblems(f"{subject}, ")
        for number, value in enumerate(values, start=1):
            if not _is_number(value) or not low <= float(value) <= high:
                what = f"metric {self.title!r} gives {_shown(value)}, its range is {low:g} to {high:g}"
                bad.add(number, what, "give a number within it")
        if bad:
            raise DataError(subject, bad.problems(len(values)))
        return [self._share(float(value)) for value in values]

    def _share(self, value: float) -> float:
        low, high = self.range
        return (value - low) / (high - low)

    def _failed(self, replies: Sequence[Reply], error: BaseException) -> tuple[str, str, str]:
        """Which row it is, where it fails on one alone too."""
        said, remedy = f"{type(error).__name__}: {error}", "mend the metric, or leave such rows out"
        for number, reply in enumerate(replies, start=1):
            try:
                cast(ScoreReplies, self.scores)([reply])
            except (Exception, SystemExit) as alone:
                return f"row {number}", f"reply {_shown(reply.text)}: {type(alone).__name__}: {alone}", remedy
        return "all rows together", said, remedy

    def _refused(self, subject: str, where: str, what: str, remedy: str) -> DataError:
        return DataError(subject, [Problem(f"{subject}, {where}", f"metric {self.title!r}: {what}", remedy)])


def _is_number(value: Any) -> bool:
    """Also numpy's and torch's, of one element; not NaN."""
    try:
        return not isinstance(value, (str, bytes)) and not math.isnan(float(value))
    except (TypeError, ValueError):
        return False


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def each(score: Callable[[Reply], float]) -> ScoreReplies:
    """`scores` of a function that scores one reply."""
    return lambda replies: [float(score(reply)) for reply in replies]


def right_answer(example: Example) -> str:
    """The option that is right, or the text that ends in the right number: the answer, else the reply itself."""
    return example.messages[-1].content if example.answer is None else example.answer


def _choices(example: Example) -> RowFault | None:
    if right_answer(example) not in example.choices:
        what = f"answer {right_answer(example)!r} is none of the choices {list(example.choices)!r}"
        return what, "give one of their texts, its letter, or its position from 0 as a number"
    return None


def _no_choice(example: Example) -> RowFault | None:
    if len(set(example.choices)) < max(2, len(example.choices)):
        return f"choices {list(example.choices)!r}", "give two or more, all different"
    return _no_prompt(example)


def _number(example: Example) -> RowFault | None:
    if last_number(right_answer(example)) is None:
        return f"no number in answer {right_answer(example)!r}", "metric number needs one"
    return None


def _no_prompt(example: Example) -> RowFault | None:
    return ("a plain text has no prompt to answer", "set metric: loss") if example.plain else None


METRICS: dict[str, Metric] = {
    "loss": Metric("loss only", by_loss=True),
    "choice": Metric(
        "accuracy by option likelihood, %",
        by_options=True,
        counted=True,
        problem=_choices,
        doubt=_no_choice,
        needs="`choices`, two or more, and an `answer` that is one of them",
    ),
    "number": Metric(
        "exact match of the final number, %",
        each(lambda reply: same_final_number(reply.text, reply.reference)),
        counted=True,
        problem=_number,
        needs="an `answer`, or else a reply, that ends in a number",
    ),
    "rouge": Metric("ROUGE-L F1, %", each(lambda reply: rouge_l(reply.text, reply.example.messages[-1].content))),
    "judge": Metric("judge's rating, % of 10", by_judge=True, needs="`evaluation.judge` in the run's file"),
}


def load_metric(word: str) -> Metric:
    """The metric that a task's config names: one of METRICS, or the user's, which is imported.

    Raises ConfigError for what is not there, or is no Metric.
    """
    return METRICS[word] if word in METRICS else loaded("metrics", word, Metric)


def metric_of(name: str) -> Metric:
    """What is known of a metric by its name in a config or a record; of a user's, its name alone."""
    return METRICS.get(name) or Metric(f"{short_name(name)}, %", _elsewhere)


def _elsewhere(replies: Sequence[Reply]) -> Sequence[float]:
    raise NotImplementedError("a record says how it was scored; `load_metric` loads what scores")


def description(word: str) -> dict[str, Any]:
    """What records keep of a user's metric, so that a page needs none of its code; nothing of ours."""
    if word in METRICS:
        return {}
    metric = load_metric(word)
    chance = {} if metric.guessed is None else {"chance": metric.guessed}
    return {"title": metric.title, "counted": metric.counted, **chance}


def described(score: Mapping[str, Any]) -> Metric:
    """The metric of a score as records have it."""
    if score["metric"] in METRICS:
        return METRICS[score["metric"]]
    return Metric(str(score.get("title", f"{score['metric']}, %")), _elsewhere, counted=bool(score.get("counted")))
