"""Scores of one model on the tasks' test rows: loss per answer token, and each task's own metric.

The loss is always measured. `choice` ranks the options by the likelihood of each as the assistant's whole reply;
`number`, `rouge` and `judge` read what the model writes under greedy decoding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cpift.config import TaskConfig
from cpift.config_evaluation import EvaluationConfig
from cpift.data import load_examples
from cpift.devices import Device, resolved
from cpift.errors import DataError, Problem
from cpift.examples import Example, Message
from cpift.judge import judge_replies
from cpift.likelihood import Labelled, pad, sequence_nll
from cpift.metrics import metric_of, right_answer
from cpift.models import load_model, load_tokenizer
from cpift.row_problems import RowProblems
from cpift.row_shapes import size_of
from cpift.templates import checked_templates
from cpift.tokens import IGNORED, UNCUT, tokenise

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TaskScore:
    """One model on one task."""

    metric: str
    score: float | None  # 0..1, higher is better; None where the metric is the loss itself
    loss: float  # mean negative log-likelihood per answer token over all rows, in nats
    tokens: int
    rows: int
    examples: list[dict[str, Any]]  # per test row, in the file's order: loss, tokens, and score and prediction


@dataclass(frozen=True)
class _Row:
    """One test row, tokenised. `options` are scored on their last turn; `prompt` ends where the last reply begins."""

    example: Example
    reply: Labelled
    options: tuple[Labelled, ...]
    prompt: list[int]
    end_of_turn: int

    @property
    def length(self) -> int:
        return max(len(sequence.ids) for sequence in (self.reply, *self.options))


@dataclass(frozen=True)
class _Room:
    """What every step of one evaluation needs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: EvaluationConfig


def evaluate_model(
    path: Path,
    tasks: Sequence[TaskConfig],
    settings: EvaluationConfig,
    *,
    device: Device = "cpu",
    on_progress: Progress | None = None,
) -> dict[str, TaskScore]:
    """Score the model in `path` on each task's test rows. The same inputs on the same machine give the same scores.

    Weights are kept in float32, products computed as `settings.precision` says.
    `on_progress(task, done, total)` counts rows scored plus, where the metric needs them, rows generated.

    Raises:
        DataError: test rows that cannot be scored: too long for `evaluation.max_length`, or no usable answer.
    """
    tokenizer = load_tokenizer(path)
    model = load_model(path, torch.float32).to(device)  # type: ignore[arg-type]
    # generate() fills what its own config leaves open from the model's: sampling preferences, repetition penalties.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    room = _Room(model, tokenizer, settings)
    with torch.no_grad(), _precision(settings, device):
        return {task.name: _evaluate_task(room, task, on_progress or _silent) for task in tasks}


def check_rows(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[TaskConfig],
    settings: EvaluationConfig,
    first: int | None = None,
) -> int:
    """Find test rows that could not be scored, of all or of the first ones and the longest, with θ0's tokenizer alone.

    Returns the most tokens that the model sees of a row, those included that it may generate.

    Raises:
        DataError: as `evaluate_model` would, for all tasks at once.
    """
    problems: list[Problem] = []
    longest = 0
    for task in tasks:
        try:
            for row in _rows(tokenizer, settings, task, first):
                generated = len(row.prompt) + task.max_new_tokens if metric_of(task.metric).generates else 0
                longest = max(longest, row.length, generated)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError("test rows", problems)
    return longest


def _silent(task: str, done: int, total: int) -> None:
    pass


@contextlib.contextmanager
def _precision(settings: EvaluationConfig, device: Device) -> Iterator[None]:
    with torch.autocast(device, dtype=torch.bfloat16, enabled=resolved(settings.precision, device) == "bfloat16"):
        yield


def _evaluate_task(room: _Room, task: TaskConfig, on_progress: Progress) -> TaskScore:
    with checked_templates():  # see `check_rows`
        rows = _rows(room.tokenizer, room.settings, task)
    metric = metric_of(task.metric)
    total = len(rows) * metric.passes
    results = _likelihoods(room, rows, lambda done: on_progress(task.name, done, total))
    if metric.generates:
        texts = _generate(room, rows, task.max_new_tokens, lambda done: on_progress(task.name, len(rows) + done, total))
        for text, result, found in zip(texts, results, _judged(room, task, rows, texts, on_progress), strict=True):
            result |= {"prediction": text, **found}
    tokens = sum(result["tokens"] for result in results)
    loss = sum(result["loss"] * result["tokens"] for result in results) / tokens
    score = None if metric.by_loss else sum(result["score"] for result in results) / len(results)
    return TaskScore(task.metric, score, loss, tokens, len(results), results)


def _rows(
    tokenizer: PreTrainedTokenizerBase, settings: EvaluationConfig, task: TaskConfig, first: int | None = None
) -> list[_Row]:
    """The task's test rows, tokenised; every unusable one is reported at once. first: of so many, and the longest."""
    examples = load_examples(task.test_data)[: settings.limit]
    places = list(range(len(examples)))
    if first is not None and first < len(places):
        places = [*places[:first], max(places[first:], key=lambda place: size_of(examples[place]))]
    rows = [_tokenised(tokenizer, examples[place], task.metric) for place in places]
    if not rows:
        problem = Problem(f"tasks.{task.name}.test", "no test rows", "give at least one")
        raise DataError(f"evaluation of {task.name}", [problem])
    bad = RowProblems(f"tasks.{task.name}.test ")
    for place, row in zip(places, rows, strict=True):
        for found in _row_problems(row, task, settings.max_length):
            bad.add(place + 1, *found)
    if bad:
        raise DataError(f"evaluation of {task.name}", bad.problems(len(rows)))
    return [replace(row, reply=_cut(row.reply, settings.max_length)) for row in rows]


def _tokenised(tokenizer: PreTrainedTokenizerBase, example: Example, metric: str) -> _Row:
    def encode(last: Message) -> Labelled:
        encoded = tokenise(
            replace(example, messages=(*example.messages[:-1], last)), tokenizer, UNCUT
        )  # what does not fit is this module's decision
        return Labelled(encoded["input_ids"], encoded["labels"])

    reply = encode(replace(example.messages[-1], trained=True))  # a flag for training does not take the reply away
    choices = example.choices if metric_of(metric).by_options else ()
    options = tuple(_last_turn_only(encode(Message("assistant", choice))) for choice in choices)
    start, end = _last_turn(reply.labels)
    return _Row(example, reply, options, reply.ids[:start], reply.ids[end])


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


def _row_problems(row: _Row, task: TaskConfig, max_length: int) -> Iterator[tuple[str, str]]:
    example, raise_it = row.example, "raise evaluation.max_length or leave the row out"
    if _cut(row.reply, max_length).scored() == 0:
        yield f"no answer token within evaluation.max_length = {max_length}", raise_it
    elif row.options and row.length > max_length:
        yield f"an option ends after {row.length} tokens, evaluation.max_length is {max_length}", raise_it
    if (found := metric_of(task.metric).problem(example)) is not None:
        yield found


def _batches(rows: Sequence[_Row], sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices of rows, longest first (memory runs out at once or not at all), at most `limit` sequences together."""
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: (-rows[i].length, i)):
        if batch and sum(sizes[i] for i in batch) + sizes[index] > limit:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _likelihoods(room: _Room, rows: Sequence[_Row], on_done: Callable[[int], None]) -> list[dict[str, Any]]:
    """Loss of each row's reply; with options also the likeliest (of equals the first) and whether it is right."""
    results: list[dict[str, Any]] = [{} for _ in rows]
    done = 0
    for batch in _batches(rows, [1 + len(row.options) for row in rows], room.settings.batch_size):
        groups = [(rows[i].reply, *rows[i].options) for i in batch]
        for i, (reply, *options) in zip(batch, sequence_nll(room.model, groups), strict=True):
            tokens = rows[i].reply.scored()
            results[i] = {"loss": reply / tokens, "tokens": tokens}
            if options:
                prediction = rows[i].example.choices[options.index(min(options))]
                right = float(prediction == right_answer(rows[i].example))
                results[i] |= {"prediction": prediction, "score": right, "option_nll": options}
        done += len(batch)
        on_done(done)
    return results


def _judged(
    room: _Room, task: TaskConfig, rows: Sequence[_Row], texts: Sequence[str], on_progress: Progress
) -> list[dict[str, Any]]:
    """The score of each text, and of a judge what it said."""
    metric, judge = metric_of(task.metric), room.settings.judge
    if metric.text is not None:
        return [{"score": metric.text(row.example, text)} for row, text in zip(rows, texts, strict=True)]
    assert judge is not None  # a config with such a task is refused without
    done = 2 * len(rows)
    verdicts = judge_replies(
        judge, [row.example for row in rows], texts, lambda n: on_progress(task.name, done + n, done + len(rows))
    )
    return [{"score": one.score, "judge": one.reply} for one in verdicts]


def _generate(room: _Room, rows: Sequence[_Row], max_new_tokens: int, on_done: Callable[[int], None]) -> list[str]:
    """The greedy reply to each row's prompt, without special tokens."""
    config = _greedy(room, rows, max_new_tokens)
    texts = [""] * len(rows)
    done = 0
    for batch in _batches(rows, [1] * len(rows), room.settings.batch_size):
        prompts = [rows[i].prompt for i in batch]
        ids = pad(prompts, config.pad_token_id, "left", room.model.device)
        mask = pad([[1] * len(prompt) for prompt in prompts], 0, "left", room.model.device)
        whole = room.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
        written = room.tokenizer.batch_decode(whole[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(batch, written, strict=True):
            texts[i] = text.strip()
        done += len(batch)
        on_done(done)
    return texts


def _greedy(room: _Room, rows: Sequence[_Row], max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding that stops at every token that ends a turn."""
    configured = room.model.generation_config.eos_token_id
    ends = set(configured if isinstance(configured, list) else [configured]) - {None}
    ends |= {room.tokenizer.eos_token_id, *(row.end_of_turn for row in rows)}
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=room.tokenizer.pad_token_id,
    )
