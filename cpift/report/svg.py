"""Figures as inline SVG: text stays text, and colours are CSS variables, so a page can be light or dark."""

from __future__ import annotations

import io
import re
import warnings
from math import ceil
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from cpift.text.escaping import html, one_line, terminal

# Stand-ins that the SVG is searched for: ink, muted ink, grid, and eight series colours (Okabe and Ito's, told apart
# by readers with any colour vision; lighter on a dark page).
INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = tuple(f"#0400{i:02x}" for i in range(8))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {color: f"s{i}" for i, color in enumerate(SERIES)}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
_LONGEST = 26  # letters of an entry in a legend
_LINE = 0.18  # inches of a legend's line
_LETTERS = 13  # of a legend that fit into an inch
PLOT_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def new_figure(salt: str, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.set_gid(salt)
    return figure, figure.subplots()


def series_style(place: int) -> dict[str, Any]:
    return {"color": SERIES[place % 8], "marker": _MARKERS[place % 8], "linestyle": "-" if place < 8 else "--"}


def legend_label(name: str) -> str:
    """Cut where it is long; matplotlib leaves names that begin with `_` out of a legend."""
    name = one_line(name)
    name = name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
    return f"\N{THIN SPACE}{name}" if name.startswith("_") else name


def _columns(figure: Figure, axes: Axes) -> int:
    """How many entries of a legend stand beside each other, so that none leaves the figure."""
    labels = axes.get_legend_handles_labels()[1]
    room = _LETTERS * figure.get_figwidth() / (max(map(len, labels), default=0) + 6)  # 6: the sign and the space
    return max(1, min(len(labels), 4, int(room)))


def as_svg(figure: Figure, axes: Axes, title: str, legend: int = 1, of: str | None = None) -> str:
    """The figure as an SVG element that scales with the page, with CSS variables for colours and no stray ids.

    `title` is what it is called to those who do not see it; `of` is what the entries of its legend are values of.
    """
    if legend > 1:
        columns = _columns(figure, axes)
        figure.set_figheight(figure.get_figheight() + _LINE * (ceil(legend / columns) - 1))
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=columns,
            borderaxespad=0.2,
            title=of,
            title_fontsize=8.5,
            alignment="left",
        )
    axes.tick_params(length=0)
    for text in figure.findobj(Text):
        text.set_text(one_line(text.get_text()))
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": str(figure.get_gid())}), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # of letters that its own font lacks: text is drawn by the reader's
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    box = re.search(r'viewBox="[^"]*"', buffer.getvalue())
    body = re.search(r"<svg[^>]*>(.*)</svg>", buffer.getvalue(), flags=re.DOTALL)
    assert box is not None
    assert body is not None
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body.group(1), flags=re.DOTALL)
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    name = f"<title>{html(one_line(title))}</title>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box.group()} role="img">{name}{terminal(svg)}</svg>'
