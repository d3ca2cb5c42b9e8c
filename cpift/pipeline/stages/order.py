"""The stages in order, and what a run has of all of them: its outputs, its models, the lines of its plan.

Nothing is made here. `known` holds what only the run itself can tell; what follows from what is not known yet is left
out, and a plan says what it waits for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from cpift.disk.artifacts import Artifact
from cpift.pipeline.stages import backbone, evaluate, fuse, group, integrate, model, probe, regions
from cpift.pipeline.stages.names import Known, ModelRef, Names
from cpift.pipeline.stages.step import Step


class Stage(Protocol):
    """What the file of every stage has; how it does its work is its own."""

    VERSION: int  # raised when its code starts to give another result: what was made before is then made anew

    def title(self, names: Names) -> str:
        """What the screen calls its step; empty where the run has none."""

    def plan(self, names: Names, known: Known) -> Iterator[Step]:
        """Its lines of a plan."""

    def outputs(self, names: Names, known: Known) -> dict[str, Artifact]:
        """Its outputs by title, finished or not."""

    def models(self, names: Names, known: Known) -> list[ModelRef]:
        """Its models that are scored, finished or not."""


ORDER: Mapping[str, Stage] = {
    "model": model,
    "probe": probe,
    "regions": regions,
    "group": group,
    "backbone": backbone,
    "fuse": fuse,
    "integrate": integrate,
}
LAST = ("fuse", "integrate")  # what baselines are beside, and what the trials of a sweep do not share
FIRST = tuple(stage for stage in ORDER if stage not in LAST)


def outputs(names: Names, known: Known, *stages: str) -> dict[str, Artifact]:
    """Everything that these stages make, by title, scores left aside."""
    return {
        title: artifact for stage in stages or ORDER for title, artifact in ORDER[stage].outputs(names, known).items()
    }


def models(names: Names, known: Known, *stages: str) -> list[ModelRef]:
    """The models of these stages that are scored, in the report's order."""
    return [reference for stage in stages or ORDER for reference in ORDER[stage].models(names, known)]


def plan(names: Names) -> Iterator[Step]:
    """Every line of a run's plan, in order."""
    known = looked_up(names)
    for stage in ORDER.values():
        yield from stage.plan(names, known)
    if not evaluate.possible(names.config):
        return
    if not regions.wanted(names.config) or (known.groups is not None and known.backbone is not None):
        yield from evaluate.plan(names, models(names, known))
    elif known.groups is None:
        yield Step("evaluate", "", "after group", "its groups decide the stages")
    else:
        yield Step("evaluate", "", "after fuse", "")


def looked_up(names: Names) -> Known:
    """What is known before anything is made. A backbone that the user names is known to the run alone."""
    grouping = group.grouping(names) if regions.wanted(names.config) else None
    groups = None if grouping is None else grouping.groups
    source = names.config.backbone_source
    staged = None if groups is None else backbone.artifact(names, groups)
    if staged is not None:
        return Known(groups, ModelRef.of("backbone", staged))
    given = {"pretrained": lambda: model.base(names), "parent": lambda: backbone.before(names)[0]}
    return Known(groups, given[source]() if source in given else None)
