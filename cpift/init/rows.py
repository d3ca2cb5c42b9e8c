"""`cpift init` looks at rows: what they are, how many, how a task of them would be scored, and why."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from cpift.config.columns import Template
from cpift.config.inputs import DataSource
from cpift.data.sources import rows_of
from cpift.data.tasks import read_examples
from cpift.errors import DataError, Problem
from cpift.evaluation.metrics import METRICS, right_answer
from cpift.evaluation.text import words
from cpift.rows.examples import Example, RowError, parse_row
from cpift.rows.formats import format_of
from cpift.rows.kinds import CONTEXTS, PROMPTS, REPLIES, columns_for, kind_of
from cpift.text.escaping import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIRST = 50  # rows by which columns are chosen
_SAMPLE = 400  # rows that are written as tokens
_FEW = 20  # different replies that are still a choice
_SHORT = 24  # words of a reply that is compared with another word by word
_OPTIONS = ("choices", "options", "endings", "candidates")
_RIGHT = ("answer", "label", "answerKey", "answer_key", "correct", "target", "gold")
_INSIDE = {"answers": ("{answers[text][0]}", "{answers[0]}"), "answer": ("{answer[value]}", "{answer[text]}")}
_LETTERED = (("A", "B", "C", "D"), ("option_a", "option_b", "option_c", "option_d"), ("a", "b", "c", "d"))


@dataclass
class Look:
    """What the rows of a source are. Lengths in tokens are those of `sample`."""

    source: DataSource  # with the columns that were chosen
    title: str  # "a JSON array, read as Alpaca"
    chosen: bool  # whether columns were chosen by their names
    rows: int = 0
    plain: int = 0
    options: int = 0  # rows that metric choice can score
    numbers: int = 0  # rows whose answer is a column of its own, and a number
    ending: int = 0  # rows whose reply ends in a number
    short: int = 0  # rows whose reply has few words
    replies: Counter[str] = field(default_factory=Counter)  # of up to _FEW + 1 different ones
    prompts: set[int] = field(default_factory=set)  # hashes of two different ones, if there are two
    sample: list[Example] = field(default_factory=list)

    def add(self, example: Example, chance: random.Random) -> None:
        """Count a row; of all rows an even sample is kept."""
        self.rows += 1
        self.plain += example.plain
        choice = METRICS["choice"]
        self.options += not (choice.doubtful(example) or choice.wrong_with(example))
        self.numbers += example.answer is not None and _is_number(example.answer)
        self.ending += right_answer(example).rstrip(" .*$}")[-1:].isdigit()
        self.short += len(words(example.reply)) <= _SHORT
        if example.reply in self.replies or len(self.replies) <= _FEW:
            self.replies[example.reply] += 1
        if len(self.prompts) < 2:
            self.prompts.add(hash(example.distinct))
        if len(self.sample) < _SAMPLE:
            self.sample.append(example)
        elif (place := chance.randrange(self.rows)) < _SAMPLE:
            self.sample[place] = example


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").strip(" $%"))
    except ValueError:
        return False
    return True


def look_at(source: DataSource, like: Look | None = None) -> Look:
    """Read all rows of a source, as the first of `_proposals` that fits its first rows; or as those of another one.

    Raises DataError where it cannot be read, has no rows, or rows that are no examples; HubError.
    """
    columns, kind = _columns(source) if like is None else (like.source.columns, "those to train on")
    source = source.model_copy(update={"columns": columns})
    look = Look(source, f"{_format(source)}, read as {kind}", chosen=bool(columns))
    chance = random.Random(0)
    for example in read_examples(source):
        look.add(example, chance)
    return look


def _format(source: DataSource) -> str:
    return "a hub data set" if source.file is None else format_of(source.file).title


def _columns(source: DataSource) -> tuple[dict[str, Template], str]:
    """`columns` for the source, and what its rows are called."""
    first = [row for row in islice(rows_of(source).rows(), _FIRST) if isinstance(row, dict)]
    names = {name for row in first for name, value in row.items() if value is not None}
    for columns in _proposals(names):
        if first and all(_fits(row, columns) for row in first):
            return columns, _called(first[0], columns)
    return {}, "rows"  # `read_examples` says what is wrong with them


def _called(row: Mapping[str, Any], columns: Mapping[str, Template]) -> str:
    if not columns:
        return kind_of(row).title
    names = "prompt, choices and answer" if "choices" in columns else "prompt and completion"
    return one_line(f"{names} ({', '.join(str(column) for column in columns.values())})")


def _proposals(names: set[str]) -> Iterator[dict[str, Template]]:
    """Columns that rows with these names may mean, the surest first: none, options with the right one, a reply."""
    options = next((f"{{{name}}}" for name in _OPTIONS if name in names), None)
    lettered = next((group for group in _LETTERED if names.issuperset(group)), None)
    if options is None and lettered:
        options = "\n".join(f"{{{name}}}" for name in lettered)
    right = next((name for name in _RIGHT if name in names), None)
    prompt = next((name for name in PROMPTS if name in names), None)
    if options and right and prompt and "messages" not in names:
        context = next((f"{{{name}:?}}\n\n" for name in CONTEXTS if name in names and name != prompt), "")
        yield {"prompt": f"{context}{{{prompt}}}", "choices": options, "answer": f"{{{right}}}"}
    yield {}
    if columns := columns_for(names):
        yield dict(columns)
    for name, replies in _INSIDE.items():
        for reply in replies if name in names else ():
            yield {**columns_for({*names - {name}, REPLIES[0]}), REPLIES[0]: reply}


def _fits(row: Mapping[str, Any], columns: Mapping[str, Template]) -> bool:
    """Whether a row is an example, of which metric choice can score the options where columns say which they are."""
    try:
        example = parse_row(row, columns)
    except RowError:
        return False
    choice = METRICS["choice"]
    return "choices" not in columns or not (choice.doubtful(example) or choice.wrong_with(example))


@dataclass(frozen=True)
class Guess:
    """A metric, why it fits, and the options where all rows have the same."""

    metric: str
    why: str
    choices: tuple[str, ...] = ()


def _few(look: Look) -> bool:
    known = 2 <= len(look.replies) <= _FEW and look.rows >= 5 * len(look.replies)
    return known and look.short == look.rows and not look.plain


_GUESSES: tuple[tuple[Callable[[Look], bool], Callable[[Look], Guess]], ...] = (
    (lambda look: look.plain > 0, lambda look: Guess("loss", "plain text has no replies to compare")),
    (
        lambda look: look.options == look.rows,
        lambda look: Guess("choice", "every row has choices, and its answer is one of them"),
    ),
    (lambda look: look.numbers == look.rows, lambda look: Guess("number", "every answer is a number")),
    (
        _few,
        lambda look: Guess(
            "choice", f"there are only {len(look.replies)} different replies", tuple(sorted(look.replies))
        ),
    ),
    (lambda look: look.ending == look.rows, lambda look: Guess("number", "every reply ends in a number")),
    (
        lambda look: look.short >= 0.9 * look.rows,
        lambda look: Guess("rouge", "replies are short texts, compared word by word"),
    ),
    (lambda look: True, lambda look: Guess("loss", "replies are long texts of many right wordings")),
)  # the first that is true


def guess_metric(look: Look) -> Guess:
    """How the task is scored; every row can be."""
    return next(guess(look) for holds, guess in _GUESSES if holds(look))


@dataclass(frozen=True)
class Lengths:
    """In tokens, of the sample: rows and replies, each in order."""

    rows: list[int]
    replies: list[int]

    @property
    def most(self) -> int:
        """Of 99 rows in 100."""
        return _at(self.rows, 0.99)

    @property
    def reply(self) -> int:
        """Of 95 replies in 100."""
        return _at(self.replies, 0.95)


def lengths_of(look: Look, tokenizer: PreTrainedTokenizerBase) -> Lengths:
    """Raises DataError where a row cannot be written in the tokenizer's chat template."""
    from cpift.data.tokenise import UNCUT, tokenise

    rows = [len(tokenise(example, tokenizer, UNCUT)["input_ids"]) for example in look.sample]
    replies = (
        tokenizer(example.reply, add_special_tokens=False, verbose=False)["input_ids"] for example in look.sample
    )
    return Lengths(sorted(rows), sorted(len(ids) + 1 for ids in replies))


def _at(ordered: list[int], share: float) -> int:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def held_out(look: Look) -> int:
    """How many rows to hold out for testing. Raises DataError where none could be."""
    if look.rows < 2 or len(look.prompts) < 2:
        what = "there is only one row" if look.rows < 2 else "all rows have the same prompt"
        remedy = "give more, or test rows in a file of their own (NAME_train and NAME_test)"
        raise DataError(rows_of(look.source).description, [Problem("rows", f"{what}, so none can be held out", remedy)])
    return share_held(look.rows)


def share_held(rows: int) -> int:
    """A fifth of the rows, at most 400."""
    return min(400, max(1, rows // 5))
