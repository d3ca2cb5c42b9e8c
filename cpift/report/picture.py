"""What a run's report shows before any table: the verdict, retention drawn, what models cost, what they reply."""

from __future__ import annotations

from cpift.config.tasks import BASELINES
from cpift.evaluation.retention import judged, learning_of, probe_of
from cpift.report.chart import BESIDE, LAST, MADE, REFERENCE, Marker, Retained, kept_panel, right_end
from cpift.report.data import ReportData, Sample, retention, standing, total_tokens, usage, verdict
from cpift.report.html import figure, table
from cpift.text.escaping import html

_CUT = 600  # letters of a prompt or a reply
_BESIDE = {baseline.title for baseline in BASELINES.values()}


# ---- verdict ---------------------------------------------------------------------------------------------------------


def lead(data: ReportData) -> str:
    """The verdict in one sentence, what failed, and the model with lines that use it."""
    headline = f'<p class="headline">{html(data.headline)}</p>' if data.headline else ""
    failed = [check["name"] for check in data.checks if check["passed"] is False]
    broken = f'<p class="fail">Failed: {html("; ".join(failed))}</p>' if failed else ""
    use = ""
    if data.model:
        use = f"<p>The model, in the run's folder: <code>{html(data.model)}</code></p>"
        use += f"<pre><code>{html(usage(data, data.model))}</code></pre>"
    return f'<div class="verdict">{headline}{broken}{use}</div>'


# ---- the picture -----------------------------------------------------------------------------------------------------


def picture(data: ReportData) -> str:
    """Retention of every model on every task, and what follows from it in sentences."""
    sentences = "".join(f"<li>{html(text)}</li>" for text in verdict(data) if text != data.headline)
    warnings = "".join(f'<p class="warning"><strong>Note.</strong> {html(text)}</p>' for text in data.warnings)
    return f"{_panels(data)}<ul>{sentences}</ul>{warnings}"


def _panels(data: ReportData) -> str:
    learning = learning_of(data.tasks, data.scores)
    by_task = {task: kept_on(data, task) for task in judged(learning)}
    mean = _mean(data) if len(data.tasks) > 1 else {}
    right = right_end([retained for shares in (mean, *by_task.values()) for retained in shares.values()])
    looks = {model: look_of(data, model) for model in data.models}
    count = len(judged(learning))
    drawn = [(f"mean of {count} task{'s' * (count > 1)}", mean)] if mean else []
    panels = [figure(kept_panel(title, shares, looks, right), "") for title, shares in drawn]
    for task in data.tasks:
        if task in by_task:
            panels.append(figure(kept_panel(task, by_task[task], looks, right), ""))
        else:
            why = learning[task].left_out if task in learning else "its probe was not scored"
            panels.append(_not_drawn(task, why))
    return f'<div class="panels">{"".join(panels)}</div>{_legend(data)}'


def _not_drawn(task: str, why: str) -> str:
    return (
        f'<div class="absent"><p><strong>{html(task)}</strong></p><p>No retention: the own probe did not learn the '
        f"task ({html(why)}). The scores themselves are in the table below.</p></div>"
    )


def kept_on(data: ReportData, task: str) -> dict[str, Retained]:
    """By model, in the order of the data, what it keeps on a judged task."""
    shares = {model: retention(data, model, task) for model in data.models}
    halves = {model: data.halves.get(model, {}).get(task) for model in data.models}
    return {model: Retained(share, halves[model]) for model, share in shares.items() if share is not None}


def _mean(data: ReportData) -> dict[str, Retained]:
    standings = {model: standing(data, model) for model in data.models}
    return {
        model: Retained(mean.mean, data.mean_halves.get(model)) for model, mean in standings.items() if mean is not None
    }


def look_of(data: ReportData, model: str) -> Marker:
    """How a model is drawn: the last one, what it was made from, what else could be made, references."""
    if model == data.models[-1]:
        return LAST
    if model == "base" or model in {probe_of(task) for task in data.tasks}:
        return REFERENCE
    return BESIDE if model in _BESIDE else MADE


def _legend(data: ReportData) -> str:
    names = {
        LAST: f"the {data.models[-1]} model",
        MADE: "what it was made from",
        BESIDE: "what else could be made",
        REFERENCE: "θ0 (base) and the probes, one task's fine-tunes",
    }
    signs = {LAST: "◆", MADE: "●", BESIDE: "■", REFERENCE: "○"}
    used = {look_of(data, model) for model in data.models}
    keys = " ".join(
        f'<span class="key"><span style="color: {_variable(look)}" aria-hidden="true">{signs[look]}</span> '
        f"{html(name)}</span>"
        for look, name in names.items()
        if look in used
    )
    bars = (
        "Bars: 95 % intervals over the test rows, paired with the probe's; where all rows say the same, what they "
        "leave open. They know nothing of another training run. "
        if data.halves
        else ""
    )
    return (
        f'<p class="keys">{keys}</p><p class="muted">Retention: score ÷ the own probe\'s score, of a loss the other '
        f"way round. Dashed: the own probe, 100 %. Dotted: θ0. {bars}All axes begin at 0 and are the same.</p>"
    )


def _variable(look: Marker) -> str:
    return {LAST: "var(--s1)", MADE: "var(--s0)", BESIDE: "var(--s2)", REFERENCE: "var(--muted)"}[look]


# ---- tokens ----------------------------------------------------------------------------------------------------------


def tokens(data: ReportData) -> str:
    """What training a model took; empty where it is not known of any."""
    known = {model: total_tokens(data, model) for model in data.tokens}
    if not known:
        return ""
    most = max((known_count for known_count in known.values() if known_count), default=0)
    rows = []
    for model in (model for model in data.models if model in known):
        total = known[model]
        bar = f'<span class="bar" style="width: {100 * (total or 0) / most if most else 0:.1f}%"></span>'
        count = "not counted" if total is None else f"{total:,}"
        parts = html(_parts(data.tokens[model]))
        rows.append(
            f'<tr><th scope="row">{html(model)}</th><td>{count}</td><td class="left bars">{bar}</td>'
            f'<td class="left parts">{parts}</td></tr>'
        )
    caption = "Input tokens that the fine-tunes behind each model saw. Merging needs none."
    return table(["model", "tokens", "", ""], rows, caption, "tokens")


def _parts(parts: dict[str, int | None]) -> str:
    if not parts:
        return "none: not trained here"
    probes = [count for title, count in parts.items() if title.startswith("probe ")]
    shown = {title: count for title, count in parts.items() if not title.startswith("probe ") or len(probes) < 2}
    if len(probes) > 1:
        known = [count for count in probes if count is not None]
        shown = {f"{len(probes)} probes": sum(known) if len(known) == len(probes) else None} | shown
    return ", ".join(f"{title} {'not counted' if count is None else f'{count:,}'}" for title, count in shown.items())


# ---- replies ---------------------------------------------------------------------------------------------------------


def replies(data: ReportData) -> str:
    """Sample replies of the models side by side; empty where nothing was generated or chosen."""
    if not data.samples:
        return ""
    note = "The first test rows of each task; none is picked. Probes of other tasks are left out."
    parts = [f'<p class="muted">{note}</p>']
    for task in dict.fromkeys(sample.task for sample in data.samples):
        shown = "".join(_sample(data, sample) for sample in data.samples if sample.task == task)
        parts.append(f"<h3>{html(task)}</h3>{shown}")
    return "".join(parts)


def _sample(data: ReportData, sample: Sample) -> str:
    boxes = [_box("expected", sample.expected, "expected", "")]
    for model in reversed(data.models):
        if model in sample.replies:
            text, score = sample.replies[model]
            kind = "last" if model == data.models[-1] else "reply"
            boxes.append(_box(model, text, kind, _mark(score)))
    return (
        f'<article class="sample"><pre class="prompt">{html(_cut(sample.prompt))}</pre>'
        f'<div class="replies">{"".join(boxes)}</div></article>'
    )


def _box(title: str, text: str, kind: str, mark: str) -> str:
    shown = html(_cut(text.strip())) or '<span class="muted">(nothing)</span>'
    return f'<div class="{kind}"><p><strong>{html(title)}</strong> {mark}</p><pre>{shown}</pre></div>'


def _mark(score: float | None) -> str:
    if score is None:
        return ""
    if score in (0.0, 1.0):
        kind, sign, name = ("up", "✓", "right") if score else ("down", "✗", "wrong")
        return f'<span class="{kind}" role="img" aria-label="{name}" title="{name}">{sign}</span>'
    return f'<span class="muted">{100 * score:.0f} %</span>'


def _cut(text: str) -> str:
    return text if len(text) <= _CUT else f"{text[:_CUT]}… [{len(text) - _CUT:,} more letters]"
