"""`cpift push`: a model and its card on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cpift.console.terminal import say


def register(app: typer.Typer, panel: str) -> None:
    """Add the command."""
    app.command(rich_help_panel=panel)(push)


def push(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_FOLDER", help="a finished run's output folder, a model's or an adapter's")
    ],
    to: Annotated[str, typer.Option("--to", metavar="ORG/NAME", help="the repository on the hub")],
    public: Annotated[
        bool, typer.Option("--public", help="whoever finds it may read it; without this only you")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be sent, ask nobody")] = False,
) -> None:
    """Send a run's last model (or a model folder) to the Hugging Face hub, with a card that says what it is.

    The card has base models, data sets, license and every task's score with its interval; beside it go the run's file
    (of paths only their last part) and the sha256 of every file. A new repository is private. Files that others put
    into a repository are never replaced.
    """
    from cpift.publish import publication, publish
    from cpift.text.units import show_size

    planned = publication(source, to)
    for name, content in planned.files.items():
        size = len(content.encode()) if isinstance(content, str) else content.stat().st_size
        say(f"  {show_size(size):>10}  {name}")
    if dry_run:
        say(f"Would be sent to {to} ({'public' if public else 'private'}): {show_size(planned.nbytes)}. The card:")
        say(planned.card)
        return
    say(f"Sending {show_size(planned.nbytes)} to {to} …")
    say(f"Sent: {publish(planned, private=not public)}")
