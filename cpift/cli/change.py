"""What a fine-tune changed: said (`cpift diff`), or as an adapter (`cpift extract-lora`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpift.console.terminal import Terminal, say
from cpift.errors import ConfigError, Problem

if TYPE_CHECKING:
    from rich.table import Table

    from cpift.checkpoints.lora_extraction import Extraction
    from cpift.method.changes import Change
    from cpift.model_diff import ModelDiff

_ROUNDING = 1e-5  # of factors in float32, as a share of the change
_EXPERTS = 10  # that are shown of a mixture
_SHOWN = 5  # modules of which an adapter lost most
_FIGURES: Mapping[str, tuple[str, Callable[[Change], str]]] = {
    "relative": ("L2 of the change, % of the weight's", lambda change: _percent(change.relative)),
    "changed": ("elements changed, %", lambda change: _percent(change.share)),
    "largest": ("largest |Δ|", lambda change: f"{change.largest:.2g}"),
}


def register(app: typer.Typer, panel: str) -> None:
    """Add the commands."""
    app.command(rich_help_panel=panel)(diff)
    app.command("extract-lora", rich_help_panel=panel)(extract_lora)


def diff(
    base: Annotated[str, typer.Argument(metavar="BASE", help="the model that it was tuned from: folder or hub id")],
    tuned: Annotated[
        str, typer.Argument(metavar="TUNED", help="the fine-tune, whole or a LoRA adapter: folder or hub id")
    ],
    show: Annotated[str, typer.Option("--show", help=f"what the table has: {', '.join(_FIGURES)}")] = "relative",
    vocabulary: Annotated[
        str, typer.Option("--vocabulary", help="base: compare the tokens that BASE has, where TUNED has others")
    ] = "error",
    as_json: Annotated[bool, typer.Option("--json", help="print everything, every tensor too, for programs")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="also write everything as JSON to this new file")] = None,
) -> None:
    """Say what a fine-tune changed: how many elements, the largest change, and its size beside the weights', by layer
    and module.

    Reads both models once, in slices, and changes nothing.
    """
    problems = []
    if show not in _FIGURES:
        problems.append(Problem("--show", f"is {show!r}", f"one of {', '.join(_FIGURES)}"))
    if out is not None and out.exists():
        problems.append(Problem("--out", f"{out} exists", "give a new file: nothing that exists is replaced"))
    elif out is not None and not out.absolute().parent.is_dir():
        problems.append(Problem("--out", f"there is no folder {out.absolute().parent}", "make it first"))
    if problems:
        raise ConfigError("diff", problems)
    from cpift.console.view import View, quiet
    from cpift.disk.files import write_json
    from cpift.model_diff import model_diff

    found = model_diff(base, tuned, vocabulary, quiet() if as_json else View())
    if out is not None:
        write_json(out, found.record())
    if as_json:
        say(json.dumps(found.record(), indent=1, ensure_ascii=False))
        return
    _print(found, show)


def _print(found: ModelDiff, show: str) -> None:
    from cpift.text.escaping import one_line

    whole = found.whole
    if not whole.changed:
        say(f"No element changed, of {whole.elements:,}")
        return
    name = next(name for name, change in found.tensors.items() if change.largest == whole.largest)
    say(f"{whole.changed:,} of {whole.elements:,} elements changed ({whole.share:.2%})")
    say(f"Largest |Δ|: {whole.largest:.3g}, in {one_line(name)}")
    say(f"L2 of the change: {whole.l2:.4g}, {_percent(whole.relative)} % of the weights'")
    Terminal().print(_table(found, show))
    if found.experts:
        _print_experts(found)


def _table(found: ModelDiff, show: str) -> Table:
    """A line a layer and a column a kind of module; the last lines are outside layers, and all together."""
    from rich.box import SIMPLE
    from rich.table import Table

    from cpift.report.tensor_names import KINDS

    title, shown = _FIGURES[show]
    kinds = [kind for kind in KINDS if any(kind == of for _, of in found.modules)]
    layers = list(dict.fromkeys(layer for layer, _ in found.modules))
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for name in ("layer", *kinds):
        table.add_column(name, justify="right")
    for layer in layers:
        cells = [found.modules.get((layer, kind)) for kind in kinds]
        table.add_row("–" if layer is None else str(layer), *("" if cell is None else shown(cell) for cell in cells))
    table.add_section()
    table.add_row("all", *(shown(found.of_kind(kind)) for kind in kinds))
    return table


def _print_experts(found: ModelDiff) -> None:
    """How many experts changed, and those that changed most."""
    from rich.box import SIMPLE
    from rich.table import Table

    from cpift.text.escaping import one_line

    moved = {expert: change for expert, change in found.experts.items() if change.changed}
    blocks = len({block for block, _ in found.experts})
    say(f"Experts: {len(moved)} of {len(found.experts)} changed, in {blocks} blocks")
    if not moved:
        return
    total = sum(change.l2**2 for change in moved.values())
    title = "experts that changed most: L2 as % of the weights', of all experts' L2² the share"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for name in ("expert", "", "L2, %", "changed, %", "largest |Δ|", "share, %"):
        table.add_column(name, justify="left" if name == "expert" else "right", no_wrap=True)
    for (block, number), change in sorted(moved.items(), key=lambda item: -item[1].l2)[:_EXPERTS]:
        cells = (shown(change) for _, shown in _FIGURES.values())
        table.add_row(one_line(block), str(number), *cells, _percent(change.l2**2 / total))
    Terminal().print(table)


def _percent(share: float | None) -> str:
    """Without a sign; `new` where the weight was 0."""
    if share is None:
        return "new"
    return f"{100 * share:.0f}" if share >= 1 else f"{100 * share:.3g}"


def extract_lora(
    base: Annotated[str, typer.Argument(metavar="BASE", help="the model that it was tuned from: folder or hub id")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="the fine-tune: folder or hub id")],
    out: Annotated[Path, typer.Option("--out", help="the adapter's folder, to be made")],
    rank: Annotated[int, typer.Option("--rank", help="of the factors of every linear layer and embedding")] = 32,
) -> None:
    """Write what a fine-tune changed as a LoRA adapter, and say what the rank lost of it.

    Of every changed weight the adapter holds the closest product of that rank (singular values); norms and biases that
    changed are kept whole. The error is that of the weights, not of what the model says: score it before you use it.
    """
    from cpift.adapter_folder import extract_into
    from cpift.console.view import View

    say_adapter(extract_into(base, tuned, out, rank, View()), out)


def say_adapter(extraction: Extraction, out: Path) -> None:
    """What an adapter holds, and what its rank lost."""
    from cpift.text.escaping import one_line

    if extraction.relative < _ROUNDING:
        say(f"{len(extraction.modules)} weights, of ranks up to {extraction.rank}: nothing is lost but rounding")
    elif extraction.modules:
        say(
            f"Rank {extraction.rank}: {len(extraction.modules)} weights, "
            f"of whose change {extraction.relative:.1%} is lost (norms)"
        )
        for module in sorted(extraction.modules, key=lambda module: -module.relative)[:_SHOWN]:
            say(f"  {module.relative:6.1%}  {one_line(module.module)} {list(module.shape)}")
    if extraction.whole:
        say(f"Kept whole: {len(extraction.whole)} norms, biases and others")
    say(f"Adapter: {out} (every module's error: extraction.json)")
