"""The plots of a run's report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from cpift.report.html import Plot
from cpift.report.svg import MUTED, PLOT_STYLE, SERIES, as_svg, legend_label, new_figure, series_style
from cpift.report.tensor_names import KINDS, kind_of, layer_of

CoreRows = Mapping[str, Sequence[Mapping[str, Any]]]


@rc_context(PLOT_STYLE)
def density_by_layer(cores: CoreRows) -> Plot:
    """Share of each block's parameters that lies in each task's core."""
    shares = {task: _shares(rows, layer_of) for task, rows in cores.items()}
    layers = sorted({layer for share in shares.values() for layer in share})
    if not layers:
        return Plot()
    figure, axes = new_figure("density by layer", 4.6, 2.7)
    for place, (task, share) in enumerate(shares.items()):
        points = [(layer, 100 * share[layer]) for layer in layers if layer in share]
        axes.plot(*zip(*points, strict=True), label=legend_label(task), **series_style(place))
    axes.set(xlabel="layer", ylabel="core elements, % of the layer")
    axes.set_ylim(bottom=0)
    _whole_numbers(axes, layers)
    svg = as_svg(figure, axes, "Core density by layer", len(cores), "core of task")
    return Plot(svg, ["layer", *cores], [[str(layer), *_percents(shares, layer)] for layer in layers])


def _percents(shares: Mapping[str, Mapping[Any, float]], key: Any) -> list[str]:
    return [f"{100 * share[key]:.3g} %" if key in share else "–" for share in shares.values()]


@rc_context(PLOT_STYLE)
def density_by_kind(cores: CoreRows) -> Plot:
    """Share of each module kind's parameters that lies in each task's core."""
    shares = {task: _shares(rows, kind_of) for task, rows in cores.items()}
    kinds = [kind for kind in KINDS if any(kind in share for share in shares.values())]
    figure, axes = new_figure("density by kind", 4.6, 2.7)
    width = 0.8 / max(1, len(shares))
    for place, (task, share) in enumerate(shares.items()):
        left = [i - 0.4 + width * (place + 0.5) for i in range(len(kinds))]
        heights = [100 * share.get(kind, 0.0) for kind in kinds]
        axes.bar(
            left,
            heights,
            width * 0.9,
            label=legend_label(task),
            color=SERIES[place % 8],
            hatch="//" if place >= 8 else None,
        )
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel("core elements, % of the kind")
    svg = as_svg(figure, axes, "Core density by module kind", len(shares), "core of task")
    return Plot(svg, ["module kind", *cores], [[kind, *_percents(shares, kind)] for kind in kinds])


@rc_context(PLOT_STYLE)
def angle_histogram(slerp: Sequence[Mapping[str, Any]]) -> Plot:
    """How many (tensor, fold) pairs have which angle between the vectors that SLERP interpolates."""
    angles = [angle for row in slerp for angle in row.get("angles", ()) if angle > 0]
    if len(angles) < 2:
        return Plot()
    figure, axes = new_figure("angles", 4.6, 2.6)
    low, high = min(angles), max(angles)
    logarithmic = high / low > 20
    count = min(40, max(8, len(angles) // 8))
    step = (high / low) ** (1 / count) if logarithmic else (high - low) / count or 1.0
    edges = [low * step**i if logarithmic else low + step * i for i in range(count + 1)]
    counts, _, _ = axes.hist(angles, bins=[*edges[:-1], max(edges[-1], high)], color=SERIES[0], rwidth=0.92)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the default writes it for TeX
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="angle Ω, radians", ylabel="tensors × folds")
    rows = [[f"{edges[i]:.3g} to {edges[i + 1]:.3g}", f"{counts[i]:.0f}"] for i in range(count)]
    return Plot(as_svg(figure, axes, "Angles of SLERP"), ["angle Ω, radians", "tensors × folds"], rows)


@rc_context(PLOT_STYLE)
def angles_by_layer(slerp: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> Plot:
    """Median angle of each block's tensors, one line a fold; fold k takes in the k-th task's fine-tune."""
    by_layer: dict[int, dict[int, list[float]]] = {}
    for row in slerp:
        layer = layer_of(row["tensor"])
        for fold, angle in enumerate(row.get("angles", ()) if layer is not None else ()):
            by_layer.setdefault(fold, {}).setdefault(int(layer or 0), []).append(angle)
    if not by_layer:
        return Plot()
    middle = {fold: {layer: median(layers[layer]) for layer in sorted(layers)} for fold, layers in by_layer.items()}
    figure, axes = new_figure("angles by layer", 4.6, 2.6)
    for fold, points in middle.items():
        axes.plot(list(points), list(points.values()), label=legend_label(tasks[fold]), **series_style(fold))
    axes.set(xlabel="layer", ylabel="median angle Ω, radians")
    axes.set_ylim(bottom=0)
    _whole_numbers(axes, list(middle[0]))
    svg = as_svg(figure, axes, "Median angle by layer", len(by_layer), "fold of task")
    head = ["layer", *(tasks[fold] for fold in middle)]
    rows = [
        [str(layer), *(f"{points[layer]:.4g}" if layer in points else "–" for points in middle.values())]
        for layer in middle[0]
    ]
    return Plot(svg, head, rows)


@rc_context(PLOT_STYLE)
def training_curve(title: str, log: Sequence[Mapping[str, Any]], kind: str = "Training loss") -> Plot:
    """Losses of one fine-tune, of a kind. Each stage has other tasks, so the curve is broken where one begins; a dotted
    line and the stage's number stand there."""
    rows = [row for row in log if "loss" in row]
    if not rows:
        return Plot()
    figure, axes = new_figure(title, 3.2, 2.1)
    steps, starts = _running_steps(rows)
    style = series_style(0) | {"marker": "o" if len(rows) < 15 else None}
    stages = [row.get("stage") for row in rows]
    for stage in dict.fromkeys(stages):
        places = [place for place, at in enumerate(stages) if at == stage]
        axes.plot([steps[place] for place in places], [rows[place]["loss"] for place in places], **style)
    for start in starts[1:]:
        axes.axvline(start, color=MUTED, linestyle=":", linewidth=1)
    axes.margins(y=0.15)  # room for the stages' numbers
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    for stage, start in enumerate(starts if len(starts) > 1 else [], start=1):
        place = (start, 1.0)
        axes.annotate(f"{stage}", place, (3, 0), axes.get_xaxis_transform(), "offset points", color=MUTED, va="top")
    axes.set_title(title)
    axes.set(xlabel="optimizer step", ylabel="loss")
    numbers = {stage: f"{number}" for number, stage in enumerate(dict.fromkeys(stages), start=1)}
    table = [
        [numbers[index], f"{step}", f"{row['loss']:.4f}"] for index, step, row in zip(stages, steps, rows, strict=True)
    ]
    return Plot(as_svg(figure, axes, f"{kind} of {title}"), ["stage", "step", "loss"], table)


def _running_steps(rows: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Steps counted through all stages, and the step at which each stage begins; a log may count each from 0."""
    steps: list[int] = []
    starts: list[int] = []
    offset, stage = 0, None
    for row in rows:
        if row.get("stage") != stage:
            stage = row.get("stage")
            last = steps[-1] if steps else 0
            offset = last if row["step"] + offset <= last else offset
            starts.append(last)
        steps.append(row["step"] + offset)
    return steps, starts


def _shares(rows: Iterable[Mapping[str, Any]], key: Any) -> dict[Any, float]:
    """Core elements ÷ elements, summed over the tensors of one key; tensors without a key are left out."""
    totals: dict[Any, tuple[int, int]] = {}
    for row in rows:
        group = key(row["tensor"])
        if group is not None and row["numel"]:
            core, numel = totals.get(group, (0, 0))
            totals[group] = (core + row["core"], numel + row["numel"])
    return {group: core / numel for group, (core, numel) in totals.items()}


def _whole_numbers(axes: Axes, values: Sequence[int]) -> None:
    step = max(1, round(len(values) / 10))
    axes.set_xticks(values[::step])
