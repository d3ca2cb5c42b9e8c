"""The plots of a run's report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes

from cpift.report_svg import MUTED, PLOT_STYLE, SERIES, as_svg, legend_label, new_figure, series_style
from cpift.tensor_names import KINDS, kind_of, layer_of

Cores = Mapping[str, Sequence[Mapping[str, Any]]]


@rc_context(PLOT_STYLE)
def density_by_layer(cores: Cores) -> str:
    """Share of each block's parameters that lies in each task's core."""
    layers = sorted(
        {layer for rows in cores.values() for row in rows if (layer := layer_of(row["tensor"])) is not None}
    )
    if not layers:
        return ""
    figure, axes = new_figure("density by layer", 5.2, 2.9)
    for place, (task, rows) in enumerate(cores.items()):
        shares = _shares(rows, layer_of)
        points = [(layer, 100 * shares[layer]) for layer in layers if layer in shares]
        axes.plot(*zip(*points, strict=True), label=legend_label(task), **series_style(place))
    axes.set(xlabel="layer", ylabel="core elements, % of the layer")
    _whole_numbers(axes, layers)
    return as_svg(figure, axes, legend=len(cores))


@rc_context(PLOT_STYLE)
def density_by_kind(cores: Cores) -> str:
    """Share of each module kind's parameters that lies in each task's core."""
    shares = {task: _shares(rows, kind_of) for task, rows in cores.items()}
    kinds = [kind for kind in KINDS if any(kind in share for share in shares.values())]
    figure, axes = new_figure("density by kind", 5.2, 2.9)
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
    return as_svg(figure, axes, legend=len(shares))


@rc_context(PLOT_STYLE)
def angle_histogram(slerp: Sequence[Mapping[str, Any]]) -> str:
    """How many (tensor, fold) pairs have which angle between the vectors that SLERP interpolates."""
    angles = [angle for row in slerp for angle in row.get("angles", ()) if angle > 0]
    if len(angles) < 2:
        return ""
    figure, axes = new_figure("angles", 5.2, 2.7)
    low, high = min(angles), max(angles)
    logarithmic = high / low > 20
    count = min(40, max(8, len(angles) // 8))
    step = (high / low) ** (1 / count) if logarithmic else (high - low) / count or 1.0
    edges = [low * step**i if logarithmic else low + step * i for i in range(count + 1)]
    axes.hist(angles, bins=[*edges[:-1], max(edges[-1], high)], color=SERIES[0], rwidth=0.92)
    if logarithmic:
        axes.set_xscale("log")
    axes.set(xlabel="angle Ω, radians", ylabel="tensors × folds")
    return as_svg(figure, axes)


@rc_context(PLOT_STYLE)
def angles_by_layer(slerp: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """Median angle of each block's tensors, one line a fold; fold k takes in the k-th task's fine-tune."""
    found: dict[int, dict[int, list[float]]] = {}
    for row in slerp:
        layer = layer_of(row["tensor"])
        for fold, angle in enumerate(row.get("angles", ()) if layer is not None else ()):
            found.setdefault(fold, {}).setdefault(int(layer or 0), []).append(angle)
    if not found:
        return ""
    figure, axes = new_figure("angles by layer", 5.2, 2.7)
    for fold, layers in found.items():
        points = [(layer, median(layers[layer])) for layer in sorted(layers)]
        axes.plot(*zip(*points, strict=True), label=legend_label(tasks[fold]), **series_style(fold))
    axes.set(xlabel="layer", ylabel="median angle Ω, radians")
    _whole_numbers(axes, sorted(found[0]))
    return as_svg(figure, axes, legend=len(found))


@rc_context(PLOT_STYLE)
def training_curve(title: str, log: Sequence[Mapping[str, Any]]) -> str:
    """Training loss of one fine-tune; a dotted line and the stage's number where a stage begins."""
    rows = [row for row in log if "loss" in row]
    if not rows:
        return ""
    figure, axes = new_figure(title, 3.2, 2.1)
    steps, starts = _running_steps(rows)
    axes.plot(steps, [row["loss"] for row in rows], **series_style(0) | {"marker": "o" if len(rows) < 15 else None})
    for start in starts[1:]:
        axes.axvline(start, color=MUTED, linestyle=":", linewidth=1)
    axes.margins(y=0.15)  # room for the stages' numbers
    axes.set_xlim(left=0)
    for stage, start in enumerate(starts if len(starts) > 1 else [], start=1):
        place = (start, 1.0)
        axes.annotate(f"{stage}", place, (3, 0), axes.get_xaxis_transform(), "offset points", color=MUTED, va="top")
    axes.set_title(title)
    axes.set(xlabel="optimizer step", ylabel="loss")
    return as_svg(figure, axes)


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
