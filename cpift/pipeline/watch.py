"""A run of another process on the screen, from the record in its folder."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.text import Text

from cpift.console.progress import Progress
from cpift.console.screen import done_line, screen, summary
from cpift.console.terminal import Terminal
from cpift.console.view import is_live
from cpift.pipeline.run_folders import RunState, run_state

_LOG_SECONDS = 15.0


class Watch:
    """Shows what `View` shows, of a folder."""

    def __init__(self, folder: Path, console: Terminal):
        self._folder, self._console, self._live = folder, console, is_live(console)
        self._state = RunState("running")
        self._reported = 0  # steps that ended, of those that were shown
        self._begun = 0.0  # of the command that is shown: the same folder may see several
        self._said, self._step = 0.0, ""

    def until_the_end(self, seconds: float) -> RunState:
        """Look every so many seconds until nothing runs any more; the state then."""
        with Live(console=self._console, transient=True, get_renderable=self._screen) if self._live else nullcontext():
            while True:
                self._look()
                if self._state.kind != "running":
                    return self._state
                time.sleep(seconds)

    def _look(self) -> None:
        self._state = run_state(self._folder)
        progress = self._state.progress
        if progress is None:
            return
        if progress.started != self._begun:
            self._begun, self._reported, self._step = progress.started, 0, ""
        for done in progress.done[self._reported :]:
            self._print(done_line(done))
        self._reported = len(progress.done)
        doing = progress.step or progress.waiting
        due = doing != self._step or time.time() - self._said > _LOG_SECONDS
        if doing and due and not self._live and self._state.kind == "running":
            self._step = doing
            self._print(Text(f"  {summary(progress, self._now(progress))}"))

    def _screen(self) -> Group:
        progress = self._state.progress
        if progress is None:
            return Group(Text("waiting for the run's first word …", "yellow"))
        width, height = self._console.size
        return Group(*screen(progress, width, height, self._now(progress)))

    def _now(self, progress: Progress) -> float:
        """By the clock of the machine that works, which may differ from ours."""
        return progress.updated

    def _print(self, line: Text) -> None:
        self._said = time.time()
        if self._live:
            self._console.print(line)
        else:
            self._console.print(Text(f"{time.strftime('%H:%M:%S')} ").append_text(line), soft_wrap=True)
