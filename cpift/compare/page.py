"""A comparison as one HTML page in the design of a run's report: nothing loaded from elsewhere, no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cpift.compare.findings import Findings
from cpift.compare.plots import curve, frontier, intervals
from cpift.compare.record import OURS
from cpift.compare.tables import (
    ARRIVAL,
    FORGETTING,
    PRIMARY,
    TextTable,
    all_methods,
    arrival,
    arrival_lines,
    at_equal_gain,
    by_losses,
    curve_points,
    curve_references,
    curve_rows,
    differences,
    drawn_methods,
    fields_of_curves,
    forgets,
    forgetting,
    listed,
    one_seed,
    primary,
    reading,
    set_up,
)
from cpift.report.html import document, figure, table
from cpift.text.escaping import html

_SAID = 6  # sentences that are shown at once


def comparison_page(findings: Findings) -> str:
    """The whole document."""
    first, *others = findings.verdict() or ["Nothing was compared."]
    warning = one_seed(findings)
    note = f'<p class="warning"><strong>Note.</strong> {html(warning)}</p>' if warning else ""
    bars = f"bars are {100 * findings.record.header.confidence:g} % intervals"
    caption = f"Mean retention of every method; {bars}. Dashed: {OURS}."
    shown_methods = drawn_methods(findings)
    drawn = f'<div class="narrow">{figure(intervals(shown_methods, OURS), caption)}</div>' if shown_methods else ""
    sections = {
        "primary": ("Primary contrasts", _primary(findings)),
        "picture": ("Every method", f'{drawn}{note}{_folded(others)}<p class="muted">{html(reading(findings))}</p>'),
        "methods": ("All figures", _methods(findings)),
        "against": ("Against each method", _against(findings)),
        "arrival": ("Tasks that arrive", _arrival(findings)),
        "forgetting": ("Forgetting", _forgetting(findings)),
        "curves": ("Over fields", _curves(findings)),
        "setup": ("Set-up", _list(set_up(findings.record, str))),
    }
    shown = {key: pair for key, pair in sections.items() if pair[1]}
    lead = f'<div class="verdict"><p class="headline">{html(first)}</p></div>'
    return document(findings.record.header.name, "CPI-FT comparison", _subtitle(findings), lead, shown)


def _subtitle(findings: Findings) -> str:
    header = findings.record.header
    seeds = f"seed{'s' * (len(header.seeds) > 1)} {listed(header.seeds)}"
    tasks = f"{len(header.tasks)} task{'s' * (len(header.tasks) > 1)}"
    return f"CPI-FT comparison · {len(findings.methods)} methods · {tasks} · {seeds}"


def _list(sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{html(text)}</li>" for text in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _folded(sentences: Sequence[str]) -> str:
    """A list whose end folds away: with many methods there are dozens, and tables show the same."""
    rest = sentences[_SAID:]
    more = f"<details><summary>{len(rest)} more</summary>{_list(rest)}</details>" if rest else ""
    return _list(sentences[:_SAID]) + more


def _rows(shown: TextTable, caption: str, kind: str = "") -> str:
    """A table whose cells are HTML already."""
    lines = []
    for place, (first, *others) in enumerate(shown.rows):
        if place in shown.kinds:
            lines.append(
                f'<tr class="kind"><th scope="colgroup" colspan="{len(shown.head)}">{shown.kinds[place]}</th></tr>'
            )
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        last = ' class="final"' if "<strong>" in first else ""
        lines.append(f'<tr{last}><th scope="row">{first}</th>{cells}</tr>')
    return table(shown.head, lines, caption, kind)


def _methods(findings: Findings) -> str:
    caption = "Scores in % of the metric, losses in nats per answer token; ± half of the interval."
    return _rows(all_methods(findings, html, lambda name: f"<strong>{html(name)}</strong>"), caption, "scores")


def _against(findings: Findings) -> str:
    parts = [
        f"<h3>{html(ours)}</h3>{_rows(differences(findings, ours, html), 'Above zero it is better.')}"
        for ours in findings.recipes
    ]
    return "".join(parts)


def _primary(findings: Findings) -> str:
    return _rows(primary(findings, html), PRIMARY) if findings.primary else ""


def _forgetting(findings: Findings) -> str:
    if not findings.pairs:
        return ""
    return f"<p>{html(FORGETTING)}</p>{_rows(forgetting(findings, html), '')}{_list(forgets(findings, str))}"


def _arrival(findings: Findings) -> str:
    if not findings.frontiers.pairs:
        return ""
    parts = [f"<p>{html(ARRIVAL)}</p>"]
    for pair in findings.frontiers.pairs:
        drawn = frontier(pair, arrival_lines(findings, pair), by_losses(findings, pair))
        parts.append(f"<h3>{html(f'{pair[0]} → {pair[1]}')}</h3>")
        parts.append(
            figure(drawn, "ΔA against ΔB. One line a method, one point a learning rate; up and right is better.")
        )
    equal = at_equal_gain(findings, html)
    parts.append(_rows(equal, "Points; of losses hundredths of a nat.") if equal.rows else "")
    parts.append(f"<details><summary>Every point</summary>{_rows(arrival(findings, html), '')}</details>")
    return "".join(parts)


def _curves(findings: Findings) -> str:
    parts = []
    for field, values in fields_of_curves(findings).items():
        drawn = curve(field, curve_points(findings, field, values), curve_references(findings))
        shown = figure(drawn, f"Mean retention and worst task over {field}. Bars: intervals.")
        table = _rows(curve_rows(findings, field, values, html), "")
        parts.append(f'<h3>{html(field)}</h3><div class="pair"><div>{shown}</div><div>{table}</div></div>')
    return "".join(parts)
