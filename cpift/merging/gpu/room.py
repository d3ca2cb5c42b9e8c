"""What a merge holds in a GPU's memory, whatever the size of its models."""

from __future__ import annotations

from cpift_kernels import lane_bytes

from cpift.config.run import RunConfig

_LANES = 2  # the tensor that is written, and the next one that is looked at meanwhile


def merge_holds(config: RunConfig) -> int:
    """Bytes of the slices of θ0, the backbone and every task's model, two of each at once, and of results; masks and
    what a method makes of slices come on top."""
    models = 1 + (config.backbone_source != "pretrained") + len(config.tasks)
    return _LANES * lane_bytes(2 * models)
