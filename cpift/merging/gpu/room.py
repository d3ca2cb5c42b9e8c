"""What a merge holds in a GPU's memory, whatever the size of its models."""

from __future__ import annotations

from cpift_kernels import placement

from cpift.config.run import RunConfig

_LANES = 2  # the tensor that is written, and the next one that is looked at meanwhile


def lane_holds(models: int) -> int:
    """Bytes of one lane, at most: two slices of each model, a result, and those on their way to the host."""
    return (2 * models + 1 + placement.LEAVING) * placement.BUFFER


def merge_holds(config: RunConfig) -> int:
    """Bytes of the slices of θ0, the backbone and every task's model, and of results; masks and what a method makes of
    slices come on top."""
    models = 1 + (config.backbone_source != "pretrained") + len(config.tasks)
    return _LANES * lane_holds(models)
