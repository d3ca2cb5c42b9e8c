"""What a person sees of a run's progress: lines of text for a width and a height, of a record alone.

The run itself shows them, and `cpift watch` from another process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from cpift.console.progress import Done, Piece, Progress
from cpift.text.escaping import one_line

_NARROWEST_BAR = 8
_WIDEST_BAR = 40


def duration(seconds: float) -> str:
    """`8 s`, `4 min 05 s`, `2 h 10 min`, `3 d 4 h`."""
    total = max(int(seconds), 0)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02} s"
    return (
        f"{total // 3600} h {total % 3600 // 60:02} min"
        if total < 86400
        else f"{total // 86400} d {total % 86400 // 3600} h"
    )


def screen(progress: Progress, width: int, height: int, now: float) -> list[Text]:
    """At most `height` lines of at most `width` cells: where the run is, what is waited for, a bar for each piece."""
    lines = [_headline(progress, width, now)]
    if progress.waiting:
        waited = duration(now - progress.waiting_since)
        lines.append(Text(f"  {one_line(progress.waiting)} … {waited}", "yellow"))
    room = max(height - len(lines) - 1, 1)
    lines += _bars(progress, width, room)
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def done_line(done: Done) -> Text:
    """Of a step that has ended."""
    detail = (
        "(cached)" if done.seconds is None else f"{done.seconds:.1f} s" if done.seconds < 60 else duration(done.seconds)
    )
    return Text.assemble(("✓", "green"), f" {one_line(done.title)}", (f" {detail}", "dim"))


def summary(progress: Progress, now: float) -> str:
    """One line for a log: how far the step is, and each piece that moves."""
    parts = [one_line(progress.step or progress.command)]
    if progress.pieces:
        parts.append(_percent(progress.share))
    if (left := progress.left(now)) is not None:
        parts.append(f"about {duration(left)} left")
    if progress.waiting:
        parts.append(f"{one_line(progress.waiting)} … {duration(now - progress.waiting_since)}")
    moving = [piece for piece in progress.pieces.values() if 0 < piece.done < 1]
    parts += [
        f"{one_line(piece.title)} {' '.join([_percent(piece.done), *details(piece.message)])}" for piece in moving[:6]
    ]
    return ", ".join(parts) + (f", and {len(moving) - 6} more" if len(moving) > 6 else "")


def details(message: Mapping[str, Any]) -> list[str]:
    """What else a message of a worker says, the most telling first."""
    parts = []
    loss = message.get("loss")
    if isinstance(loss, int | float) and math.isfinite(loss):
        parts.append(f"loss {loss:.3f}")
    if "task" in message:
        parts.append(one_line(str(message["task"])))
    if "step" in message:
        parts.append(f"step {message['step']}/{message.get('steps', '?')}")
    if message.get("stages", 1) != 1:
        parts.append(f"stage {int(message.get('stage', 0)) + 1}/{message['stages']}")
    return parts


def _percent(share: float) -> str:
    return f"{math.floor(share * 100)} %"


def _headline(progress: Progress, width: int, now: float) -> Text:
    """With what is left of it only as far as the width allows."""
    what = one_line(progress.step or progress.command) or "starting"
    elapsed, left = duration(now - progress.started), progress.left(now)
    place = f"{progress.place}: " if progress.place and progress.step else ""
    wide = [f"{elapsed} elapsed", *([f"about {duration(left)} left in this step"] if left is not None else [])]
    narrow = [elapsed, *([f"{duration(left)} left"] if left is not None else [])]
    for times in (wide, narrow):
        line = Text.assemble(("▸ ", "cyan"), f"{place}{what}", (" · " + " · ".join(times), "dim"))
        if line.cell_len <= width:
            return line
    shorter = f"{progress.place.removeprefix('step ').replace(' of ', '/')} " if place else ""
    return Text.assemble(("▸ ", "cyan"), f"{shorter}{what}", (" · " + " · ".join(narrow), "dim"))


def _bars(progress: Progress, width: int, room: int) -> Iterator[Text]:
    """Those under way first; where there is no room for all, a line counts the rest."""
    pieces = sorted(progress.pieces.values(), key=lambda piece: (not 0 < piece.done < 1, piece.done == 1))
    shown = pieces if len(pieces) <= room else pieces[: room - 1]
    titles = max((cell_len(one_line(piece.title)) for piece in shown), default=0)
    titles = min(titles, max(width // 3, 12))
    widest = max((sum(cell_len(part) + 2 for part in _details(piece)) for piece in shown), default=0)
    free = width - titles - len("    100 %")  # for the bar and what is told
    length = min(max(free - max(widest, 16), _NARROWEST_BAR), _WIDEST_BAR)
    for piece in shown:
        yield _bar(piece, titles, length, width)
    if rest := pieces[len(shown) :]:
        ended = sum(piece.done == 1 for piece in rest)
        moving = sum(0 < piece.done < 1 for piece in rest)
        yield Text(
            f"  and {len(rest)} more: {moving} under way, {ended} done, {len(rest) - moving - ended} to come", "dim"
        )


def _details(piece: Piece) -> list[str]:
    return [] if piece.done == 1 else details(piece.message) or ["waiting"] * (piece.done == 0)


def _bar(piece: Piece, titles: int, length: int, width: int) -> Text:
    title = Text(one_line(piece.title))
    title.truncate(titles, overflow="ellipsis", pad=True)
    filled = int(piece.done * length)
    line = Text("  ").append_text(title).append(" ").append("━" * filled, "green" if piece.done == 1 else "cyan")
    line.append("─" * (length - filled), "dim").append(f" {_percent(piece.done):>5}")
    for part in _details(piece):  # the most telling first, as many as fit
        if line.cell_len + 2 + cell_len(part) > width:
            break
        line.append(f"  {part}", "dim")
    return line
