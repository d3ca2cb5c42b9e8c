"""The report of a sweep as one HTML page: tables and inline SVG, no script, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from cpift.config.loading import Fields, shown
from cpift.errors import entry
from cpift.evaluation.estimates import Estimate
from cpift.evaluation.metrics import metric_of
from cpift.report.html import document, duration, figure, table
from cpift.scorecard.show import card_section
from cpift.sweep import plots
from cpift.sweep.config import KEEPS
from cpift.sweep.scores import (
    SweepData,
    TrialRow,
    best_trial,
    judged,
    pareto_front,
    remaking,
    trial_at,
    values_at,
)
from cpift.sweep.verdict import last_line, lead, picture, values_of
from cpift.text.escaping import html

_PANELS = 6  # dendrograms shown at once; the others fold away


def sweep_page(data: SweepData) -> str:
    """The whole document."""
    sections = {
        "picture": ("Every trial", picture(data)),
        "reported": ("On rows that the search never saw", card_section(data.reported) if data.reported else ""),
        "scores": ("Scores over the space", _scores(data)),
        "tasks": ("Every task", _tasks(data)),
        "groups": ("Groups against τ", _groups(data)),
        "front": ("Trade-offs", _front(data)),
        "trials": ("Trials", _trials(data)),
        "reuse": ("Cost and reuse", _reuse(data)),
        "best": ("Best config", _config(data.best_yaml, _best_note(data))),
        "sweep": ("Sweep", _config(data.sweep_yaml, "")),
    }
    shown_sections = {key: pair for key, pair in sections.items() if pair[1]}
    return document(data.name, "CPI-FT sweep", _subtitle(data), lead(data), shown_sections)


def _subtitle(data: SweepData) -> str:
    seconds = sum(stage.seconds_made for stage in data.reuse)
    when = f" · begun {html(data.started[:16].replace('T', ' '))} UTC" if data.started else ""
    seeds = f"{len(data.seeds)} seed{'s' if len(data.seeds) > 1 else ''}"
    return (
        f"CPI-FT sweep, {html(data.method)} · {data.points} points, {len(data.trials)} trials, {seeds}{when}"
        f" · {duration(seconds)} of work in all stages together"
    )


def _axes(data: SweepData) -> list[str]:
    """Fields with several values, those of most values first."""
    return sorted((name for name, values in data.space.items() if len(values) > 1), key=lambda n: -len(data.space[n]))


def _label(name: str) -> str:
    return name.replace("_", " ")


# ---- scores over the space -----------------------------------------------------------------------------------------


def _scores(data: SweepData) -> str:
    axes = _axes(data)
    if not axes or best_trial(data) is None:
        return ""
    parts = []
    for name, _ in data.objectives:
        both = len(axes) > 1 and max(len(data.space[axis]) for axis in axes[:2]) <= 24
        heat = f"<div>{_heat(data, name, axes[0], axes[1])}</div>" if both else ""
        line = _lines(data, name, axes, _label(name)) if len(data.space[axes[0]]) <= 24 else ""
        parts.append(f'<h3>{html(_label(name))}</h3><div class="pair">{heat}{line}</div>')
    return "".join(parts)


def _heat(data: SweepData, name: str, rows: str, columns: str) -> str:
    """The figure at every pair of values; with more fields, the best over the others."""
    sign = dict(data.objectives).get(name, 1)
    cells = {
        (r, c): values_at(data, name, {rows: r, columns: c}) for r in data.space[rows] for c in data.space[columns]
    }
    means = [estimate.mean for estimate in cells.values() if estimate is not None]
    best, low, span = max(sign * m for m in means), min(means), max(means) - min(means)
    lines = []
    for r in data.space[rows]:
        line = "".join(
            _heat_cell(data, cells[r, c], {rows: r, columns: c}, sign, best, low, span) for c in data.space[columns]
        )
        lines.append(f'<tr><th scope="row">{html(shown(r))}</th>{line}</tr>')
    others = len(_axes(data)) - 2
    over = f" Each cell is the best over {others} more field{'s' if others > 1 else ''}." if others > 0 else ""
    spread = (
        f" ± half of the {data.confidence:.0%} interval over {len(data.seeds)} seeds." if len(data.seeds) > 1 else ""
    )
    caption = (
        f"{html(_label(name))} of the {data.model} model.{spread} In brackets the trial: cells of one trial have the "
        f"same groups and are one computation. Outlined: the best.{over}"
    )
    head = [f"{html(rows)} ↓ &nbsp; {html(columns)} →", *(html(shown(c)) for c in data.space[columns])]
    return table(head, lines, caption, "heat")


def _heat_cell(
    data: SweepData, estimate: Estimate | None, point: Fields, sign: int, best: float, low: float, span: float
) -> str:
    trial = trial_at(data, point)
    if estimate is None:
        return f'<td class="muted">{html(trial.status) if trial else "–"}</td>'
    share = (estimate.mean - low) / span if span else 0.5
    shade = 0.05 + 0.5 * (share if sign > 0 else 1 - share)
    spread = f" ±{estimate.mean - estimate.low:.3f}" if estimate.low is not None else ""
    edge = ' class="edge"' if sign * estimate.mean == best else ""
    number = f"[{trial.number}]" if trial else ""
    return (
        f'<td{edge} style="background: rgba(var(--heat), {shade:.3f})">{estimate.mean:.3f}{spread}'
        f"<br><small>{number}</small></td>"
    )


def _lines(data: SweepData, name: str, axes: Sequence[str], label: str) -> str:
    by = axes[1] if len(axes) > 1 and len(data.space[axes[1]]) <= 8 else None
    bars = f" Bars: {data.confidence:.0%} t intervals, n = {len(data.seeds)}." if len(data.seeds) > 1 else " One seed."
    each = f"; one line a value of {by}" if by else ""
    caption = f"{label} of the {data.model} model against {axes[0]}{each}.{bars}"
    return figure(plots.lines(data, name, axes[0], by, label), caption)


def _tasks(data: SweepData) -> str:
    """Each task's own figure against the first field."""
    axes = _axes(data)
    if not axes or len(data.space[axes[0]]) > 24 or best_trial(data) is None:
        return ""
    panels = []
    for task in data.tasks:
        name = _own_figure(data, task)
        panels.append(_lines(data, name, axes, f"{task}, {name.rpartition('.')[2]}"))
    note = (
        '<p class="muted">Metric of each task from 0 to 1, or its loss in nats per answer token where it has none.</p>'
    )
    return f'{note}<div class="pair">{"".join(panels)}</div>'


# ---- groups, trade-offs --------------------------------------------------------------------------------------------


def _groups(data: SweepData) -> str:
    shown_first = [overlap for overlap in data.overlaps if len(overlap.tasks) > 1]
    if not shown_first:
        return ""
    panels = [
        figure(
            plots.dendrogram(overlap), f"{overlap.title}: chance {overlap.chance:.4g}, τ tried {_levels(overlap.taus)}"
        )
        for overlap in shown_first
    ]
    note = (
        '<p class="muted">A τ joins all tasks that are connected to its right. Dashed: chance, p/(2−p), the overlap of '
        "two random regions. Dotted: the values of τ that were tried.</p>"
    )
    rest = "".join(panels[_PANELS:])
    more = f'<details><summary>{len(panels) - _PANELS} more</summary><div class="panels">{rest}</div></details>'
    return f'{note}<div class="panels">{"".join(panels[:_PANELS])}</div>' + (more if rest else "")


def _levels(taus: Sequence[float]) -> str:
    return ", ".join(f"{tau:.3g}" for tau in taus)


def _front(data: SweepData) -> str:
    parts = []
    done = [trial for trial in data.trials if trial.status == "done"]
    if len(data.objectives) > 1 and done:
        numbers = ", ".join(str(trial.number) for trial in pareto_front(data))
        parts.append(
            figure(
                plots.pareto(data),
                f"Trials by the first two objectives. On the Pareto front, no other is better in one "
                f"without being worse in another: {numbers}.",
            )
        )
    if len(_axes(data)) > 2 and len(done) > 1:
        caption = "One line a point, from its values to the first objective; the best fifth of the trials stands out."
        parts.append(figure(plots.parallel_coordinates(data), caption))
    return "".join(f'<div class="narrow">{part}</div>' for part in parts)


# ---- trials, cost --------------------------------------------------------------------------------------------------


def _trials(data: SweepData) -> str:
    best, front = best_trial(data), {trial.number for trial in pareto_front(data)}
    rows = "".join(_trial(data, trial, trial is best, trial.number in front) for trial in data.trials)
    tasks = [
        f"{task}, {'loss' if metric_of(data.metrics[task]).by_loss else data.metrics[task]}" for task in data.tasks
    ]
    names = [*(name for name, _ in data.objectives), *tasks, "groups (first seed)", "own work"]
    notes = "★ the best by the first objective; ◆ on the Pareto front." if len(data.objectives) > 1 else "★ the best."
    caption = f"{notes} Own work: fusion, integration and their scores, of all seeds together."
    heads = ["trial", *map(html, data.space), *(html(_label(name)) for name in names)]
    return table(heads, [rows], caption, "scores trials") + _references(data)


def _trial(data: SweepData, trial: TrialRow, best: bool, front: bool) -> str:
    marks = ("★ " if best else "") + ("◆ " if front and len(data.objectives) > 1 else "")
    values = "".join(f"<td>{html(values_of(trial, name))}</td>" for name in data.space)
    kind = ' class="final"' if best else ""
    head = f'<tr{kind}><th scope="row">{marks}{trial.number}</th>{values}'
    if trial.status != "done":
        words = "stopped early" if trial.status == "stopped" else f"failed: {html(last_line(trial.reason))}"
        style = "muted" if trial.status == "stopped" else "down"
        return (
            f'{head}<td class="left {style}" colspan="{len(data.objectives) + len(data.tasks) + 2}">{words}</td></tr>'
        )
    figures = [*(name for name, _ in data.objectives), *(_own_figure(data, task) for task in data.tasks)]
    scores = "".join(f"<td>{_figure_cell(judged(data, trial, name))}</td>" for name in figures)
    groups = html(" → ".join(" + ".join(group) for group in trial.groups[0])) if trial.groups else "–"
    return f'{head}{scores}<td class="left">{groups}</td><td>{duration(trial.seconds)}</td></tr>'


def _figure_cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    return f"{estimate.mean:.3f}" + (
        f"<small>{estimate.low:.3f} to {estimate.high:.3f}</small>" if estimate.low is not None else ""
    )


def _own_figure(data: SweepData, task: str) -> str:
    """A task's metric, or its loss where that is the metric."""
    return f"task.{task}.{'loss' if metric_of(data.metrics[task]).by_loss else 'score'}"


def _references(data: SweepData) -> str:
    rows = []
    for title, figures in data.references.items():
        cells = "".join(f"<td>{_figure_cell(figures.get(name))}</td>" for name, _ in data.objectives)
        rows.append(f'<tr><th scope="row">{html(title)}</th>{cells}</tr>')
    heads = ["model", *(html(_label(name)) for name, _ in data.objectives)]
    return table(heads, rows, "For comparison: θ0 (base) and the probes, which all trials share", "scores")


def _reuse(data: SweepData) -> str:
    rows = [
        f'<tr><th scope="row">{html(stage.stage)}</th><td>{stage.needed}</td><td>{stage.made}</td>'
        f"<td>{stage.needed - stage.made}</td><td>{duration(stage.seconds_needed)}</td>"
        f"<td>{duration(stage.seconds_made)}</td></tr>"
        for stage in data.reuse
    ]
    needed, made = sum(stage.needed for stage in data.reuse), sum(stage.made for stage in data.reuse)
    before, after = sum(stage.seconds_needed for stage in data.reuse), sum(stage.seconds_made for stage in data.reuse)
    rows.append(
        f'<tr class="final"><th scope="row">all</th><td>{needed}</td><td>{made}</td><td>{needed - made}</td>'
        f"<td>{duration(before)}</td><td>{duration(after)}</td></tr>"
    )
    heads = ["stage", "in separate runs", "made", "reused", "work of separate runs", "work done"]
    caption = (
        "Counted from the manifests: outputs that a separate run of every point with every seed would make, and those "
        "that are there. Work is the stages' own time, added up; it leaves out starting workers."
    )
    return table(heads, rows, caption)


def _best_note(data: SweepData) -> str:
    notes = {
        "all": "",
        "best": "Of the other trials' models only the scores are kept; their manifests name the command that makes "
        "each of them again.",
        "scores": "Of the trials' models only the scores are kept; cpift {command} makes this one again.",
    }
    there = entry(KEEPS, data.keep, "keep").best
    effect = "cpift {command} takes it as it is, and finds everything made." if there else ""
    note = f"{effect} {notes[data.keep]}".strip()
    return note.format(command=remaking(data.model))


def _config(text: str, note: str) -> str:
    if not text:
        return ""
    lead = f'<p class="muted">{html(note)}</p>' if note else ""
    return f"{lead}<pre><code>{html(text.strip())}</code></pre>"
