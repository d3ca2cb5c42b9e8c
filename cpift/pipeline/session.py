"""A command at work on a run's folder: it holds the folder, shows how far it is, and keeps that for who watches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cpift.disk.locks import exclusive
from cpift.errors import entry
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.stages import evaluate, order

_AFTER = {"evaluate": evaluate.TITLE, "report": "report"}
# Where a command stops, if not at the stage of its name.
_UP_TO = {stage: stage for stage in (*order.ORDER, *_AFTER)} | {"run": "report"}


def steps_of(run: Pipeline, command: str) -> list[str]:
    """Titles of the steps of a command, in order."""
    titles = {name: stage.title(run.artifacts) for name, stage in order.ORDER.items()} | _AFTER
    last = list(titles).index(entry(_UP_TO, command, "command"))
    return [title for title in list(titles.values())[: last + 1] if title]


@contextmanager
def at_work(run: Pipeline, command: str) -> Iterator[None]:
    """Hold the run's output folder, with one connection to where things run."""
    with exclusive(run.root), run.view.recorded(run.root, command, steps_of(run, command)), run.session():
        yield
