"""Where a run selects and merges. Loads Ray for a cluster alone."""

from __future__ import annotations

from cpift.config.run import ResourcesConfig
from cpift.merging.engine import Merging
from cpift.merging.on_device import device_merging


def merging_for(resources: ResourcesConfig, stored: bool = True) -> Merging | None:
    """The cluster that the resources name, or their GPU; None for this process's processors.

    stored: see `merging.merging_of`.
    """
    if not resources.on_cluster:
        return device_merging(resources)
    from cpift.cluster.merging import merging_of

    return merging_of(resources, stored=stored)
