"""Every report of an output folder: one page a configuration in `reports`, and an index that tells them apart.

The page at the top of the folder is a copy of the newest. What lay there from before is kept before it is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpift.disk.files import digest
from cpift.disk.top_files import REPORTS, is_ours, unmarked, write_top
from cpift.report.html import document, table
from cpift.text.escaping import html, text_of
from cpift.untrusted.json import UnreadableError
from cpift.untrusted.yaml import parse_yaml

_SHOWN = 12  # fields that differ; more are counted


@dataclass(frozen=True)
class ReportKind:
    """A kind of report: its page's name at the top of a folder, less `.html`, and the section with its config."""

    stem: str
    section: str


RUN, SWEEP, SCORES = ReportKind("report", "config"), ReportKind("sweep", "sweep"), ReportKind("scores", "models")


@dataclass(frozen=True)
class PastReport:
    """One page of `reports`."""

    file: Path
    title: str
    subtitle: str  # HTML
    config: str


def write_page(folder: Path, kind: ReportKind, page: str, others: dict[str, str]) -> Path:
    """Write a page and the files beside it to the top of a folder, keep the page, and list all that are kept.

    Raises ConfigError, and writes nothing, where one of the files at the top is somebody's own.
    """
    top = folder / f"{kind.stem}.html"
    before = unmarked(top) if is_ours(top) else None
    write_top(folder, {**others, top.name: page})
    newest = [_keep(folder / REPORTS, kind, text) for text in (before, page) if text is not None][-1]
    write_top(folder, {"index.html": _index(folder, newest)})
    return top


def _keep(folder: Path, kind: ReportKind, page: str) -> Path:
    """Keep a page under the name of its configuration; a file that is somebody's own stays, and is passed by."""
    key = digest(_config(page, kind.section).strip())[:12]
    names = (f"{kind.stem}-{key}{suffix}.html" for suffix in ("", *(f"-{number}" for number in range(2, 100))))
    name = next(name for name in names if not (folder / name).exists() or is_ours(folder / name))
    if not (folder / name).exists() or unmarked(folder / name) != page:
        write_top(folder, {name: page})
    return folder / name


def _config(page: str, section: str) -> str:
    match = re.search(rf'<section id="{section}">.*?<pre><code>(.*?)</code></pre>', page, re.DOTALL)
    return text_of(match[1]) if match else ""


def _index(folder: Path, newest: Path) -> str:
    reports = [report for kind in (RUN, SWEEP, SCORES) for report in _kept(folder / REPORTS, kind)]
    reports.sort(key=lambda report: (report.file != newest, -report.file.stat().st_mtime_ns, report.file.name))
    rows = [
        f'<tr><th scope="row"><a href="{REPORTS}/{html(report.file.name)}">{html(report.title)}</a></th>'
        f'<td class="left">{report.subtitle}</td><td class="left">{html(_differences(report, reports[0]))}</td></tr>'
        for report in reports
    ]
    caption = "One report a configuration; the newest first. Fields: as there, and in brackets as in the newest."
    shown = table(["report", "what", "fields that differ from the newest"], rows, caption)
    count = f"{len(reports)} report{'s' if len(reports) > 1 else ''}"
    return document(folder.name, "CPI-FT reports", count, "", {"reports": ("Reports", shown)})


def _kept(folder: Path, kind: ReportKind) -> Iterator[PastReport]:
    for file in folder.glob(f"{kind.stem}-*.html"):
        if is_ours(file):
            page = unmarked(file)
            title, subtitle = (re.search(tag, page, re.DOTALL) for tag in (_TITLE, _SUBTITLE))
            yield PastReport(
                file,
                text_of(title[1]) if title else file.stem,
                subtitle[1] if subtitle else "",
                _config(page, kind.section),
            )


_TITLE, _SUBTITLE = r"<title>(.*?)</title>", r'<header><h1>.*?</h1><p class="muted">(.*?)</p>'


def _differences(report: PastReport, newest: PastReport) -> str:
    if report is newest:
        return "newest"
    mine, theirs = _flat(report.config), _flat(newest.config)
    names = [name for name in dict.fromkeys([*mine, *theirs]) if mine.get(name) != theirs.get(name)]
    parts = [f"{name} {mine.get(name, '–')} ({theirs.get(name, '–')})" for name in names[:_SHOWN]]
    return "; ".join(parts + ([f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []))


def _flat(config: str) -> dict[str, Any]:
    """The fields of a configuration by dotted name."""
    try:
        return dict(_leaves(parse_yaml(config), ""))
    except UnreadableError:
        return {}


def _leaves(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        yield name, node
    else:
        for key, value in items:
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
