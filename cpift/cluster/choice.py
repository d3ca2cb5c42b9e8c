"""Where a run selects and merges. Loads Ray for a cluster alone."""

from __future__ import annotations

from cpift.config.run import ResourcesConfig
from cpift.merging.engine import Merging
from cpift.merging.on_device import device_merging, shared_out


def merging_for(resources: ResourcesConfig, own_cpus: bool = True, stored: bool = True) -> Merging | None:
    """The cluster that the resources name, or the GPUs of this machine; None for this process's processors.

    own_cpus: whether this process has any, else it asks Ray. stored: see `merging.merging_of`.
    """
    if own_cpus and not resources.on_cluster and not shared_out(resources):
        return device_merging(resources)
    from cpift.cluster.merging import merging_of

    return merging_of(resources, stored)
