"""What a sweep's report shows before any table: the best point, how to run it, and every trial drawn."""

from __future__ import annotations

from cpift.config.variation import Fields, shown
from cpift.report.html import figure
from cpift.sweep import plots
from cpift.sweep.scores import SweepData, remaking
from cpift.sweep.verdict import verdict
from cpift.text.escaping import html

_DRAWN = 24  # trials


def lead(data: SweepData) -> str:
    """The verdict in one piece, what failed, and the best config with the command that takes it."""
    failed = [trial for trial in data.trials if trial.status == "failed"]
    items = "".join(
        f"<li>trial {trial.number} ({html(_point(trial.points[0]))}): <code>{html(last_line(trial.reason))}</code></li>"
        for trial in failed
    )
    count = f"{len(failed)} of {len(data.trials)} trials failed"
    broken = f'<p class="down"><strong>{count}</strong></p><ul>{items}</ul>' if failed else ""
    use = ""
    if data.best_yaml:
        use = f"<p>Its config, in the sweep's folder:</p><pre><code>cpift {remaking(data.model)} best.yaml</code></pre>"
    return f'<div class="verdict"><p class="headline">{html(verdict(data)[0])}</p>{broken}{use}</div>'


def last_line(text: str) -> str:
    """Of an error, what went wrong."""
    return (text.strip() or "no reason given").splitlines()[-1]


def _point(point: Fields) -> str:
    return ", ".join(f"{name} = {shown(value)}" for name, value in point.items())


def picture(data: SweepData) -> str:
    """The first objective of every trial with its interval, beside θ0, and what follows from it in sentences."""
    label = data.objectives[0][0].replace("_", " ")
    best = "most" if data.objectives[0][1] > 0 else "least"
    bars = f" Bars: {data.confidence:.0%} t intervals, n = {len(data.seeds)}." if len(data.seeds) > 1 else " One seed."
    drawn = sum(trial.status == "done" for trial in data.trials)
    first = f" The best {_DRAWN} of {drawn} trials." if drawn > _DRAWN else ""
    axis = "Dotted: θ0. The axis begins near the least."
    caption = f"{label} of the {data.model} model; {best} is best, on top.{first}{bars} {axis}"
    sentences = "".join(f"<li>{html(sentence)}</li>" for sentence in verdict(data)[1:])
    drawing = figure(plots.trials(data, _DRAWN), caption)
    return f'<div class="narrow">{drawing}</div>' * bool(drawing) + (f"<ul>{sentences}</ul>" if sentences else "")
