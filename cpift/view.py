"""What a person sees of a run: one line a finished stage, bars for what is under way.

On a terminal the bars are live; elsewhere (a log file, CI) progress is a line every few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from cpift.terminal import Terminal

_LOG_SECONDS = 15.0


class View:
    """Reports stages and progress to a console."""

    running: ClassVar[list[str]] = []  # stages of this process that are under way, and those that are done
    finished: ClassVar[list[str]] = []

    def __init__(self, console: Terminal | None = None):
        self.console = console or Terminal(stderr=True)
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}
        self._said = 0.0

    def note(self, text: str) -> None:
        self.console.print(text)

    def cached(self, title: str) -> None:
        self._print("✓", "green", title, "(cached)")

    def warn(self, text: str) -> None:
        self._print("!", "yellow", text)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Announce a stage, give it bars, and say how long it took."""
        started = time.monotonic()
        self._print("▸", "cyan", f"{title} …")
        live = self.console.is_terminal
        self._progress = _bars(self.console) if live else None
        self._bars, self._said = {}, started
        if self._progress:
            self._progress.start()
        View.running.append(title)
        try:
            yield
        finally:
            if self._progress:
                self._progress.stop()
            self._progress = None
        View.running.remove(title)
        View.finished.append(title)
        self._print("✓", "green", title, f"{time.monotonic() - started:.1f} s")

    def _print(self, sign: str, colour: str, text: str, detail: str = "") -> None:
        self.console.print(Text.assemble((sign, colour), f" {text}", (f" {detail}" if detail else "", "dim")))

    def finish(self, title: str) -> None:
        """Take away the bar of work that has ended, where many pieces follow each other within one stage."""
        bar = self._bars.pop(title, None)
        if self._progress is not None and bar is not None:
            self._progress.remove_task(bar)

    def progress(self, message: dict[str, Any]) -> None:
        """A message of a worker: `title`, `done` in 0..1, and what else there is to say (loss, step, task)."""
        detail = _detail(message)
        if self._progress is not None:
            bar = self._bars.get(message["title"])
            if bar is None:
                bar = self._bars[message["title"]] = self._progress.add_task(message["title"], total=1.0, detail="")
            self._progress.update(bar, completed=message["done"], detail=detail)
        elif time.monotonic() - self._said > _LOG_SECONDS:
            self._said = time.monotonic()
            self.console.print(f"  {message['title']}: {message['done']:.0%} {detail}")


def quiet() -> View:
    """A view that shows nothing."""
    return View(Terminal(quiet=True))


def _bars(console: Terminal) -> Progress:
    return Progress(
        TextColumn("  {task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
        console=console,
        transient=True,
    )


def _detail(message: dict[str, Any]) -> str:
    parts = []
    if message.get("stages", 1) > 1:
        parts.append(f"stage {message['stage'] + 1}/{message['stages']}")
    if "step" in message:
        parts.append(f"step {message['step']}/{message['steps']}")
    if message.get("loss") is not None:
        parts.append(f"loss {message['loss']:.3f}")
    if "task" in message:
        parts.append(str(message["task"]))
    return ", ".join(parts)
