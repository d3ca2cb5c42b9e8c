"""Where each task's probe moved θ0: a table of layers and kinds of modules a task, shaded by how far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from cpift.method.changes import Change
from cpift.report.html import table
from cpift.report.tensor_names import KINDS, by_module
from cpift.text.escaping import html


class Move(TypedDict):
    """Of a layer (None: outside layers) and kind of module: L2 of the change ÷ the weights' (None where they are 0)."""

    layer: int | None
    module: str
    relative: float | None


def moves_of(tensors: Mapping[str, Change]) -> list[Move]:
    """What a page shows of the changes of a model's tensors."""
    modules = by_module(tensors).items()
    return [{"layer": layer, "module": kind, "relative": change.relative} for (layer, kind), change in modules]


def moves_tables(moves: Mapping[str, Sequence[Move]]) -> str:
    """A table a task, the first one open; empty where nothing is known."""
    shown: list[str] = []
    for task, rows in moves.items():
        caption = "L2 of the change, in % of the weights', by layer and kind of module; the darkest moved furthest."
        body = table(*_table(rows), caption, "heat")
        opened = "" if shown else " open"
        shown.append(f"<details{opened}><summary>Where the probe of {html(task)} moved θ0</summary>{body}</details>")
    return "".join(shown)


def _table(rows: Sequence[Move]) -> tuple[list[str], list[str]]:
    kinds = [kind for kind in KINDS if any(row["module"] == kind for row in rows)]
    cells = {(row["layer"], row["module"]): row["relative"] for row in rows}
    layers, known = list(dict.fromkeys(row["layer"] for row in rows)), set(cells)
    most = max((share for share in cells.values() if share), default=1.0)
    lines = []
    for layer in layers:
        shares = [_cell(cells[layer, kind], most) if (layer, kind) in known else "<td></td>" for kind in kinds]
        name = "–" if layer is None else str(layer)
        lines.append(f'<tr><th scope="row">{name}</th>{"".join(shares)}</tr>')
    return ["layer", *kinds], lines


def _cell(share: float | None, most: float) -> str:
    if share is None:
        return "<td>new</td>"
    shown = f"{100 * share:.0f}" if share >= 1 else f"{100 * share:.2g}"
    return f'<td style="background: rgba(var(--heat), {0.55 * share / most:.3f})">{shown}</td>'
