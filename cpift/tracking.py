"""What a fine-tune leaves to be looked at while it runs and afterwards: a log a worker, and its curves."""

from __future__ import annotations

import faulthandler
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cpift.config import Tracker
from cpift.errors import Problem

if TYPE_CHECKING:
    from transformers import TrainerCallback

_log = logging.getLogger(__name__)
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def check_trackers(trackers: Sequence[Tracker]) -> list[Problem]:
    """Trackers that are asked for and not installed. (tensorboardX comes with Ray Tune.)"""
    return [
        Problem("tracking", f"{name!r} is not installed", f"pip install {name}, or leave it out")
        for name in trackers
        if name != "tensorboard" and importlib.util.find_spec(name) is None
    ]


def tensorboard(trackers: Sequence[Tracker], folder: Path) -> list[TrainerCallback]:
    """The callback that writes TensorBoard's event files to `folder`, if they are wanted."""
    if "tensorboard" not in trackers:
        return []
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = str(folder)
    return [callback]


@contextmanager
def log_file(path: Path) -> Iterator[TextIO]:
    """Within it, what this process logs and warns of goes to `path` too, and the traceback of what ends it.

    Gives the open file.
    """
    from transformers.utils import logging as transformers_logging

    path.parent.mkdir(parents=True, exist_ok=True)
    stream = path.open("a", encoding="utf-8")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(_FORMAT))
    root, own = logging.getLogger(), logging.getLogger("cpift")
    root.addHandler(handler)
    level = own.level
    own.setLevel(logging.INFO)
    logging.captureWarnings(True)
    transformers_logging.enable_propagation()
    try:
        yield stream
    except BaseException:
        _log.exception("ended by")
        raise
    finally:
        root.removeHandler(handler)
        own.setLevel(level)
        logging.captureWarnings(False)
        stream.close()


@contextmanager
def ended_if_stuck(seconds: float, log: TextIO) -> Iterator[Callable[[bool], None]]:
    """A hung process ends, so that what looks after it (Ray) can start another: a crash it sees, a standstill not.

    Gives a function to call while work goes on: `seconds` after a call with True that no other call follows, the
    tracebacks of all threads go to `log` and the process exits with code 1. A call with False stops the clock, for
    work of no known length. The clock is not Python's, so that it runs while a library holds the interpreter's lock.
    """

    def alive(counting: bool) -> None:
        if counting:
            faulthandler.dump_traceback_later(seconds, exit=True, file=log)
        else:
            faulthandler.cancel_dump_traceback_later()

    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()
