"""How far a command has come: kept in memory by who works, in a file of the output folder for who watches.

The file is replaced as a whole, a few times a minute at least, so a reader never meets half of it, and can tell a run
that goes on from one that was killed. It lies in `.work`, where everything is cpift's own.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

from cpift.untrusted.json import Limits, UnreadableError, read_json

PLACE = Path(".work") / "progress.json"
FORMAT = 1
_LIMITS = Limits(size=1 << 24, values=500_000, constants=("NaN", "Infinity", "-Infinity"))
# How a command ended; `running` until then, and for ever where it was killed.
STATES = ("running", "finished", "failed", "stopped")


class ProgressMessage(TypedDict, total=False):
    """What a worker says of its piece of work: `title` and `done`, and what there is to say of such work. Or `waiting`
    alone: for what everything waits."""

    title: str
    done: float  # 0..1
    task: str  # what is read, scored or merged now
    stage: int  # of a fine-tune, from 0
    stages: int
    step: int  # of the stage
    steps: int
    loss: float | None  # nats a token, as last logged
    waiting: str


OnProgress = Callable[[ProgressMessage], None]


def counted(on_progress: OnProgress, title: str, elements: int) -> Callable[[int, str], None]:
    """Progress of work that goes over so many elements, told of how many more, and of which tensor."""
    done = 0

    def on_elements(count: int, name: str) -> None:
        nonlocal done
        done += count
        on_progress({"title": title, "done": min(done / max(elements, 1), 1.0), "task": name})

    return on_elements


@dataclass
class Done:
    """A step that has ended: by work, or because everything was there."""

    title: str
    seconds: float | None  # None: cached


@dataclass
class Piece:
    """A part of the step that is under way: a fine-tune, a model that is scored. `done` in 0..1."""

    title: str
    done: float = 0.0
    message: ProgressMessage = field(default_factory=ProgressMessage)


@dataclass
class Progress:
    """Times are seconds since 1970, by the clock of the machine that works."""

    command: str = ""
    started: float = 0.0
    updated: float = 0.0
    state: str = "running"
    ended_by: str = ""  # what an error said
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    expected: list[str] = field(default_factory=list)  # titles of the steps to come and done, in order, if known
    done: list[Done] = field(default_factory=list)
    step: str = ""  # what is under way
    step_started: float = 0.0
    first_moved: float = 0.0  # when the step's pieces first said anything: start-up is no measure of what is left
    waiting: str = ""
    waiting_since: float = 0.0
    pieces: dict[str, Piece] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of the step's work that is done, 0..1; its pieces count alike."""
        return sum(piece.done for piece in self.pieces.values()) / len(self.pieces) if self.pieces else 0.0

    def left(self, now: float) -> float | None:
        """Seconds until the step ends at the speed so far; None where nothing was measured."""
        spent, share = now - self.first_moved, self.share
        return spent * (1 - share) / share if self.first_moved and share > 0.02 and spent > 1 else None

    @property
    def place(self) -> str:
        """`step 3 of 8`; empty where the number is not known, as of a step that comes a second time."""
        if self.step not in self.expected or any(step.title == self.step for step in self.done):
            return ""
        return f"step {self.expected.index(self.step) + 1} of {len(self.expected)}"


def write_progress(folder: Path, progress: Progress, warn: Callable[[str], None]) -> None:
    """Replace the record of a run. One that cannot be written costs who watches, and not the run: `warn` says it."""
    path = folder / PLACE
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"format": FORMAT} | asdict(progress)), encoding="utf-8")
        os.replace(temporary, path)  # not synced: after a power cut nobody watches
    except OSError as error:
        warn(f"{path} cannot be written ({error.strerror}): `cpift watch` will not see this run")
        with suppress(OSError):
            temporary.unlink()


def read_progress(folder: Path) -> Progress | None:
    """The record of a run; None where there is none. Raises UnreadableError for what is no such record."""
    path = folder / PLACE
    try:
        record = read_json(path, _LIMITS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return _parsed(record)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UnreadableError(f"is no record of a run's progress ({error})", subject=str(path)) from None


def _parsed(record: dict[str, Any]) -> Progress:
    if record.pop("format", None) != FORMAT or record.get("state") not in STATES:
        raise ValueError("of another release, or damaged")
    record["done"] = [Done(str(step["title"]), _seconds(step["seconds"])) for step in record["done"]]
    record["pieces"] = {
        str(name): Piece(
            str(piece["title"]), min(max(float(piece["done"]), 0.0), 1.0), cast(ProgressMessage, dict(piece["message"]))
        )
        for name, piece in record["pieces"].items()
    }
    progress = Progress(**record)
    for name in ("started", "updated", "step_started", "first_moved", "waiting_since"):
        setattr(progress, name, float(record[name]))
    for name in ("command", "ended_by", "host", "step", "waiting"):
        setattr(progress, name, str(record[name]))
    progress.pid, progress.expected = int(record["pid"]), [str(title) for title in record["expected"]]
    return progress


def _seconds(value: Any) -> float | None:
    return None if value is None else float(value)
