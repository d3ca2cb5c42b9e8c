"""The report as text beside the page: `report.md` for readers of Markdown, `scores.csv` for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from cpift.evaluation.metrics import described
from cpift.evaluation.retention import DEFINITION, learning_of
from cpift.report.data import ReportData, retention, standing, total_tokens, usage, verdict
from cpift.report.places import EXPERTS, EXPERTS_SHARED, most_touched, overlap_of, touched_sentences
from cpift.text.escaping import code, markdown, one_line

_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")  # the last four: their wide forms, which some spreadsheets take too
_COLUMNS = (
    "model",
    "task",
    "metric",
    "score",
    "loss",
    "test_rows",
    "retention",
    "retention_half_interval",
    "judged",
    "training_tokens",
)


# ---- scores.csv ------------------------------------------------------------------------------------------------------


def scores_csv(data: ReportData) -> str:
    """One line a model and task. Scores from 0 to 1, losses in nats a token; empty where there is no figure."""
    return csv_text(_COLUMNS, _lines(data))


def _lines(data: ReportData) -> Iterator[list[Any]]:
    learning = learning_of(data.tasks, data.scores)
    for model in data.models:
        for task in data.tasks:
            score = data.scores[model][task]
            counted = task in learning and not learning[task].left_out
            yield [
                model,
                task,
                score["metric"],
                score["score"],
                score["loss"],
                score["rows"],
                retention(data, model, task),
                data.halves.get(model, {}).get(task),
                "yes" if counted else "no",
                total_tokens(data, model) if model in data.tokens else None,
            ]


def csv_text(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table for spreadsheets, one line a row. None leaves a cell empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(_cell, head))
    writer.writerows([_cell(value) for value in row] for row in rows)
    return stream.getvalue()


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula begins with an apostrophe."""
    if not isinstance(value, str):
        return value
    text = one_line(value)
    return f"'{text}" if text.lstrip()[:1] in _FORMULA else text


# ---- report.md -------------------------------------------------------------------------------------------------------


def report_md(data: ReportData) -> str:
    """Verdict, model, retention, scores, tokens and notes."""
    parts = [f"# {markdown(data.name)}", *([markdown(data.headline)] if data.headline else [])]
    if data.model:
        parts.append(f"The model, in the run's folder: {code(data.model)}")
        parts.append(fenced(usage(data, data.model), "python"))
    parts += ["## Retention", md_table(*_retention(data)), markdown(DEFINITION)]
    parts += ["## Scores", md_table(*_scores(data))]
    parts.append("Scores in %, losses in nats per answer token, in brackets beside a score.")
    if data.tokens:
        rows = [[markdown(model), _count(total_tokens(data, model))] for model in data.models if model in data.tokens]
        parts += ["## Tokens", md_table(["model", "input tokens of the fine-tunes behind it"], rows)]
    if data.experts:
        parts += ["## Experts", *map(markdown, touched_sentences(data.experts, data.tasks))]
        parts += [_of_experts(*most_touched(data.experts, data.tasks)), markdown(EXPERTS)]
        parts += [_of_experts(["task", *data.tasks], overlap_of(data.experts, data.tasks)), markdown(EXPERTS_SHARED)]
    said = [text for text in verdict(data) if text != data.headline]
    parts += ["## What follows", *(f"- {markdown(text)}" for text in [*said, *data.warnings])]
    return "\n\n".join(parts) + "\n"


def _of_experts(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return md_table([*map(markdown, head)], [[*map(markdown, line)] for line in lines])


def _retention(data: ReportData) -> tuple[list[str], list[list[str]]]:
    rows = []
    for model in data.models:
        summary = standing(data, model)
        mean = "–" if summary is None else share(summary.mean, data.mean_halves.get(model))
        cells = [share(retention(data, model, task), data.halves.get(model, {}).get(task)) for task in data.tasks]
        rows.append([markdown(model), mean, *cells])
    return ["model", "mean", *map(markdown, data.tasks)], rows


def _scores(data: ReportData) -> tuple[list[str], list[list[str]]]:
    metrics = {task: described(data.scores[data.models[0]][task]) for task in data.tasks}
    head = ["model", *(f"{markdown(task)}, {markdown(metric.title)}" for task, metric in metrics.items())]
    rows = []
    for model in data.models:
        scores = [data.scores[model][task] for task in data.tasks]
        losses = [f"{score['loss']:.3f}" for score in scores]
        cells = [
            loss if score["score"] is None else f"{100 * score['score']:.1f} ({loss})"
            for score, loss in zip(scores, losses, strict=True)
        ]
        rows.append([markdown(model), *cells])
    return head, rows


def share(value: float | None, half: float | None) -> str:
    """A retention in percent and half of its interval, where they are known."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" + ("" if half is None else f" ±{100 * half:.1f}")


def _count(value: int | None) -> str:
    return "not counted" if value is None else f"{value:,}"


def md_table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int] | None = None) -> str:
    """Cells are Markdown already. `right`: the columns that stand at the right, all but the first where it is None."""
    right = range(1, len(head)) if right is None else right
    lines = [head, ["--:" if column in right else "---" for column in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fenced(text: str, language: str) -> str:
    """A block of code that nothing in it can end."""
    lines = "\n".join(one_line(line) for line in text.splitlines())
    fence = "`" * 3
    while fence in lines:
        fence += "`"
    return f"{fence}{language}\n{lines}\n{fence}"
