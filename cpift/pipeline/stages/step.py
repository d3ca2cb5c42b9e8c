"""A line of a plan, as every stage writes its own."""

from __future__ import annotations

from dataclasses import dataclass

from cpift.disk.artifacts import Artifact
from cpift.lineage.parent import Parent

_STATES = {"whole": "cached", "dropped": "weights dropped", "absent": "to do", "damaged": "damaged"}


@dataclass(frozen=True)
class Step:
    """One artifact of the run."""

    stage: str
    label: str
    state: str  # "cached", "to do", or what it waits for
    detail: str


def step_of(artifact: Artifact, detail: str, parent: Parent | None = None) -> Step:
    """What a plan says of an artifact, which `parent` may have made."""
    state = artifact.state()
    if parent and state.kind == "absent" and parent.has(artifact):
        return Step(artifact.stage, artifact.label, "cached", f"in {parent.root}")
    detail = f"{state.why}: it will be set aside and made again" if state.kind == "damaged" else detail
    return Step(artifact.stage, artifact.label, _STATES[state.kind], detail)
