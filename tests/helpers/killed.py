"""A run in a process of its own, without Ray, that ends without warning in the middle of a stage."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

_DEADLY = """
import os, signal, sys
from contextlib import contextmanager
import cpift
from cpift.console.view import View

command, wanted, output, *given = sys.argv[1:]

class Deadly(View):
    now = None

    @contextmanager
    def stage(self, title, *rest, **named):
        self.now = title
        if title == wanted == "fusion":  # which tells no steps
            os.kill(os.getpid(), signal.SIGKILL)
        with super().stage(title, *rest, **named) as entered:
            yield entered

    def progress(self, message):
        if self.now == wanted:
            os.kill(os.getpid(), signal.SIGKILL)
        super().progress(message)

getattr(cpift, command)(*given, output=output, in_process=True, progress=Deadly())
"""


def killed_in(stage: str, output: Path, command: str, *given: Path) -> None:
    """`cpift.COMMAND(*given, output=output)` until it works in `stage`, by the title that the screen shows."""
    arguments = [command, stage, str(output), *map(str, given)]
    ended = subprocess.run([sys.executable, "-c", _DEADLY, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
