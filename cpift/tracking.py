"""What a fine-tune leaves to be looked at while it runs and afterwards: a log a worker, and its curves."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

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
def log_file(path: Path) -> Iterator[None]:
    """Within it, what this process logs and warns of goes to `path` too, and the traceback of what ends it."""
    from transformers.utils import logging as transformers_logging

    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    root, own = logging.getLogger(), logging.getLogger("cpift")
    root.addHandler(handler)
    level = own.level
    own.setLevel(logging.INFO)
    logging.captureWarnings(True)
    transformers_logging.enable_propagation()
    try:
        yield
    except BaseException:
        _log.exception("ended by")
        raise
    finally:
        root.removeHandler(handler)
        own.setLevel(level)
        logging.captureWarnings(False)
        handler.close()
