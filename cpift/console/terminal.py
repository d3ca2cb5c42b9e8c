"""The terminal: the only place that writes to it. Text of others is escaped, messages hold no secrets, and a stream
that fails ends no work."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from cpift.text.escaping import PLAIN_SIGNS, terminal
from cpift.text.redaction import redacted

_COLOURS = {"red": 31, "yellow": 33}


class Terminal(Console):
    """rich's console for text of others: no markup is read from it, and controls are shown."""

    def __init__(self, **settings: Any):
        super().__init__(**{"markup": False, "emoji": False, "highlight": False} | settings)

    def print(self, *objects: Any, **settings: Any) -> None:
        super().print(
            *(redacted(renderable) if isinstance(renderable, str) else renderable for renderable in objects), **settings
        )

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            shown = segment.text if segment.control else terminal(segment.text)
            yield segment if shown == segment.text else Segment(shown, segment.style)


def say(text: str, colour: str | None = None, *, err: bool = False) -> None:
    """One message, on standard output or error; unlike what `Terminal` prints it is not wrapped."""
    stream, shown = sys.stderr if err else sys.stdout, terminal(redacted(text))
    if colour is not None and stream.isatty() and "NO_COLOR" not in os.environ:
        shown = f"\x1b[{_COLOURS[colour]}m{shown}\x1b[0m"
    stream.write(f"{shown}\n")
    stream.flush()


@contextmanager
def standard_streams() -> Iterator[None]:
    """Within it standard output and error take every sign, and what cannot be written is let go: work goes on.

    A reader that left (`| head`) is no failure. Where output could not be written for another reason (a full disk),
    that is said on standard error at the end, and the process ends with code 2.
    """
    _occupy_standard_files()
    before, streams = (sys.stdout, sys.stderr), (_Tolerant(sys.stdout), _Tolerant(sys.stderr))
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        failure = streams[0].failure
        if failure is not None:
            say(f"cpift: standard output could not be written: {failure.strerror or failure}", "red", err=True)
        sys.stdout, sys.stderr = before
        if failure is not None:
            sys.exit(2)


def _occupy_standard_files() -> None:
    """Where a standard stream is closed, the next file opened would take its number, and what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


class _Tolerant:
    """A stream, or none, whose failures are kept and not raised."""

    def __init__(self, stream: TextIO | None):
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        self.failure: OSError | None = None
        with suppress(AttributeError, OSError, ValueError):  # some stand-ins for a stream have no such thing
            self._stream.reconfigure(errors=PLAIN_SIGNS)  # type: ignore[attr-defined]  # of TextIOWrapper

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._let_go(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EINVAL):  # EINVAL: a pipe without reader on Windows
            self.failure = error
        number, null = self._stream.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)  # what is in the stream's buffer goes there too, and the interpreter ends well
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
