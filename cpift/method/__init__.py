"""What is new in CPI-FT: core regions, task groups and element-wise freezing (docs/method.md).

`regions` (C_i: where task i moved the model most; stage 2), `measures` (most of what, among which elements), `groups`
(overlap → connected components → order; stage 3), `freezing` (θ ← θ + Δθ ⊙ M under any optimizer; stage 6), `masks`
(regions as files), `cores` (regions as Python objects), `freeze_callback` (freezing in anybody's trainer), `changes`
(what a fine-tune changed, by tensor).

    >>> import numpy as np
    >>> from cpift.config.run import GroupsConfig
    >>> from cpift.method import chance_level, group_tasks
    >>> cores = np.array([[100, 60, 1], [60, 100, 0], [1, 0, 100]])  # elements that two cores share
    >>> group_tasks(("sums", "algebra", "poems"), cores, 0.01, GroupsConfig(tau=0.2, order="given"), seed=0).groups
    (('sums', 'algebra'), ('poems',))
    >>> round(chance_level(0.01), 4)
    0.005
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.method.cores import Core as Core
    from cpift.method.cores import Cores as Cores
    from cpift.method.freeze_callback import FreezeCallback as FreezeCallback
    from cpift.method.freeze_callback import frozen as frozen
    from cpift.method.freezing import ElementFreezer as ElementFreezer
    from cpift.method.groups import Grouping as Grouping
    from cpift.method.groups import chance_level as chance_level
    from cpift.method.groups import group_tasks as group_tasks
    from cpift.method.groups import jaccard_matrix as jaccard_matrix
    from cpift.method.masks import RegionMasks as RegionMasks
    from cpift.method.masks import read_summary as read_summary
    from cpift.method.regions import RegionSummary as RegionSummary
    from cpift.method.regions import core_size as core_size
    from cpift.method.regions import select_regions as select_regions
    from cpift.method.regions import write_regions as write_regions
else:
    __getattr__, __dir__ = handed_out(__name__)
