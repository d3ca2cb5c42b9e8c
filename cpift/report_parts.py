"""What the pages of a run and of a sweep are put together from: the document, tables, figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cpift.escaping import html
from cpift.report_style import STYLE


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
    return (
        f'<div class="scroll"><table class="{kind}"><caption>{caption}</caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def figure(svg: str, caption: str) -> str:
    if not svg:
        return ""
    text = html(caption)
    return f'<figure><div role="img" aria-label="{text}">{svg}</div><figcaption>{text}</figcaption></figure>'


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
