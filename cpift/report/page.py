"""The report as one HTML page: tables and inline SVG, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from cpift.evaluation.metrics import described
from cpift.evaluation.retention import DEFINITION, probe_of
from cpift.evaluation.scores import Score
from cpift.method.measures import measure_named
from cpift.report import plots
from cpift.report.data import LEFT_OUT, ReportData, compare, left_out_marks, retention, standing
from cpift.report.html import document, duration, figure, table
from cpift.report.picture import lead, picture, replies, tokens
from cpift.report.places import experts_html, moves_tables, overlap_html
from cpift.text.escaping import html
from cpift.training.spec import HeldOutRow, LogRow

_SECTIONS = {
    "retention": "Every model on every task",
    "tokens": "What each model cost",
    "replies": "Replies, side by side",
    "scores": "Scores",
    "overlap": "Core overlap and groups",
    "cores": "Where the cores lie",
    "fusion": "Fusion angles",
    "training": "Training",
    "history": "Where the model comes from",
    "checks": "Checks",
    "config": "Configuration",
    "provenance": "Provenance",
}


def page(data: ReportData) -> str:
    """The whole document."""
    body = {
        "retention": picture(data),
        "tokens": tokens(data),
        "replies": replies(data),
        "scores": _scores(data),
        "overlap": _overlap(data),
        "cores": _cores(data),
        "fusion": _fusion(data),
        "training": _training(data),
        "history": _history(data),
        "checks": _checks(data),
        "config": f"<pre><code>{html(data.config_yaml.strip())}</code></pre>",
        "provenance": _provenance(data),
    }
    sections = {key: (_SECTIONS[key], html) for key, html in body.items() if html}
    return document(data.name, "CPI-FT report", _subtitle(data), lead(data), sections)


def _subtitle(data: ReportData) -> str:
    started = min((str(row.get("started", "")) for row in data.provenance), default="")
    seconds = sum(float(row.get("seconds") or 0) for row in data.provenance)
    tasks = f"{len(data.tasks)} task{'s' if len(data.tasks) > 1 else ''}"
    when = f" · begun {html(started[:16].replace('T', ' '))} UTC" if started else ""
    spent = f" · {duration(seconds)} of work in all stages together" if seconds else ""
    return f"Core Parameter Isolation Fine-Tuning · {tasks}{when}{spent}"


# ---- scores --------------------------------------------------------------------------------------------------------


def _scores(data: ReportData) -> str:
    first = data.scores[data.models[0]]
    heads = [
        f"{html(task)}{left_out_marks(data).get(task, '')}<br><small>{described(first[task]).title}<br>"
        f"{first[task]['rows']} rows</small>"
        for task in data.tasks
    ]
    rows = [_scores_row(data, model) for model in data.models]
    caption = "Large: the task's metric. Below: loss in nats per answer token, and retention."
    head = ["model", *heads, "mean retention", "worst task"]
    return table(head, rows, caption, "scores") + _scores_legend(data)


def _scores_row(data: ReportData, model: str) -> str:
    cells = "".join(_score_cell(data, model, task) for task in data.tasks)
    summary = standing(data, model)
    mean = f"{summary.mean:.1%}" if summary else "–"
    worst = f"{summary.worst:.1%}<small>{html(summary.worst_task)}</small>" if summary else "–"
    last = ' class="final"' if model == data.models[-1] else ""
    return f'<tr{last}><th scope="row">{html(model)}</th>{cells}<td>{mean}</td><td>{worst}</td></tr>'


def _score_cell(data: ReportData, model: str, task: str) -> str:
    score = data.scores[model][task]
    best = all(compare(score, data.scores[other][task]) >= 0 for other in data.models)
    main = f"{score['loss']:.3f}" if score["score"] is None else f"{100 * score['score']:.1f}"
    share = retention(data, model, task)
    notes = [f"loss {score['loss']:.3f}"] if score["score"] is not None else []
    notes += [] if share is None else [f"{share:.0%}"]
    own = ' class="own"' if model == probe_of(task) else ""
    text = f"<strong>{main}</strong>" if best else main
    return f"<td{own}>{_marks(data, model, task, score)}{text}<small>{' · '.join(notes)}</small></td>"


def _marks(data: ReportData, model: str, task: str, score: Score) -> str:
    marks = ""
    probe = data.scores.get(probe_of(task), {}).get(task)
    if probe is not None and model != probe_of(task) and compare(score, probe) > 0:
        marks += _mark("★", "up", "better than the task's own probe")
    if "base" in data.models and model != "base":
        sign = compare(score, data.scores["base"][task])
        name, symbol, kind = {1: ("better", "▲", "up"), -1: ("worse", "▼", "down"), 0: ("equal", "=", "muted")}[sign]
        marks += _mark(symbol, kind, f"{name} than θ0" if sign else "equal to θ0")
    return marks


def _mark(symbol: str, kind: str, label: str) -> str:
    return f'<span class="{kind}" role="img" aria-label="{label}" title="{label}">{symbol}</span> '


def _scores_legend(data: ReportData) -> str:
    out = left_out_marks(data)
    note = f" {LEFT_OUT} The own probe did not learn the task: no retention, and in no mean." if out else ""
    return (
        '<p class="muted">▲ better, ▼ worse than the pre-trained θ0 (base); ★ better than the task\'s own probe, whose '
        "cell is dashed; bold: best of the column. Marks compare the metric where there is one, else the loss. "
        f"{DEFINITION}{note}</p>"
    )


# ---- overlap -------------------------------------------------------------------------------------------------------


def _overlap(data: ReportData) -> str:
    top = max((data.jaccard[i][j] for i in range(len(data.tasks)) for j in range(i)), default=0.0)
    rows = []
    for i, task in enumerate(data.tasks):
        cells = "".join(_jaccard_cell(data, i, j, max(top, data.chance)) for j in range(len(data.tasks)))
        rows.append(f'<tr><th scope="row">{html(task)}</th>{cells}</tr>')
    caption = (
        f"Jaccard overlap S of the core regions; two random regions of these sizes: {data.chance:.4f}. Cells up to "
        f"that are pale. In brackets: multiples of it. Outlined: S ≥ τ = {data.tau:.4g}, an edge."
    )
    order = "".join(f"<li>stage {k}: {html(', '.join(group))}</li>" for k, group in enumerate(data.groups, start=1))
    return (
        table(["task", *map(html, data.tasks)], rows, caption, "heat")
        + f"<p>{_grouping_sentence(data)}</p><ul>{order}</ul>"
        + overlap_html(data.experts, data.tasks)
    )


def _jaccard_cell(data: ReportData, i: int, j: int, top: float) -> str:
    if i == j:
        return '<td class="diagonal">1</td>'
    value = data.jaccard[i][j]
    beyond = top - data.chance
    shade = 0.55 * max(0.0, value - data.chance) / beyond if beyond > 0 else 0.0
    edge = ' class="edge"' if value >= data.tau else ""
    times = f"<br><small>({value / data.chance:.1f}×)</small>" if data.chance else ""
    return f'<td{edge} style="background: rgba(var(--heat), {shade:.3f})">{value:.4f}{times}</td>'


def _grouping_sentence(data: ReportData) -> str:
    groups, tasks = len(data.groups), len(data.tasks)
    if tasks == 1:
        return "There is one task, so one group."
    if groups == 1:
        return "This τ merges all tasks into one group, which is trained jointly. The stages, in order:"
    if groups == tasks:
        return "This τ leaves every task in a group of its own. The stages, in order:"
    return f"This τ makes {groups} groups of the {tasks} tasks. The stages, in order:"


def _history(data: ReportData) -> str:
    """The runs that led to this one; nothing of a run that began with θ0."""
    rows = [f'<tr><th scope="row">{html(run)}</th><td>{html(change)}</td></tr>' for run, change in data.history]
    return table(["run", "tasks"], rows, "The oldest first; the last one is this run", "history") if rows else ""


# ---- cores ---------------------------------------------------------------------------------------------------------


def _cores(data: ReportData) -> str:
    rows = []
    for task in data.tasks:
        summary, space = data.regions[task], sum(row["numel"] for row in data.cores[task])
        share = summary["count"] / space if space else 0.0
        threshold = "–" if summary["threshold"] is None else f"{summary['threshold']:.3g}"
        rows.append(
            f'<tr><th scope="row">{html(task)}</th><td>{summary["count"]:,}</td><td>{summary["requested"]:,}</td>'
            f"<td>{share:.3%}</td><td>{threshold}</td></tr>"
        )
    measure = measure_named(data.measure)
    head = ["task", "core elements", "requested", "share", f"smallest {measure.threshold} in the core"]
    caption = f"Core regions: the elements of largest {measure.formula} (measure: {data.measure})"
    shown = table(head, rows, caption)
    return (
        shown
        + '<div class="pair">'
        + figure(plots.density_by_layer(data.cores), "Core density by layer: share of its parameters in the core.")
        + figure(plots.density_by_kind(data.cores), "Core density by module kind, over all layers.")
        + "</div>"
        + experts_html(data.experts, data.tasks)
        + moves_tables(data.moves)
    )


# ---- fusion --------------------------------------------------------------------------------------------------------


def _fusion(data: ReportData) -> str:
    angles = [angle for row in data.slerp for angle in row.get("angles", ())]
    shares = [float(share) for row in data.slerp for share in row.get("lerp", ())]
    if not angles:
        return "<p>No vector was interpolated.</p>"
    middle = median(angles)
    text = (
        f"<p>SLERP interpolated {len(angles):,} vector pairs (tensors × folds). Median angle Ω: {middle:.4g} rad "
        f"({math.degrees(middle):.3g}°); from {min(angles):.3g} to {max(angles):.3g} rad. LERP branch (Ω below ε): "
        f"{sum(shares) / len(shares):.1%} of them.</p>"
        f"<p>At the median angle the middle of the arc is {1 / math.cos(min(middle, math.pi - 1e-9) / 2) - 1:.2g} "
        "longer, as a share of the length, than the middle of the chord: that is how much choosing SLERP over a plain "
        "weighted mean changes here.</p>"
    )
    histogram = figure(plots.angle_histogram(data.slerp), "Angles between the vectors that were interpolated.")
    layers = figure(plots.angles_by_layer(data.slerp, data.tasks), "Median angle by layer, as each task is folded in.")
    return f'{text}<div class="pair">{histogram}{layers}</div>'


# ---- training, checks, provenance ----------------------------------------------------------------------------------


def _training(data: ReportData) -> str:
    stages = "; ".join(f"{number}: {', '.join(group)}" for number, group in enumerate(data.groups, start=1))
    added = bool(data.history) and data.history[-1][1].startswith("+")  # then the last stage is one, of the new task
    note = "" if added else f'<p class="muted">Stages of the backbone and of the integration: {html(stages)}.</p>'
    panels = "".join(
        figure(plots.training_curve(title, log), f"{title}: training loss {_ends(log)}")
        for title, log in data.curves.items()
    )
    panels += "".join(
        figure(plots.training_curve(title, numbers, "Held-out loss"), f"{title}: held-out loss {_lowest(numbers)}")
        for title, rows in data.held_out.items()
        if (numbers := [row for row in rows if math.isfinite(row["loss"])])
    )
    rows = "".join(f"<li>{html(sentence)}</li>" for sentence in data.rows)
    return f'{note}<div class="panels">{panels}</div>' + (f'<ul class="muted">{rows}</ul>' if rows else "")


def _ends(log: Sequence[LogRow]) -> str:
    losses = [row["loss"] for row in log if "loss" in row]
    return f"{losses[0]:.3f} → {losses[-1]:.3f}" if losses else "was not logged"


def _lowest(rows: Sequence[HeldOutRow]) -> str:
    """How it went, and by stage where it was lowest; at that step `keep: best` takes a stage's weights."""
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    best = [min((row for row in rows if row["stage"] == stage), key=lambda row: row["loss"]) for stage in stages]
    where = (f"{row['loss']:.3f} at step {row['step']}" for row in best)
    return f"{rows[0]['loss']:.3f} → {rows[-1]['loss']:.3f}, lowest {', '.join(where)}"


def _checks(data: ReportData) -> str:
    results = {
        True: '<td class="left pass">✓ passed</td>',
        False: '<td class="left fail">✗ FAILED</td>',
        None: '<td class="left">– nothing to compare</td>',
    }
    rows = [
        f'<tr>{results[check["passed"]]}<td class="left">{html(check["name"])}</td>'
        f'<td class="left">{html(str(check["detail"]))}</td></tr>'
        for check in data.checks
    ]
    return table(["result", "check", "detail"], rows, "What the run verified of itself", "checks")


def _provenance(data: ReportData) -> str:
    rows = [
        f'<tr><th scope="row">{html(str(row.get("label") or row.get("stage", "")))}</th>'
        f'<td class="left">{html(str(row.get("stage", "")))}</td>'
        f'<td class="left"><code>{html(str(row.get("fingerprint", ""))[:12])}</code></td>'
        f'<td class="left">{html(str(row.get("started", ""))[:19].replace("T", " "))}</td>'
        f"<td>{duration(float(row.get('seconds') or 0))}</td>"
        f'<td class="left">{html(str(row.get("device") or ""))}</td>'
        f'<td class="left"><code>{html(str(row.get("commit") or "–")[:10])}</code></td></tr>'
        for row in data.provenance
    ]
    head = ["artifact", "stage", "fingerprint", "started (UTC)", "time", "device", "commit"]
    return table(head, rows, "Every artifact of the run, from cache or made by it", "provenance") + _versions(data)


def _versions(data: ReportData) -> str:
    used: dict[str, set[str]] = {}
    for row in data.provenance:
        for package, version in (row.get("versions") or {}).items():
            used.setdefault(package, set()).add(str(version))
        if row.get("platform"):
            used.setdefault("platform", set()).add(str(row["platform"]))
    lines = (f"{name}: {' and '.join(sorted(versions))}" for name, versions in sorted(used.items()))
    items = "".join(f"<li>{html(line)}</li>" for line in lines)
    return f"<details><summary>Versions</summary><ul>{items}</ul></details>" if items else ""
