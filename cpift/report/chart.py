"""The picture that a report begins with: what every model keeps of every fine-tune, one panel a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes

from cpift.report.files import share
from cpift.report.html import Plot
from cpift.report.svg import MUTED, PLOT_STYLE, SERIES, as_svg, new_figure
from cpift.text.escaping import one_line

_LONGEST = 20  # letters of a model's name beside the axis
_FURTHEST = 170.0  # percent
_NEAR = 0.16  # of the axis: two labels above it that are nearer would lie on each other


@dataclass(frozen=True)
class Retained:
    """What one model keeps, as a share of the own probe's score, and half of its interval where that is known."""

    share: float
    half: float | None = None

    @property
    def text(self) -> str:
        return share(self.share, self.half)


@dataclass(frozen=True)
class Marker:
    """How a kind of model is drawn."""

    colour: str
    marker: str
    filled: bool = True


LAST = Marker(SERIES[1], "D")
MADE = Marker(SERIES[0], "o")
BESIDE = Marker(SERIES[2], "s")
REFERENCE = Marker(MUTED, "o", filled=False)


@rc_context(PLOT_STYLE)
def kept_panel(title: str, shares: Mapping[str, Retained], looks: Mapping[str, Marker], right: float) -> Plot:
    """One line a model, the last one on top: its retention in percent, from 0 to `right`, and the interval. Dashed: the
    own probe, 100 %. Dotted: θ0, where `shares` has "base"."""
    figure, axes = new_figure(f"kept {title}", 3.5, 0.72 + 0.19 * len(shares))
    for place, (model, retained) in enumerate(shares.items()):
        look = looks[model]
        if 100 * retained.share > right:
            spot = (right, place)
            axes.annotate(f"{100 * retained.share:.0f} % ▸", spot, color=look.colour, ha="right", va="center")
            continue
        if retained.half is not None:
            low, high = max(0.0, retained.share - retained.half), retained.share + retained.half
            axes.hlines(place, 100 * low, 100 * high, color=look.colour, linewidth=1.6)
        face = look.colour if look.filled else "none"
        axes.plot([100 * retained.share], [place], look.marker, color=look.colour, markerfacecolor=face, clip_on=False)
    _references(axes, shares.get("base"), right)
    axes.set_yticks(range(len(shares)), [_short(model) for model in shares])
    axes.tick_params(axis="y", pad=6)  # a mark at 0 lies half beside the axis
    axes.set_ylim(-0.7, len(shares) - 0.3)
    axes.set_xlim(0, right)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    figure.suptitle(_short(title, 26), x=0.01, ha="left", fontsize=9.5)  # the axes may be too narrow for either
    axes.set_xlabel("% of the own probe", loc="right")
    axes.set_title(" ", fontsize=7)  # room for the names of the lines
    rows = [[model, retained.text] for model, retained in reversed(list(shares.items()))]
    return Plot(as_svg(figure, axes, f"Retention on {title}"), ["model", "retention"], rows)


def _references(axes: Axes, base: Retained | None, right: float) -> None:
    lines = {"probe": (100.0, "--", "center")}
    if base is not None and 100 * base.share <= right:
        at = 100 * base.share
        below, above = ("right", "left") if at <= 100 else ("left", "right")
        sides = (below, above) if abs(at - 100) < _NEAR * right else ("center", "center")
        lines = {"θ0": (at, ":", sides[0]), "probe": (100.0, "--", sides[1])}
    for name, (at, style, side) in lines.items():
        axes.axvline(at, color=MUTED, linestyle=style, linewidth=1, zorder=0)
        place, over = (at, 1.0), axes.get_xaxis_transform()
        axes.annotate(name, place, (0, 2), over, "offset points", color=MUTED, ha=side, va="bottom", fontsize=8)


def right_end(shares: Sequence[Retained]) -> float:
    """Where axes that show all these end, in percent. What is far above a probe would leave the others no room: its
    place is beyond the end, and the panel says how far."""
    largest = max([1.0, *(retained.share for retained in shares)])
    ends = max([0.0, *(retained.share + (retained.half or 0.0) for retained in shares)])
    return min(_FURTHEST, 100 * max(1.1, 1.05 * largest, min(1.03 * ends, 1.4 * largest)))


def _short(name: str, most: int = _LONGEST) -> str:
    name = one_line(name)
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"
