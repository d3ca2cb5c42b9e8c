"""What identifies each stage's output, for who asks a run: the artifacts of a run, made or not.

Each is named in the file of its stage (`pipeline/stages`), by what stands there alone.
"""

from __future__ import annotations

from functools import cached_property

from cpift.disk.artifacts import Artifact
from cpift.method.groups import Grouping
from cpift.pipeline.stages import backbone, evaluate, fuse, group, integrate, model, probe, regions
from cpift.pipeline.stages.names import Groups, ModelRef, Names


class StageArtifacts(Names):
    """The artifacts of one run."""

    base = cached_property(model.base)  # before the next line takes the name
    model = cached_property(model.artifact)
    probes = cached_property(probe.artifacts)  # by task, those that are trained here
    tuned = cached_property(probe.tuned)  # by task
    regions = cached_property(regions.artifact)
    group = cached_property(group.artifact)

    @property
    def in_place(self) -> bool:
        """Whether θ0 is used where it lies."""
        return model.in_place(self)

    def known_grouping(self) -> Grouping | None:
        """The grouping if it has been made, else None."""
        return group.grouping(self)

    def backbone(self, groups: Groups) -> Artifact | None:
        """None where no staged backbone is trained."""
        return backbone.artifact(self, groups)

    def fuse(self, groups: Groups, backbone: ModelRef) -> Artifact:
        """The fused model; of other methods than cpift, neither groups nor backbone matter."""
        return fuse.artifact(self, groups, backbone)

    def integrate(self, groups: Groups, fused: Artifact) -> Artifact:
        return integrate.artifact(self, groups, fused)

    def evaluate(self, model: ModelRef) -> Artifact:
        return evaluate.artifact(self, model)
