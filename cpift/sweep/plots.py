"""The plots of a sweep's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes

from cpift.evaluation.estimates import Estimate
from cpift.report.html import Plot
from cpift.report.svg import INK, MUTED, PLOT_STYLE, SERIES, as_svg, legend_label, new_figure, series_style
from cpift.sweep.scores import Overlaps, SweepData, TrialRow, judged, pareto_front, values_at
from cpift.text.escaping import one_line

_LONGEST = 34  # letters of a trial's name beside the axis


@rc_context(PLOT_STYLE)
def lines(data: SweepData, figure: str, x: str, by: str | None, ylabel: str) -> Plot:
    """A figure against one field, one line a value of another, named by the legend; bars are intervals over seeds."""
    drawing, axes = new_figure(f"{figure} {x} {by}", 4.6, 2.7)
    groups = data.space[by] if by is not None else [None]
    table: list[list[str]] = [[_text(value)] for value in data.space[x]]
    spots = _positions(data.space[x])
    for place, group in enumerate(groups):
        here = {by: group} if by is not None else {}
        every = [values_at(data, figure, {x: value} | here) for value in data.space[x]]
        for row, cell in zip(table, every, strict=True):
            row.append(interval_text(cell))
        drawn = [(spot, estimate) for spot, estimate in zip(spots, every, strict=True) if estimate is not None]
        if drawn:
            shift = (place - (len(groups) - 1) / 2) * 0.04  # so that bars do not hide each other
            label = None if by is None else _text(group)
            _line(axes, [spot + shift for spot, _ in drawn], [estimate for _, estimate in drawn], place, label)
    axes.set_xticks(spots, [_text(value) for value in data.space[x]])
    axes.set(xlabel=x, ylabel=ylabel)
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))  # no figure is negative
    count = len(axes.get_legend_handles_labels()[1])
    svg = as_svg(drawing, axes, f"{ylabel} against {x}", count, by)
    return Plot(svg, [x, *([ylabel] if by is None else [f"{by} = {_text(group)}" for group in groups])], table)


def interval_text(estimate: Estimate | None) -> str:
    """A figure and its interval, to read in a table."""
    if estimate is None:
        return "–"
    return f"{estimate.mean:.4g}" + (f" [{estimate.low:.4g}, {estimate.high:.4g}]" if estimate.low is not None else "")


@rc_context(PLOT_STYLE)
def trials(data: SweepData, most: int) -> Plot:
    """The first objective of the best trials, the best on top, with intervals over seeds. Dotted: θ0."""
    name, sign = data.objectives[0]
    drawn = [(trial, estimate) for trial in data.trials if (estimate := judged(data, trial, name)) is not None]
    ranked = sorted(drawn, key=lambda pair: -sign * pair[1].mean)[:most]
    if not ranked:
        return Plot()
    drawing, axes = new_figure("trials", 4.4, 0.8 + 0.2 * len(ranked))
    for place, (_, estimate) in enumerate(reversed(ranked)):
        color = SERIES[1] if place == len(ranked) - 1 else SERIES[0]
        if estimate.low is not None and estimate.high is not None:
            axes.hlines(place, estimate.low, estimate.high, color=color, linewidth=1.6)
        axes.plot([estimate.mean], [place], "D" if place == len(ranked) - 1 else "o", color=color)
    base = data.references.get("base", {}).get(name)
    if base is not None:
        axes.axvline(base.mean, color=MUTED, linestyle=":", linewidth=1, zorder=0)
        over = axes.get_xaxis_transform()
        axes.annotate("θ0", (base.mean, 1.0), (0, 2), over, "offset points", color=MUTED, ha="center", va="bottom")
    axes.set_yticks(range(len(ranked)), [_named(trial) for trial, _ in reversed(ranked)])
    axes.set_xlabel(name.replace("_", " "))
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    rows = [[_named(trial), interval_text(estimate)] for trial, estimate in ranked]
    return Plot(as_svg(drawing, axes, f"{name.replace('_', ' ')} of every trial"), ["trial", name], rows)


def _named(trial: TrialRow) -> str:
    """Its number and first point, each field by the last part of its name."""
    point = ", ".join(f"{name.rpartition('.')[2]} {_text(value)}" for name, value in trial.points[0].items())
    more = " …" if len(trial.points) > 1 else ""
    text = one_line(f"{trial.number}: {point}{more}")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _positions(values: Sequence[Any]) -> list[float]:
    return [float(i) for i in range(len(values))]


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(axes: Axes, x: Sequence[float], estimates: Sequence[Estimate], place: int, label: str | None) -> None:
    means = [estimate.mean for estimate in estimates]
    axes.plot(x, means, label=label and legend_label(label), **series_style(place))
    bars = [
        (at, estimate)
        for at, estimate in zip(x, estimates, strict=True)
        if estimate.low is not None and estimate.high is not None
    ]
    for at, estimate in bars:
        axes.vlines(at, estimate.low or 0.0, estimate.high or 0.0, color=SERIES[place % 8], linewidth=0.9, alpha=0.7)


@rc_context(PLOT_STYLE)
def dendrogram(overlaps: Overlaps) -> Plot:
    """Which τ merges which tasks: single linkage on Jaccard overlap, which is connected components at every τ at once.

    Dashed: chance, p/(2−p). Dotted: the τ that the sweep tried.
    """
    merges = single_linkage(overlaps.jaccard)
    drawing, axes = new_figure(overlaps.title, 3.4, 0.9 + 0.28 * len(overlaps.tasks))
    marks = [overlaps.chance, *overlaps.taus, *(level for level, _, _ in merges)]
    right = 1.12 * max(marks, default=1.0)
    order = leaf_order(merges, len(overlaps.tasks))
    spots: dict[frozenset[int], tuple[float, float]] = {
        frozenset([leaf]): (float(row), right) for row, leaf in enumerate(order)
    }
    for level, one, other in merges:
        (low, low_level), (high, high_level) = spots[one], spots[other]
        axes.plot([low_level, level, level, high_level], [low, low, high, high], color=SERIES[0], linewidth=1.4)
        spots[one | other] = ((low + high) / 2, level)
    for row, level in spots.values():
        if level == right and not merges:
            axes.plot([0, right], [row, row], color=SERIES[0])
    if merges:
        root, level = spots[frozenset(order)]
        axes.plot([0, level], [root, root], color=SERIES[0], linewidth=1.4)
    axes.axvline(overlaps.chance, color=MUTED, linestyle="--", linewidth=1)
    for tau in overlaps.taus:
        axes.axvline(tau, color=SERIES[1], linestyle=":", linewidth=1.1)
    axes.set_yticks(range(len(order)), [one_line(overlaps.tasks[leaf]) for leaf in order])
    axes.set_xlim(0, right)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.grid(False)
    axes.set_title(overlaps.title)
    axes.set_xlabel("Jaccard overlap")
    names = overlaps.tasks
    rows = [[f"{level:.4g}", ", ".join(names[i] for i in sorted(one | other))] for level, one, other in merges]
    svg = as_svg(drawing, axes, f"Which τ merges which tasks: {overlaps.title}")
    return Plot(svg, ["up to this τ", "are one group"], rows)


def single_linkage(jaccard: Sequence[Sequence[float]]) -> list[tuple[float, frozenset[int], frozenset[int]]]:
    """Merges from the highest overlap to the lowest: (level, members of one, members of the other)."""
    tasks = len(jaccard)
    pairs = sorted(((jaccard[i][j], i, j) for i in range(tasks) for j in range(i)), reverse=True)
    cluster = {i: frozenset([i]) for i in range(tasks)}
    merges = []
    for level, i, j in pairs:
        if cluster[i] != cluster[j]:
            merges.append((level, cluster[i], cluster[j]))
            joined = cluster[i] | cluster[j]
            cluster |= dict.fromkeys(joined, joined)
    return merges


def leaf_order(merges: Sequence[tuple[float, frozenset[int], frozenset[int]]], tasks: int) -> list[int]:
    """Leaves so ordered that no two branches cross."""
    order = {frozenset([i]): [i] for i in range(tasks)}
    for _, one, other in merges:
        order[one | other] = order[one] + order[other]
    return order[frozenset(range(tasks))] if merges else list(range(tasks))


@rc_context(PLOT_STYLE)
def pareto(data: SweepData) -> Plot:
    """Every finished trial in the plane of the first two objectives, and the front."""
    (first, sign), (second, _) = data.objectives[:2]
    drawing, axes = new_figure("pareto", 4.6, 3.2)
    spots = {
        trial.number: (one.mean, other.mean)
        for trial in data.trials
        if (one := judged(data, trial, first)) is not None and (other := judged(data, trial, second)) is not None
    }
    front = sorted((spots[trial.number] for trial in pareto_front(data)), key=lambda spot: sign * spot[0])
    across, up = zip(*spots.values(), strict=True)
    axes.scatter(across, up, color=SERIES[0], s=14, zorder=3)
    if len(data.objectives) == 2:
        axes.plot(*zip(*front, strict=True), color=SERIES[1], linewidth=1.4, zorder=2)
    on_front = {trial.number for trial in pareto_front(data)}
    for number, spot in spots.items():
        shade = INK if number in on_front else MUTED
        axes.annotate(f"{number}", spot, (4, 3), textcoords="offset points", color=shade, fontsize=8)
    axes.set(xlabel=first.replace("_", " "), ylabel=second.replace("_", " "))
    axes.grid(True, axis="both")
    axes.margins(0.08)
    rows = [
        [f"{number}{' on the front' * (number in on_front)}", f"{one:.4g}", f"{other:.4g}"]
        for number, (one, other) in spots.items()
    ]
    return Plot(as_svg(drawing, axes, "Trials by the first two objectives"), ["trial", first, second], rows)


@rc_context(PLOT_STYLE)
def parallel_coordinates(data: SweepData) -> Plot:
    """Every finished trial as a line through its fields' values to the first objective; the best ones stand out."""
    figure, sign = data.objectives[0]
    drawn = [(trial, estimate.mean) for trial in data.trials if (estimate := judged(data, trial, figure)) is not None]
    ranked = sorted(drawn, key=lambda pair: sign * pair[1])
    best = {trial.number for trial, _ in ranked[-max(1, len(ranked) // 5) :]}
    drawing, axes = new_figure("parallel coordinates", 8.0, 3.0)
    names = list(data.space)
    low, high = min(mean for _, mean in drawn), max(mean for _, mean in drawn)
    for trial, mean in ranked:
        height = (mean - low) / (high - low) if high > low else 0.5
        _coordinates(axes, data, names, trial, height, trial.number in best)
    _axis_labels(axes, data, names)
    axes.annotate(f"{high:.3f}", (len(names), 1), (4, 0), textcoords="offset points", color=MUTED, va="center")
    axes.annotate(f"{low:.3f}", (len(names), 0), (4, 0), textcoords="offset points", color=MUTED, va="center")
    axes.set_xticks(range(len(names) + 1), [*names, figure])
    axes.set_yticks([])
    axes.margins(x=0.08, y=0.06)
    axes.grid(True, axis="x")
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    rows = [
        [*(_text(point[name]) for name in names), f"{mean:.4g}"] for trial, mean in ranked for point in trial.points
    ]
    return Plot(as_svg(drawing, axes, "Every point and its first objective"), [*names, figure], rows[::-1])


def _height(values: Sequence[Any], value: Any) -> float:
    return values.index(value) / (len(values) - 1) if len(values) > 1 else 0.5


def _coordinates(axes: Axes, data: SweepData, names: Sequence[str], trial: TrialRow, height: float, best: bool) -> None:
    style: dict[str, Any] = (
        {"color": SERIES[1], "linewidth": 1.8, "zorder": 3} if best else {"color": SERIES[0], "alpha": 0.45}
    )
    for point in trial.points:
        spots = [_height(data.space[name], point[name]) for name in names]
        axes.plot(range(len(names) + 1), [*spots, height], **style)


def _axis_labels(axes: Axes, data: SweepData, names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        values = data.space[name]
        for value in values if len(values) <= 8 else (values[0], values[-1]):
            spot = (place, _height(values, value))
            axes.annotate(_text(value), spot, (4, 2), textcoords="offset points", color=MUTED, fontsize=8)
