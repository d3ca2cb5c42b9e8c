"""Scores of one model on the tasks' test rows: loss per answer token, and each task's own metric.

The loss is always measured. `choice` ranks the options by the likelihood of each as the assistant's whole reply;
`number`, `rouge` and `judge` read what the model writes under greedy decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from cpift.config.run import TaskConfig
from cpift.config.tasks import EvaluationConfig
from cpift.data.templates import checked_templates
from cpift.data.tokenise import IGNORED
from cpift.devices import Device, resolved
from cpift.disk.files import digest
from cpift.evaluation.generation import Opening, cut_back, greedy
from cpift.evaluation.judge import judge_replies
from cpift.evaluation.likelihood import Begun, Likelihood, likelihoods, likelihoods_begun
from cpift.evaluation.metrics import Metric, Reply, description, load_metric, right_answer
from cpift.evaluation.rows import ScoredRow, scored_rows
from cpift.evaluation.scores import KeptResults, RowResult, Score, ScoredExample
from cpift.models.sources import load_model, load_tokenizer

OnScored = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TaskScore:
    """One model on one task."""

    metric: str
    score: float | None  # 0..1, higher is better; None where the metric is the loss itself
    loss: float  # mean negative log-likelihood per answer token over all rows, in nats
    tokens: int
    rows: int
    examples: list[ScoredExample]  # per test row, in the file's order: loss, tokens, and score and prediction
    described: Mapping[str, Any] = field(default_factory=dict)  # of a user's metric what pages need to know

    def record(self) -> Score:
        """As `scores.json` has it."""
        record = asdict(self)
        return cast(Score, record | record.pop("described"))


class _Room:
    """What every step of one evaluation needs. The model is loaded for the first row that nobody has scored."""

    def __init__(
        self, path: Path, settings: EvaluationConfig, device: Device, tensors: dict[str, torch.Tensor] | None = None
    ):
        self.settings, self.tokenizer = settings, load_tokenizer(path)
        self._path, self._device, self._tensors = path, device, tensors

    @cached_property
    def model(self) -> PreTrainedModel:
        model = load_model(self._path, torch.float32, self._tensors)
        if self._tensors is not None:
            self._tensors.clear()  # those that are no part of the model now need no room
        if (dtype := _products(self.settings, self._device)) != torch.float32:
            _narrow(model, dtype)
        model.to(self._device)  # type: ignore[arg-type]  # transformers wraps torch's `to`
        # generate() fills what its own config leaves open from the model's: sampling preferences, repetition penalties.
        model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
        return model


def evaluate_model(
    path: Path,
    tasks: Sequence[TaskConfig],
    settings: EvaluationConfig,
    *,
    device: Device = "cpu",
    on_progress: OnScored | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    kept: Path | None = None,
) -> dict[str, TaskScore]:
    """Score the model in `path` on each task's test rows. The same inputs on the same machine give the same scores.

    Weights are kept in float32, products computed as `settings.precision` says.
    `tensors`: the weights by the names of files, where `path` has none; they are taken out of it.
    `on_progress(task, done, total)` counts rows scored plus, where the metric needs them, rows generated.
    `kept`: where results are put as they come, and taken from; its name stands for all that decides them.

    Raises:
        DataError: test rows that cannot be scored: too long for `evaluation.max_length`, or no usable answer.
    """
    room, said = _Room(path, settings, device, tensors), on_progress or _silent
    with torch.no_grad(), _precision(settings, device):
        return {task.name: _evaluate_task(room, task, kept, said) for task in tasks}


def score_part(
    path: Path,
    tasks: Sequence[TaskConfig],
    settings: EvaluationConfig,
    part: tuple[int, int],
    *,
    kept: Path,
    device: Device = "cpu",
    on_progress: OnScored | None = None,
) -> None:
    """Put results into `kept`, of part k of n: of every n-th batch of each task. `evaluate_model` finds them there."""
    room, said = _Room(path, settings, device), on_progress or _silent
    with torch.no_grad(), _precision(settings, device):
        for task in tasks:
            rows = _rows(room, task)
            _score_rows(room, task, rows, _results(kept, task, rows), said, part)


def _silent(task: str, done: int, total: int) -> None:
    pass


def _products(settings: EvaluationConfig, device: Device) -> torch.dtype:
    """What products are computed in."""
    return torch.bfloat16 if resolved(settings.precision, device) == "bfloat16" else torch.float32


def _narrow(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep in `dtype` what autocast would make of the weights of linear layers anyway, and keep beside them; what an
    embedding shares stays as it is, and so do norms and biases, which are no factor of a product."""
    embeddings = {id(layer.weight) for layer in model.modules() if isinstance(layer, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and id(module.weight) not in embeddings:
            module.weight.data = module.weight.data.to(dtype)


def _precision(settings: EvaluationConfig, device: Device) -> torch.autocast:
    dtype = _products(settings, device)
    return torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def _rows(room: _Room, task: TaskConfig) -> list[ScoredRow]:
    with checked_templates():  # see `rows.check_rows`
        return scored_rows(room.tokenizer, room.settings, task)


def _results(kept: Path | None, task: TaskConfig, rows: Sequence[ScoredRow]) -> KeptResults:
    return KeptResults(kept, digest([task.name, [repr(row) for row in rows]])[:16])


def _evaluate_task(room: _Room, task: TaskConfig, kept: Path | None, on_progress: OnScored) -> TaskScore:
    rows, metric = _rows(room, task), load_metric(task.metric)
    results_kept = _results(kept, task, rows)
    _score_rows(room, task, rows, results_kept, on_progress, (0, 1))
    found = results_kept.all(len(rows))
    written = [result.pop("written", []) for result in found]
    results: list[ScoredExample] = [*found]
    if metric.generates:
        decoded = room.tokenizer.batch_decode(written, skip_special_tokens=True)
        texts = [text.strip() for text in decoded]
        judged = _judged(room, task, metric, rows, texts, on_progress)
        for text, result, verdict in zip(texts, results, judged, strict=True):
            result |= {"prediction": text, **verdict}
    tokens = sum(result["tokens"] for result in results)
    loss = sum(result["loss"] * result["tokens"] for result in results) / tokens
    score = None if metric.by_loss else sum(result["score"] for result in results) / len(results)
    return TaskScore(task.metric_name, score, loss, tokens, len(results), results, description(task.metric))


def _score_rows(
    room: _Room,
    task: TaskConfig,
    rows: Sequence[ScoredRow],
    kept: KeptResults,
    on_progress: OnScored,
    part: tuple[int, int],
) -> None:
    """Score what is not kept of every n-th batch, part k of n."""
    metric, done = load_metric(task.metric), 0
    sizes = [1 if metric.generates else max(1, len(row.options)) for row in rows]
    batches = list(_batches(rows, sizes, room.settings.batch_size))[part[0] :: part[1]]
    total = sum(map(len, batches)) * metric.passes

    def on_done(count: int) -> None:
        nonlocal done
        done += count
        on_progress(task.name, done, total)

    for batch in batches:
        if kept.has(batch):
            on_done(len(batch) * metric.passes)
        elif metric.generates:
            kept.add(_replies(room, rows, batch, task.max_new_tokens, on_done))
        else:
            kept.add(_likelihoods(room, rows, batch))
            on_done(len(batch))


def _batches(rows: Sequence[ScoredRow], sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices of rows, longest first (memory runs out at once or not at all), at most `limit` sequences together."""
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: (-rows[i].length, i)):
        if batch and sum(sizes[i] for i in batch) + sizes[index] > limit:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _likelihoods(room: _Room, rows: Sequence[ScoredRow], batch: Sequence[int]) -> dict[int, RowResult]:
    """Loss of each row's reply; with options also the likeliest (of equals the first) and whether it is right."""
    results = {}
    groups = [(rows[i].reply, *rows[i].options) for i in batch]
    for i, (reply, *options) in zip(batch, likelihoods(room.model, groups), strict=True):
        results[i] = _loss(rows[i], reply)
        if options:
            nll = [option.nll for option in options]
            prediction = rows[i].example.choices[nll.index(min(nll))]
            right = float(prediction == right_answer(rows[i].example))
            results[i] |= {"prediction": prediction, "score": right, "option_nll": nll}
    return results


def _loss(row: ScoredRow, reply: Likelihood) -> RowResult:
    tokens = row.reply.scored()
    return {"loss": reply.nll / tokens, "tokens": tokens}


def _judged(
    room: _Room,
    task: TaskConfig,
    metric: Metric,
    rows: Sequence[ScoredRow],
    texts: Sequence[str],
    on_progress: OnScored,
) -> list[ScoredExample]:
    """The score of each text, and of a judge what it said."""
    judge = room.settings.judge
    if metric.scores is not None:
        replies = [Reply(row.example, text) for row, text in zip(rows, texts, strict=True)]
        return [{"score": score} for score in metric.scored(replies, f"tasks.{task.name}.test")]
    assert judge is not None  # a config with such a task is refused without
    done = 2 * len(rows)
    verdicts = judge_replies(
        judge, [row.example for row in rows], texts, lambda n: on_progress(task.name, done + n, done + len(rows))
    )
    return [{"score": verdict.score, "judge": verdict.reply} for verdict in verdicts]


def _replies(
    room: _Room, rows: Sequence[ScoredRow], batch: Sequence[int], limit: int, on_done: Callable[[int], None]
) -> dict[int, RowResult]:
    """Loss of each row's reply, and the greedy reply of at most `limit` tokens to its prompt. `on_done` gets how many
    rows were scored, then how many generated."""
    ends = _ends(room, rows)
    of_replies, begun = likelihoods_begun(room.model, [rows[i].reply for i in batch])
    written = {i: _foreseen(rows[i], reply, limit, ends) for i, reply in zip(batch, of_replies, strict=True)}
    on_done(len(batch))
    _finish(room, rows, batch, written, begun, limit, ends)
    on_done(len(batch))
    losses = (_loss(rows[i], reply) for i, reply in zip(batch, of_replies, strict=True))
    return {i: loss | {"written": written[i]} for i, loss in zip(batch, losses, strict=True)}


def _foreseen(row: ScoredRow, reply: Likelihood, limit: int, ends: Collection[int]) -> list[int]:
    """How greedy decoding begins, as the likeliest tokens in the places of the right reply's tell: with these as long
    as they are right, and with the first that is another, or that ends the reply."""
    start = len(row.prompt)
    scored = sum(label != IGNORED for label in row.reply.labels[max(1, start) :])
    ids: list[int] = []
    for token, right in zip(reply.likeliest[len(reply.likeliest) - scored :], row.reply.ids[start:], strict=False):
        ids.append(token)
        if token != right or token in ends or len(ids) == limit:
            break
    return ids


def _finish(
    room: _Room,
    rows: Sequence[ScoredRow],
    batch: Sequence[int],
    written: dict[int, list[int]],
    begun: Begun,
    limit: int,
    ends: Collection[int],
) -> None:
    """Write what is not foreseen of a batch's replies. `begun`: what their likelihoods left."""
    places = [
        place
        for place, i in enumerate(batch)
        if len(written[i]) < limit and not (written[i] and written[i][-1] in ends)
    ]
    if not places:
        return
    todo = [batch[place] for place in places]
    openings = [Opening(rows[i].prompt, written[i], limit - len(written[i])) for i in todo]
    surplus = [rows[i].reply.last_label() - len(rows[i].prompt) - len(written[i]) + 1 for i in todo]
    foreseen = all(written[i] for i in todo)  # not so where a row was cut before its reply
    cache = cut_back(room.model, begun, places, surplus) if foreseen else None
    for i, more in zip(todo, greedy(room.model, openings, ends, cache), strict=True):
        written[i] = written[i] + more


def _ends(room: _Room, rows: Sequence[ScoredRow]) -> set[int]:
    """Every token that ends a turn."""
    configured = room.model.generation_config.eos_token_id
    ends = set(configured if isinstance(configured, list) else [configured])
    return (ends | {room.tokenizer.eos_token_id, *(row.end_of_turn for row in rows)}) - {None}
