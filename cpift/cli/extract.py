"""`cpift extract-lora`: a fine-tune's change as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cpift.console.terminal import say

_SHOWN = 5


def register(app: typer.Typer, panel: str) -> None:
    """Add the command."""
    app.command("extract-lora", rich_help_panel=panel)(extract_lora)


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
    from cpift.text.escaping import one_line

    extraction = extract_into(base, tuned, out, rank, View())
    if extraction.modules:
        say(
            f"Rank {extraction.rank}: {len(extraction.modules)} weights, "
            f"of whose change {extraction.relative:.1%} is lost (norms)"
        )
        for module in sorted(extraction.modules, key=lambda module: -module.relative)[:_SHOWN]:
            say(f"  {module.relative:6.1%}  {one_line(module.module)} {list(module.shape)}")
    if extraction.whole:
        say(f"Kept whole: {len(extraction.whole)} norms and biases")
    say(f"Adapter: {out} (every module's error: extraction.json)")
