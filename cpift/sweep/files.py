"""A sweep's report as text beside its page: `sweep.md` for readers of Markdown, `trials.csv` for spreadsheets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cpift.config.loading import shown
from cpift.evaluation.estimates import Estimate
from cpift.report.files import csv_text, fenced, md_table
from cpift.scorecard.show import card_md
from cpift.sweep.scores import SweepData, TrialRow, judged, remaking
from cpift.sweep.verdict import values_of, verdict
from cpift.text.escaping import markdown


def trials_csv(data: SweepData) -> str:
    """One line a point of the space: its trial, and that trial's figures over the seeds, each with its interval."""
    figures = list(dict.fromkeys(name for trial in data.trials for name in trial.figures.get(data.model, {})))
    bounds = [f"{name}{part}" for name in figures for part in ("", " low", " high")]
    return csv_text(["trial", "status", *data.space, "groups", "seeds", *bounds, "seconds"], _lines(data, figures))


def _lines(data: SweepData, figures: list[str]) -> Iterator[list[Any]]:
    for trial in data.trials:
        cells = [cell for name in figures for cell in _bounds(judged(data, trial, name))]
        for point in trial.points:
            values = [
                point[name] if isinstance(point[name], (int, float)) else shown(point[name]) for name in data.space
            ]
            yield [
                trial.number,
                trial.status,
                *values,
                _groups(trial),
                len(data.seeds),
                *cells,
                round(trial.seconds, 1),
            ]


def _bounds(estimate: Estimate | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if estimate is None else (estimate.mean, estimate.low, estimate.high)


def _groups(trial: TrialRow) -> str:
    """Of the first seed."""
    return " → ".join(" + ".join(group) for group in trial.groups[0]) if trial.groups else ""


def sweep_md(data: SweepData) -> str:
    """Verdict, the best config's command, and every trial."""
    first, *others = verdict(data)
    parts = [f"# {markdown(data.name)}", markdown(first)]
    if data.best_yaml:
        parts += ["Its config, in the sweep's folder:", fenced(f"cpift {remaking(data.model)} best.yaml", "sh")]
    names = [name for name, _ in data.objectives]
    head = ["trial", *(markdown(name) for name in data.space), *(markdown(name) for name in names), "groups"]
    rows = [
        [
            str(trial.number),
            *(markdown(values_of(trial, name)) for name in data.space),
            *(_figure(data, trial, name) for name in names),
            markdown(_groups(trial)) or "–",
        ]
        for trial in data.trials
    ]
    parts += ["## Trials", md_table(head, rows), f"Figures are of the {data.model} model."]
    if data.reported is not None:
        parts += ["## On rows that the search never saw", card_md(data.reported)]
    parts += ["## What follows", *(f"- {markdown(text)}" for text in others)] if others else []
    return "\n\n".join(parts) + "\n"


def _figure(data: SweepData, trial: TrialRow, name: str) -> str:
    estimate = judged(data, trial, name)
    if estimate is None:
        return trial.status if trial.status != "done" else "–"
    return f"{estimate.mean:.4f}" + (f" [{estimate.low:.4f}, {estimate.high:.4f}]" if estimate.low is not None else "")
