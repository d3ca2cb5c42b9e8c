"""What the pages of a run and of a sweep are put together from: the document, tables, figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cpift.report.style import STYLE
from cpift.text.escaping import html

_WIDE, _WIDEST = 8, 14  # columns


@dataclass(frozen=True)
class Plot:
    """A figure and the table of what it shows, all as text. False where there is nothing to show."""

    svg: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()

    def __bool__(self) -> bool:
        return bool(self.svg)


def document(name: str, kind: str, subtitle: str, lead: str, sections: Mapping[str, tuple[str, str]]) -> str:
    """A whole page. `subtitle`, `lead` and the sections' bodies are HTML; `sections`: anchor → title and body."""
    links = " ".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in sections.items())
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{text}</section>' for key, (title, text) in sections.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html(name)}: {kind}</title><style>{STYLE}</style></head><body>"
        f'<header><h1>{html(name)}</h1><p class="muted">{subtitle}</p><nav>{links}</nav></header>'
        f"<main>{lead}{body}</main></body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[str], caption: str, kind: str = "") -> str:
    columns = "".join(f'<th scope="col"{" class=left" if i == 0 else ""}>{cell}</th>' for i, cell in enumerate(head))
    width = " widest" if len(head) > _WIDEST else " wide" if len(head) > _WIDE else ""  # smaller where it is printed
    title = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}{width}">{title}'
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def plain_table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", kind: str = "") -> str:
    """A table of text: the first column names its row."""
    shown = []
    for first, *others in rows:
        cells = "".join(f"<td>{html(cell)}</td>" for cell in others)
        shown.append(f'<tr><th scope="row">{html(first)}</th>{cells}</tr>')
    return table(list(map(html, head)), shown, html(caption), kind)


def figure(plot: Plot, caption: str) -> str:
    """A plot, what it shows in words, and the table behind it; empty where there is no plot."""
    if not plot:
        return ""
    behind = plain_table(plot.head, plot.rows)
    return (
        f"<figure>{plot.svg}<figcaption>{html(caption)}</figcaption>"
        f'<details class="behind"><summary>the figures</summary>{behind}</details></figure>'
    )


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
