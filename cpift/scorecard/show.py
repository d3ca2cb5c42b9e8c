"""A scorecard for readers: a page, Markdown, JSON, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.table import Table

from cpift.disk.files import json_text
from cpift.evaluation.estimates import Estimate
from cpift.evaluation.metrics import described
from cpift.evaluation.retention import DEFINITION
from cpift.report.files import md_table
from cpift.report.html import document, plain_table
from cpift.report.index import SCORES, write_page
from cpift.scorecard.card import Scorecard, shown_share
from cpift.text.escaping import html, markdown

Shown = Callable[[Estimate, bool], str]  # of a figure that may be a loss
_HALVES = "± half of a 95 % interval over test rows. Losses are in nats per answer token: less is better."
_INTERVALS = "In brackets 95 % intervals over test rows; of losses, in nats per answer token, less is better."


def _interval(figure: Estimate, is_loss: bool) -> str:
    scale, digits = (1, 3) if is_loss else (100, 1)
    middle = f"{scale * figure.mean:.{digits}f}"
    if figure.low is None or figure.high is None:
        return middle
    return f"{middle} [{scale * figure.low:.{digits}f}, {scale * figure.high:.{digits}f}]"


def _half(figure: Estimate, is_loss: bool) -> str:
    scale, digits = (1, 3) if is_loss else (100, 1)
    if figure.low is None or figure.high is None:
        return f"{scale * figure.mean:.{digits}f}"
    half = max(figure.mean - figure.low, figure.high - figure.mean)
    return f"{scale * figure.mean:.{digits}f} ±{scale * half:.{digits}f}"


def write_card(card: Scorecard, folder: Path) -> Path:
    """Write the page, `scores.md` and `scores.json`; returns the page's path. Pages of earlier cards stay in `reports`.

    Raises ConfigError, and writes nothing, where one of the files is somebody's own.
    """
    return write_page(folder, SCORES, _page(card), {"scores.json": json_text(card.summary()), "scores.md": _md(card)})


def card_table(card: Scorecard) -> Table:
    """For the terminal, with half of each interval: where 0 or 1 cuts it, its longer half."""
    table = Table(title=card.name, box=box.SIMPLE_HEAD, pad_edge=False, caption=_HALVES)
    head, rows = _cells(card, _half)
    for place, name in enumerate(head):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _cells(card: Scorecard, shown: Shown = _interval) -> tuple[list[str], list[list[str]]]:
    """Head and rows: models, their figures on every test, and where there are own fine-tunes the mean retention."""
    first = card.scores[card.models[0]]
    head = ["model", *(f"{test}, {described(first[test]).title}" for test in card.tests)]
    head += ["mean retention"] if card.judged else []
    rows = []
    for model in card.models:
        row = [model, *(shown(card.measured(model, test), first[test]["score"] is None) for test in card.tests)]
        rows.append([*row, *([shown_share(card.retention(model))] if card.judged else [])])
    return head, rows


def card_section(card: Scorecard) -> str:
    """The table as HTML."""
    definition = f'<p class="muted">{html(DEFINITION)}</p>' if card.judged else ""
    return plain_table(*_cells(card), _INTERVALS) + definition


def card_md(card: Scorecard) -> str:
    """The table as Markdown."""
    head, rows = _cells(card)
    table = md_table(list(map(markdown, head)), [list(map(markdown, row)) for row in rows])
    return "\n\n".join([table, _INTERVALS, *([DEFINITION] if card.judged else [])])


def _page(card: Scorecard) -> str:
    first, *others = [*card.sentences(), *card.warnings()] or [""]
    listed = "".join(f"<li>{html(text)}</li>" for text in others)
    lead = f'<div class="verdict"><p class="headline">{html(first)}</p></div>' + (
        f"<ul>{listed}</ul>" if listed else ""
    )
    sections = {
        "scores": ("Scores", card_section(card)),
        "tests": ("Tests", "".join(f"<p>{html(text)}</p>" for text in card.tests.values())),
        SCORES.section: ("What was scored", f"<pre><code>{html(card.config.strip())}</code></pre>"),
    }
    return document(card.name, "scores", f"{len(card.models)} models on {len(card.tests)} tests", lead, sections)


def _md(card: Scorecard) -> str:
    said = "\n".join(f"- {markdown(text)}" for text in [*card.sentences(), *card.warnings()])
    parts = [f"# {markdown(card.name)}", said, card_md(card)]
    return "\n\n".join(part for part in parts if part) + "\n"
