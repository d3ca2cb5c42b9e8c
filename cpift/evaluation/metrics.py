"""What `tasks.*.metric` may be: how each is computed, and what it needs of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cpift.errors import entry
from cpift.evaluation.text import last_number, rouge_l, same_final_number
from cpift.rows.examples import Example

Found = tuple[str, str]  # what is wrong with a row, and the remedy


def _nothing(example: Example) -> Found | None:
    return None


@dataclass(frozen=True)
class Metric:
    """One way to score a task. Exactly one of `by_loss`, `by_options`, `text` and `by_judge` says how."""

    title: str  # in a report
    by_loss: bool = False  # the loss itself, less is better; all others score from 0 to 1
    by_options: bool = False  # which of the row's choices is likeliest
    text: Callable[[Example, str], float] | None = None  # the score of a generated reply
    by_judge: bool = False  # a generated reply is rated by another model
    counted: bool = False  # a row is right or wrong
    problem: Callable[[Example], Found | None] = _nothing  # of a row that it cannot score
    doubt: Callable[[Example], Found | None] = _nothing  # of a row whose score would say nothing

    @property
    def generates(self) -> bool:
        return self.text is not None or self.by_judge

    @property
    def passes(self) -> int:
        """How often all rows are gone over: for the loss, for replies, for the judge."""
        return 1 + self.generates + self.by_judge


def right_answer(example: Example) -> str:
    """The option that is right, or the text that ends in the right number: the answer, else the reply itself."""
    return example.messages[-1].content if example.answer is None else example.answer


def _choices(example: Example) -> Found | None:
    if right_answer(example) not in example.choices:
        found = f"answer {right_answer(example)!r} is none of the choices {list(example.choices)!r}"
        return found, "give one of their texts, its letter, or its position from 0 as a number"
    return None


def _no_choice(example: Example) -> Found | None:
    if len(set(example.choices)) < max(2, len(example.choices)):
        return f"choices {list(example.choices)!r}", "give two or more, all different"
    return _no_prompt(example)


def _number(example: Example) -> Found | None:
    if last_number(right_answer(example)) is None:
        return f"no number in answer {right_answer(example)!r}", "metric number needs one"
    return _no_prompt(example)


def _no_prompt(example: Example) -> Found | None:
    return ("a plain text has no prompt to answer", "set metric: loss") if example.plain else None


METRICS: dict[str, Metric] = {
    "loss": Metric("loss only", by_loss=True),
    "choice": Metric(
        "accuracy by option likelihood, %", by_options=True, counted=True, problem=_choices, doubt=_no_choice
    ),
    "number": Metric(
        "exact match of the final number, %",
        text=lambda example, text: float(same_final_number(text, right_answer(example))),
        counted=True,
        problem=_number,
    ),
    "rouge": Metric(
        "ROUGE-L F1, %", text=lambda example, text: rouge_l(text, example.messages[-1].content), problem=_no_prompt
    ),
    "judge": Metric("judge's rating, % of 10", by_judge=True, problem=_no_prompt),
}


def metric_of(name: str) -> Metric:
    """Raises CpiftError for a name that is none of METRICS."""
    return entry(METRICS, name, "metric")
