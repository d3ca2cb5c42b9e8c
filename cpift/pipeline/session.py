"""A command at work on a run's folder: it holds the folder, shows how far it is, and keeps that for who watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cpift.disk.locks import exclusive
from cpift.errors import entry
from cpift.pipeline.pipeline import Pipeline

# Steps of each command up to which it goes, in order: the stage, the title that the pipeline gives the step.
_TITLES: dict[str, Callable[[Pipeline], str]] = {
    "model": lambda run: "" if run.artifacts.in_place else "model θ0",
    "probe": lambda run: "probes" if run.config.trained else "",
    "regions": lambda run: "core regions" if _isolates(run) else "",
    "group": lambda run: "task groups" if _isolates(run) else "",
    "backbone": lambda run: _backbone(run) if _isolates(run) else "",
    "fuse": lambda run: "fusion",
    "integrate": lambda run: "integration" if run.config.integration is not None else "",
    "evaluate": lambda run: "evaluation",
    "report": lambda run: "report",
}
# Where a command stops, if not at the stage of its name.
_UP_TO = {stage: stage for stage in _TITLES} | {"run": "report"}


def steps_of(run: Pipeline, command: str) -> list[str]:
    """Titles of the steps of a command, in order."""
    last = list(_TITLES).index(entry(_UP_TO, command, "command"))
    titles = [title_of(run) for title_of in list(_TITLES.values())[: last + 1]]
    return [title for title in titles if title]


@contextmanager
def at_work(run: Pipeline, command: str) -> Iterator[None]:
    """Hold the run's output folder, with one connection to where things run."""
    with exclusive(run.root), run.view.recorded(run.root, command, steps_of(run, command)), run.session():
        yield


def _isolates(run: Pipeline) -> bool:
    return run.config.fusion.isolates or run.config.integration is not None


def _backbone(run: Pipeline) -> str:
    return {"staged": "staged backbone", "pretrained": ""}.get(run.config.backbone_source, "given backbone")
