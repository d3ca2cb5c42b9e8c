"""Where in a model its probes moved it and its cores lie: by layer and kind of module, and expert by expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypedDict

from cpift.method.changes import Change
from cpift.method.experts import Expert, ExpertCore, shared_mass
from cpift.report.html import table
from cpift.report.tensor_names import KINDS, by_module
from cpift.text.escaping import html

_SHOWN = 12  # experts with most core elements; `summary.json` has all
EXPERTS = (
    "In %: the share of an expert's elements that is core, and in brackets the share of the task's core elements in "
    "all experts that lie in it."
)
EXPERTS_SHARED = (
    "How alike two cores spread over the experts: Σ min(a, b), a and b the shares of their core elements in all "
    "experts that lie in one of them. 1: alike, as random cores do; 0: other experts."
)


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


# ---- experts ---------------------------------------------------------------------------------------------------------


class ExpertRow(TypedDict):
    """An expert: what stands before `experts` in names, its number, its elements, and of these each task's core."""

    block: str
    expert: int
    elements: int
    core: dict[str, int]


def expert_rows(cores: Mapping[str, Mapping[Expert, ExpertCore]]) -> list[ExpertRow]:
    """Every expert; cores: by task, of the same experts."""
    first = next(iter(cores.values()), {})
    return [
        {
            "block": block,
            "expert": number,
            "elements": whole.elements,
            "core": {task: found[block, number].core for task, found in cores.items()},
        }
        for (block, number), whole in first.items()
    ]


def touched_sentences(rows: Sequence[ExpertRow], tasks: Sequence[str]) -> Iterator[str]:
    """How many experts each task's core touches, and how many hold half of its elements in experts."""
    for task in tasks if rows else ():
        counts = sorted((row["core"][task] for row in rows), reverse=True)
        touched, total, held, half = sum(count > 0 for count in counts), sum(counts), 0, 0
        while 2 * held < total:
            held, half = held + counts[half], half + 1
        most = f"; {half} of them hold{'s' * (half == 1)} half of its elements in experts" if total else ""
        yield f"The core of {task} touches {touched} of {len(rows)} experts{most}."


def most_touched(rows: Sequence[ExpertRow], tasks: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Head and lines: the experts with most core elements, and of each task what `EXPERTS` says."""
    totals = {task: sum(row["core"][task] for row in rows) for task in tasks}
    chosen = sorted((row for row in rows if any(row["core"].values())), key=lambda row: -max(_shares(row, totals)))
    lines = []
    for row in chosen[:_SHOWN]:
        cells = (
            f"{100 * row['core'][task] / row['elements']:.2g} ({100 * row['core'][task] / (totals[task] or 1):.2g})"
            for task in tasks
        )
        lines.append([f"{row['block']} {row['expert']}", *cells])
    return ["expert", *tasks], lines


def _shares(row: ExpertRow, totals: Mapping[str, int]) -> list[float]:
    return [row["core"][task] / (total or 1) for task, total in totals.items()]


def overlap_of(rows: Sequence[ExpertRow], tasks: Sequence[str]) -> list[list[str]]:
    """A line a task: of every task what `EXPERTS_SHARED` says."""
    cores = {
        task: {(row["block"], row["expert"]): ExpertCore(row["elements"], row["core"][task]) for row in rows}
        for task in tasks
    }
    shared = {(a, b): shared_mass(cores[a], cores[b]) for a in tasks for b in tasks}
    shown = {pair: "–" if value is None else f"{value:.3f}" for pair, value in shared.items()}
    return [[task, *(shown[task, other] for other in tasks)] for task in tasks]


def experts_html(rows: Sequence[ExpertRow], tasks: Sequence[str]) -> str:
    """Sentences and the table of the experts that are touched most; empty of a model without experts."""
    if not rows:
        return ""
    said = "".join(f"<p>{html(sentence)}</p>" for sentence in touched_sentences(rows, tasks))
    head, lines = most_touched(rows, tasks)
    return said + _experts_table(head, lines, f"The experts with the largest shares of a core. {EXPERTS}")


def overlap_html(rows: Sequence[ExpertRow], tasks: Sequence[str]) -> str:
    """The overlap of cores over experts; empty of a model without experts, or with one task."""
    if not rows or len(tasks) < 2:
        return ""
    return _experts_table(["task", *tasks], overlap_of(rows, tasks), EXPERTS_SHARED)


def _experts_table(head: Sequence[str], lines: Sequence[Sequence[str]], caption: str) -> str:
    rows = (
        f'<tr><th scope="row">{html(first)}</th>{"".join(f"<td>{html(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in lines
    )
    return table([html(name) for name in head], list(rows), caption)
