"""What a person sees of a run: a line for each step that ended, and one live part for what is under way.

On a terminal the live part is drawn anew four times a second, from before the first step on; elsewhere (a log file, CI,
NO_COLOR) every change is a line with its time, and what takes long is said again. The same is kept in the output folder
for `cpift watch` (see `progress.py`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from rich.console import Group
from rich.live import Live
from rich.text import Text

from cpift.console.progress import Done, Piece, Progress, ProgressMessage, write_progress
from cpift.console.screen import done_line, screen, summary
from cpift.console.terminal import Terminal
from cpift.text.redaction import redacted

_LOG_SECONDS = 15.0  # between lines of a log while one step goes on
_WRITE_SECONDS = 2.0  # between two writes of the record
_QUIET_WORDS = ("", "0", "false", "no")


class View:
    """Reports steps and progress to a console, and into the folder of a run."""

    running: ClassVar[list[str]] = []  # steps of this process that are under way, and those that are done
    finished: ClassVar[list[str]] = []
    _open: ClassVar[list[View]] = []

    def __init__(self, console: Terminal | None = None):
        self.console = console or Terminal(stderr=True)
        self.state = Progress(started=time.time())
        self.live = is_live(self.console)
        self._live: Live | None = None
        self._folder: Path | None = None
        self._said = self._written = 0.0
        self._unwritable = False
        self._writing = threading.Lock()

    # ---- for how long ----------------------------------------------------------------------------------------------

    @contextmanager
    def screen(self) -> Iterator[None]:
        """Show what is under way until the block ends; nested use is free."""
        if self in View._open or (self.console.quiet and self._folder is None):
            yield
            return
        View._open.append(self)
        stop = threading.Event()
        threading.Thread(target=self._tick, args=(stop,), name="cpift-view", daemon=True).start()
        try:
            yield
        finally:
            stop.set()
            self._hide()
            View._open.remove(self)

    @contextmanager
    def recorded(self, folder: Path, command: str, expected: Sequence[str] = ()) -> Iterator[None]:
        """Keep the record of a command in its output folder, which the caller holds."""
        self.state.command, self.state.expected, self._folder = command, list(expected), folder
        with self.screen():
            self._write()
            try:
                yield
            except BaseException as error:
                self._end("failed" if isinstance(error, Exception) else "stopped", str(error))
                raise
            self._end("finished")

    @staticmethod
    def leave() -> None:
        """The process is about to end from outside its `with` blocks: give the terminal back, and say so."""
        for view in View._open:
            with suppress(Exception):
                view._hide()
                view._end("stopped")

    # ---- what happens ----------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        self._print(Text(redacted(text)))

    def cached(self, title: str) -> None:
        self._ended(Done(title, None))

    def warn(self, text: str) -> None:
        self._print(Text.assemble(("!", "yellow"), f" {redacted(text)}"))

    def waiting(self, what: str) -> None:
        """Say what is being waited for, until something else happens."""
        self.state.waiting, self.state.waiting_since = redacted(what), time.time()
        self._show()
        if not self.live:
            self._print(Text(f"  {self.state.waiting} …"))

    @contextmanager
    def stage(self, title: str, pieces: Sequence[str] = ()) -> Iterator[None]:
        """Announce a step, show its pieces, and say how long it took. pieces: titles of those that are to come."""
        started = time.time()
        self._begin(title, pieces, started)
        View.running.append(title)
        with self.screen():
            self._show()
            yield
            self._begin("", (), time.time())
        View.running.remove(title)
        View.finished.append(title)
        self._ended(Done(title, time.time() - started))

    def finish(self, title: str) -> None:
        """Take away the bar of work that has ended, where many pieces follow each other within one step."""
        self.state.pieces = {name: piece for name, piece in self.state.pieces.items() if name != title}

    def progress(self, message: ProgressMessage) -> None:
        """A message of a worker: `title`, `done` in 0..1, and what else there is to say (loss, step, task); or
        `waiting`, for what everything waits."""
        if "waiting" in message:
            self.waiting(message["waiting"])
            return
        state, title = self.state, message["title"]
        state.pieces = state.pieces | {title: Piece(title, message["done"], message)}
        state.waiting = ""
        state.first_moved = state.first_moved or time.time()
        if not self.live and time.time() - self._said > _LOG_SECONDS:
            self._log()

    # ---- how it is shown -------------------------------------------------------------------------------------------

    def _begin(self, title: str, pieces: Sequence[str], now: float) -> None:
        state = self.state
        state.step, state.step_started, state.first_moved, state.waiting = title, now, 0.0, ""
        state.pieces = {name: Piece(name) for name in pieces}
        if title and not self.live:
            place = f" ({state.place})" if state.place else ""
            self._print(Text.assemble(("▸", "cyan"), f" {title}{place} …"))

    def _ended(self, done: Done) -> None:
        self.state.waiting = ""
        self.state.done.append(done)
        self._print(done_line(done))
        self._write()

    def _print(self, line: Text) -> None:
        self._said = time.time()
        if self.live:
            self.console.print(line)
        else:
            self.console.print(Text(f"{time.strftime('%H:%M:%S')} ").append_text(line), soft_wrap=True)

    def _show(self) -> None:
        if self.live and self._live is None and self in View._open:
            self._live = Live(console=self.console, transient=True, get_renderable=self._screen)
            self._live.start(refresh=True)

    def _hide(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _screen(self) -> Group:
        width, height = self.console.size
        return Group(*screen(self.state, width, height, time.time()))

    def _tick(self, stop: threading.Event) -> None:
        """What has to happen while the main thread works or waits."""
        while not stop.wait(1.0):
            if time.time() - self._written > _WRITE_SECONDS:
                self._write()
            busy = self.state.step or self.state.waiting
            if busy and not self.live and time.time() - self._said > _LOG_SECONDS:
                self._log()

    def _log(self) -> None:
        self._print(Text(f"  {summary(self.state, time.time())}"))

    def _write(self) -> None:
        if self._folder is None or self._unwritable or self.state.state != "running":
            return
        with self._writing:
            self._written = self.state.updated = time.time()
            write_progress(self._folder, self.state, self._give_up)

    def _give_up(self, why: str) -> None:
        self._unwritable = True
        self.warn(why)

    def _end(self, state: str, why: str = "") -> None:
        if self._folder is not None and self.state.state == "running" and not self._unwritable:
            with self._writing:
                self.state.state, self.state.ended_by, self.state.updated = state, redacted(why[:2000]), time.time()
                write_progress(self._folder, self.state, self._give_up)


def quiet() -> View:
    """A view that shows nothing."""
    return View(Terminal(quiet=True))


def is_live(console: Terminal) -> bool:
    """Whether lines may be drawn anew: on a terminal that is none of a log's (CI, NO_COLOR, TERM=dumb)."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("CI", "").lower() not in _QUIET_WORDS
    return console.is_terminal and not console.is_dumb_terminal and not console.quiet and not plain
