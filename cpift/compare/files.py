"""A comparison as files and as a table for the terminal. Every number comes from the record."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from cpift.compare.findings import Findings
from cpift.compare.plots import curve, frontier, intervals, standalone
from cpift.compare.record import OURS, Record, record_text
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
    count,
    curve_points,
    curve_references,
    curve_rows,
    differences,
    drawn_methods,
    fields_of_curves,
    forgets,
    forgetting,
    half,
    listed,
    one_seed,
    primary,
    reading,
    set_up,
)
from cpift.compare.words import points
from cpift.disk.top_files import write_top
from cpift.evaluation.estimates import Estimate
from cpift.evaluation.retention import sentences
from cpift.report.files import csv_text, md_table
from cpift.report.html import Plot
from cpift.text.escaping import markdown, one_line

_NAME = "comparison"
RUN_FILE = "comparison-run.yaml"  # the run of all methods: its commands write weights that were only scored


def written_files(curves: Iterable[str], pairs: Iterable[tuple[str, str]] = ()) -> tuple[str, ...]:
    """What `write_comparison` may write where these fields have curves, and tasks arrive in these pairs."""
    fixed = (f"{_NAME}.jsonl", f"{_NAME}.html", f"{_NAME}.md", f"{_NAME}.csv", f"{_NAME}-methods.svg")
    arriving = (_curve_file(_NAME, _arrival_name(pair)) for pair in pairs)
    return (*fixed, *(_curve_file(_NAME, field) for field in curves), *arriving)


def write_comparison(record: Record, folder: Path) -> Path:
    """The record, a page, the same as Markdown with the plots that it shows, and a table; returns the page's path.

    Raises ConfigError where one of the files is somebody's own.
    """
    from cpift.compare.page import comparison_page

    findings = Findings(record)
    text, plots = _document(findings, _NAME, 2)
    page = f"{_NAME}.html"
    texts = {
        **plots,
        f"{_NAME}.jsonl": record_text(record),
        f"{_NAME}.md": f"# {markdown(record.header.name)}\n\n{text}",
        f"{_NAME}.csv": methods_csv(findings),
        page: comparison_page(findings),
    }
    write_top(folder, texts)
    return folder / page


def document(record: Record, prefix: str, level: int = 2) -> tuple[str, dict[str, str]]:
    """The text, and its plots by file name; `prefix` begins those names, `level` is that of the headings."""
    return _document(Findings(record), prefix, level)


def _document(findings: Findings, prefix: str, level: int) -> tuple[str, dict[str, str]]:
    plots: dict[str, str] = {}
    heading = "#" * level
    said = [f"- {_sentence(findings, text)}" for text in findings.verdict()]
    lines = []
    if findings.primary:
        lines += [f"{heading} Primary contrasts", "", _listing(primary(findings, markdown)), "", PRIMARY, ""]
    lines += [f"{heading} What it shows", "", *said, "", _reading(findings), ""]
    if shown := drawn_methods(findings):
        lines += _picture(plots, f"{prefix}-methods.svg", "Mean retention of every method", intervals(shown, OURS))
    lines += [f"{heading} Set-up", "", *(f"- {text}" for text in set_up(findings.record, markdown)), ""]
    lines += [f"{heading} All methods", "", _table(all_methods(findings, markdown, _strong)), ""]
    for ours in findings.recipes:
        name = f"{ours}," if "," in ours else ours
        lines += [f"{heading} {name} against each method", "", _listing(differences(findings, ours, markdown)), ""]
    if findings.frontiers.pairs:
        lines += [f"{heading} Tasks that arrive", "", ARRIVAL, "", *_arrival(findings, plots, prefix), ""]
    if findings.pairs:
        forgotten = [line for text in forgets(findings, markdown) for line in ("", text)]
        lines += [f"{heading} Forgetting", "", FORGETTING, "", _listing(forgetting(findings, markdown)), *forgotten, ""]
    for field, values in fields_of_curves(findings).items():
        lines += [f"{heading} Over {markdown(field)}", "", *_curve(findings, field, values, plots, prefix), ""]
    return "\n".join(lines).rstrip() + "\n", plots


def _reading(findings: Findings) -> str:
    warning = one_seed(findings)
    return f"{reading(findings)} **{warning}**" if warning else reading(findings)


def _strong(name: str) -> str:
    return f"**{name}**"


def _picture(plots: dict[str, str], file: str, title: str, plot: Plot) -> list[str]:
    plots[file] = standalone(plot.svg)
    return [f"![{markdown(title)}]({file})", ""]


def _sentence(findings: Findings, text: str) -> str:
    """With the names in it as Markdown shows them; the sentences themselves hold no signs of it."""
    for name in sorted(findings.methods, key=len, reverse=True):
        text = text.replace(name, markdown(name))
    return text


# ---- tables ----------------------------------------------------------------------------------------------------------


def _table(table: TextTable) -> str:
    """Figures to the right, and a row for each kind of method."""
    rows: list[Sequence[str]] = []
    for place, cells in enumerate(table.rows):
        if place in table.kinds:
            rows.append([f"*{table.kinds[place]}*"] + [""] * (len(table.head) - 1))
        rows.append(cells)
    return md_table(table.head, rows)


def _listing(table: TextTable) -> str:
    return md_table(table.head, table.rows, right=())


def _curve(findings: Findings, field: str, values: Sequence[Any], plots: dict[str, str], prefix: str) -> Iterator[str]:
    drawn = curve(field, curve_points(findings, field, values), curve_references(findings))
    yield from _picture(plots, _curve_file(prefix, field), f"Retention over {field}", drawn)
    table = curve_rows(findings, field, values, markdown)
    yield md_table(table.head, table.rows, right=(1, 2))


def _arrival(findings: Findings, plots: dict[str, str], prefix: str) -> Iterator[str]:
    for pair in findings.frontiers.pairs:
        drawn = frontier(pair, arrival_lines(findings, pair), by_losses(findings, pair))
        file = _curve_file(prefix, _arrival_name(pair))
        yield from _picture(plots, file, f"ΔA against ΔB, {pair[0]} → {pair[1]}", drawn)
    if (equal := at_equal_gain(findings, markdown)).rows:
        yield from (_listing(equal), "")
    yield _listing(arrival(findings, markdown))


def _arrival_name(pair: tuple[str, str]) -> str:
    return f"arrival {pair[0]} {pair[1]}"


def _curve_file(prefix: str, field: str) -> str:
    return f"{prefix}-{re.sub('[^a-z0-9]+', '-', field.lower())}.svg"


def methods_csv(findings: Findings) -> str:
    """One line a method: its figures, each with its interval. Retentions and scores from 0 to 1, losses in nats."""
    tasks = list(findings.record.header.tasks)
    names = ["mean retention", "worst task's retention", *tasks]
    bounds = [f"{name}{part}" for name in names for part in ("", " low", " high")]
    lines = map(findings.line, findings.methods)
    rows = [
        [line.method, line.kind, *_bounds(line.mean, line.worst, *line.scores.values()), line.tokens, line.seconds]
        for line in lines
    ]
    return csv_text(["method", "kind", *bounds, "tokens", "seconds"], rows)


def _bounds(*estimates: Estimate) -> list[float | None]:
    return [value for estimate in estimates for value in (estimate.mean, estimate.low, estimate.high)]


def first_sentences(record: Record) -> list[str]:
    """What has to be said before the table: of tasks that their own probes did not learn."""
    return sentences(Findings(record).learning)


def comparison_table(record: Record) -> Table:
    """The comparison for the terminal."""
    findings = Findings(record)
    table = Table(
        title=f"{record.header.name}: seeds {listed(record.header.seeds)}", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("method")
    for column in ("mean retention", "worst task", f"less {OURS}, points", "tokens"):
        table.add_column(column, justify="right")
    for name in findings.methods:
        if findings.kind(name) != "probe":
            line = findings.line(name)
            less = "" if name == OURS or not findings.has(OURS) else points(findings.against(name, OURS).mean)
            style = "bold" if name == OURS else ""
            table.add_row(name, half(line.mean), half(line.worst), less, count(line.tokens), style=style)
    return table


def arrival_table(record: Record) -> Table | None:
    """What was kept and learnt by tasks that arrived, for the terminal; None where none did."""
    shown = arrival(Findings(record), one_line)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in shown.head:
        table.add_column(column)
    for row in shown.rows:
        table.add_row(*row)
    return table if shown.rows else None
