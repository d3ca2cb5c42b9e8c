"""The report's plots as inline SVG: text stays text, and colours are CSS variables, so a page can be light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cpift.tensor_names import KINDS, kind_of, layer_of

Cores = Mapping[str, Sequence[Mapping[str, Any]]]

# Stand-ins that the SVG is searched for: ink, muted ink, grid, and eight series colours (Okabe and Ito's, told apart
# by readers with any colour vision; lighter on a dark page).
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_SERIES = tuple(f"#0400{i:02x}" for i in range(8))
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "grid"} | {color: f"s{i}" for i, color in enumerate(_SERIES)}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@rc_context(_STYLE)
def density_by_layer(cores: Cores) -> str:
    """Share of each block's parameters that lies in each task's core."""
    layers = sorted(
        {layer for rows in cores.values() for row in rows if (layer := layer_of(row["tensor"])) is not None}
    )
    if not layers:
        return ""
    figure, axes = _figure("density by layer", 5.2, 2.9)
    for place, (task, rows) in enumerate(cores.items()):
        shares = _shares(rows, layer_of)
        points = [(layer, 100 * shares[layer]) for layer in layers if layer in shares]
        axes.plot(*zip(*points, strict=True), label=task, **_series(place))
    axes.set(xlabel="layer", ylabel="core elements, % of the layer")
    _whole_numbers(axes, layers)
    return _finished(figure, axes, legend=len(cores))


@rc_context(_STYLE)
def density_by_kind(cores: Cores) -> str:
    """Share of each module kind's parameters that lies in each task's core."""
    shares = {task: _shares(rows, kind_of) for task, rows in cores.items()}
    kinds = [kind for kind in KINDS if any(kind in share for share in shares.values())]
    figure, axes = _figure("density by kind", 5.2, 2.9)
    width = 0.8 / max(1, len(shares))
    for place, (task, share) in enumerate(shares.items()):
        left = [i - 0.4 + width * (place + 0.5) for i in range(len(kinds))]
        heights = [100 * share.get(kind, 0.0) for kind in kinds]
        axes.bar(left, heights, width * 0.9, label=task, color=_SERIES[place % 8], hatch="//" if place >= 8 else None)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel("core elements, % of the kind")
    return _finished(figure, axes, legend=len(shares))


@rc_context(_STYLE)
def angle_histogram(slerp: Sequence[Mapping[str, Any]]) -> str:
    """How many (tensor, fold) pairs have which angle between the vectors that SLERP interpolates."""
    angles = [angle for row in slerp for angle in row.get("angles", ()) if angle > 0]
    if len(angles) < 2:
        return ""
    figure, axes = _figure("angles", 5.2, 2.7)
    low, high = min(angles), max(angles)
    logarithmic = high / low > 20
    count = min(40, max(8, len(angles) // 8))
    step = (high / low) ** (1 / count) if logarithmic else (high - low) / count or 1.0
    edges = [low * step**i if logarithmic else low + step * i for i in range(count + 1)]
    axes.hist(angles, bins=[*edges[:-1], max(edges[-1], high)], color=_SERIES[0], rwidth=0.92)
    if logarithmic:
        axes.set_xscale("log")
    axes.set(xlabel="angle Ω, radians", ylabel="tensors × folds")
    return _finished(figure, axes)


@rc_context(_STYLE)
def angles_by_layer(slerp: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """Median angle of each block's tensors, one line a fold; fold k takes in the k-th task's fine-tune."""
    found: dict[int, dict[int, list[float]]] = {}
    for row in slerp:
        layer = layer_of(row["tensor"])
        for fold, angle in enumerate(row.get("angles", ()) if layer is not None else ()):
            found.setdefault(fold, {}).setdefault(int(layer or 0), []).append(angle)
    if not found:
        return ""
    figure, axes = _figure("angles by layer", 5.2, 2.7)
    for fold, layers in found.items():
        points = [(layer, median(layers[layer])) for layer in sorted(layers)]
        axes.plot(*zip(*points, strict=True), label=tasks[fold], **_series(fold))
    axes.set(xlabel="layer", ylabel="median angle Ω, radians")
    _whole_numbers(axes, sorted(found[0]))
    return _finished(figure, axes, legend=len(found))


@rc_context(_STYLE)
def training_curve(title: str, log: Sequence[Mapping[str, Any]]) -> str:
    """Training loss of one fine-tune; a dotted line and the stage's number where a stage begins."""
    rows = [row for row in log if "loss" in row]
    if not rows:
        return ""
    figure, axes = _figure(title, 3.2, 2.1)
    steps, starts = _running_steps(rows)
    axes.plot(steps, [row["loss"] for row in rows], **_series(0) | {"marker": "o" if len(rows) < 15 else None})
    for start in starts[1:]:
        axes.axvline(start, color=_MUTED, linestyle=":", linewidth=1)
    axes.margins(y=0.15)  # room for the stages' numbers
    axes.set_xlim(left=0)
    for stage, start in enumerate(starts if len(starts) > 1 else [], start=1):
        place = (start, 1.0)
        axes.annotate(f"{stage}", place, (3, 0), axes.get_xaxis_transform(), "offset points", color=_MUTED, va="top")
    axes.set_title(title)
    axes.set(xlabel="optimizer step", ylabel="loss")
    return _finished(figure, axes)


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


def _figure(salt: str, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.set_gid(salt)
    return figure, figure.subplots()


def _series(place: int) -> dict[str, Any]:
    return {"color": _SERIES[place % 8], "marker": _MARKERS[place % 8], "linestyle": "-" if place < 8 else "--"}


def _whole_numbers(axes: Axes, values: Sequence[int]) -> None:
    step = max(1, round(len(values) / 10))
    axes.set_xticks(values[::step])


def _finished(figure: Figure, axes: Axes, legend: int = 1) -> str:
    """The figure as an SVG element that scales with the page, with CSS variables for colours and no stray ids."""
    if legend > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=min(legend, 4), borderaxespad=0.2)
    axes.tick_params(length=0)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": str(figure.get_gid())}):  # ids of clip paths must differ between figures of a page
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
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box.group()} aria-hidden="true">{svg}</svg>'
