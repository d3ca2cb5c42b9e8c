"""The plots of a comparison, as SVG files that any page can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import rc_context

from cpift.evaluation.estimates import Estimate
from cpift.evaluation.measures import Forgetting
from cpift.report.html import Plot
from cpift.report.style import STYLE
from cpift.report.svg import MUTED, PLOT_STYLE, SERIES, as_svg, legend_label, new_figure, series_style
from cpift.text.escaping import one_line

_LONGEST = 36  # letters of a method's name beside the axis
_COLOURS = STYLE.partition("* {")[0].strip()  # the page's own names for ink and series, light and dark


def standalone(svg: str) -> str:
    """An inline figure as a file of its own, with the colours that a page would have given it."""
    style = f"<style>{_COLOURS} svg {{ font-family: system-ui, sans-serif; background: var(--paper); }}</style>"
    return svg.replace(">", f">{style}", 1) + "\n"


@rc_context(PLOT_STYLE)
def intervals(rows: Sequence[tuple[str, Estimate]], ours: str) -> Plot:
    """One line a method: its mean retention in percent and the interval; `ours` stands out, and its estimate is drawn
    across, dashed."""
    figure, axes = new_figure("methods", 5.0, 0.7 + 0.2 * len(rows))
    for place, (name, estimate) in enumerate(reversed(rows)):
        colour = SERIES[1] if name == ours else SERIES[0]
        if estimate.low is not None and estimate.high is not None:
            axes.hlines(place, 100 * estimate.low, 100 * estimate.high, color=colour, linewidth=1.6)
        axes.plot([100 * estimate.mean], [place], "D" if name == ours else "o", color=colour)
        if name == ours:
            axes.axvline(100 * estimate.mean, color=MUTED, linestyle="--", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(rows)), [_short(name) for name, _ in reversed(rows)])
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel("mean retention, % of the own probes")
    least, most = axes.get_xlim()
    axes.set_xlim(left=0 if least < most / 2 else least)
    svg = as_svg(figure, axes, "Mean retention of every method")
    return Plot(svg, ["method", "mean retention"], [[name, _text(estimate)] for name, estimate in rows])


def _short(name: str) -> str:
    name = one_line(name)
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…"


def _text(estimate: Estimate) -> str:
    ends = (
        ""
        if estimate.low is None or estimate.high is None
        else f" [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
    )
    return f"{100 * estimate.mean:.1f} %{ends}"


@rc_context(PLOT_STYLE)
def curve(
    field: str, points: Sequence[tuple[str, Estimate, Estimate]], references: Sequence[tuple[str, Estimate]]
) -> Plot:
    """Mean retention and worst task over a field's values, in percent; `references` are drawn across."""
    figure, axes = new_figure(field, 4.6, 2.9)
    series = {"mean retention": [mean for _, mean, _ in points], "worst task": [worst for _, _, worst in points]}
    for place, (label, estimates) in enumerate(series.items()):
        spots = [spot + 0.06 * (place - 0.5) for spot in range(len(points))]
        axes.plot(
            spots,
            [100 * estimate.mean for estimate in estimates],
            label=legend_label(label),
            color=SERIES[place],
            marker="os"[place],
        )
        for spot, estimate in zip(spots, estimates, strict=True):
            if estimate.low is not None and estimate.high is not None:
                axes.vlines(
                    spot, 100 * estimate.low, 100 * estimate.high, color=SERIES[place], linewidth=0.9, alpha=0.7
                )
    for place, (name, estimate) in enumerate(references):
        axes.axhline(
            100 * estimate.mean, color=SERIES[2 + place], linestyle="--", linewidth=1, label=legend_label(name)
        )
    axes.set_xticks(range(len(points)), [one_line(value) for value, _, _ in points])
    axes.set(xlabel=field, ylabel="%")
    svg = as_svg(figure, axes, f"Retention over {field}", 2 + len(references))
    return Plot(svg, [field, *series], [[value, _text(mean), _text(worst)] for value, mean, worst in points])


@rc_context(PLOT_STYLE)
def frontier(pair: tuple[str, str], lines: Mapping[str, Sequence[tuple[float, Forgetting]]], losses: bool) -> Plot:
    """ΔA against ΔB, one line a method over its learning rates. losses: one of the two is a loss, and both are shown as
    they are; else in points."""
    title, scale = f"{pair[0]} → {pair[1]}", 1 if losses else 100
    figure, axes = new_figure(title, 5.2, 3.6)
    rows = []
    for place, (label, points) in enumerate(lines.items()):
        drawn = [(scale * change.second.mean, scale * change.first.mean) for _, change in points]
        axes.plot(*zip(*drawn, strict=True), label=legend_label(label), **series_style(place))
        rows += [
            [label, f"{rate:g}", f"{kept:.3g}", f"{gained:.3g}"]
            for (rate, _), (gained, kept) in zip(points, drawn, strict=True)
        ]
    axes.axhline(0, color=MUTED, linestyle="--", linewidth=0.8, zorder=0)
    unit = "score or negated loss" if losses else "points"
    axes.set(xlabel=f"ΔB, {one_line(pair[1])} ({unit})", ylabel=f"ΔA, {one_line(pair[0])} ({unit})")
    svg = as_svg(figure, axes, f"ΔA against ΔB, {title}", len(lines))
    return Plot(svg, ["method", "learning rate", "ΔA", "ΔB"], rows)
