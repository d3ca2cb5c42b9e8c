"""Models that stay in the memory of a process, for points of a sweep that are made from the same ones.

`shard` (tensors of models and masks in the memory of one device), `residents` (all shards of a process, and which
models they hold), `holder` (a process that holds some of the shards for others), `holders` (all of these, as others
ask them), `engine` (how a trial selects and merges with them).

    >>> from cpift.merging.resident import hold_at_most
    >>> hold_at_most(0)
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.merging.resident.engine import hold_at_most as hold_at_most
    from cpift.merging.resident.engine import staying as staying
    from cpift.merging.resident.holder import Holder as Holder
    from cpift.merging.resident.holders import Holders as Holders
    from cpift.merging.resident.residents import Residents as Residents
    from cpift.merging.resident.shard import ResidentShard as ResidentShard
else:
    __getattr__, __dir__ = handed_out(__name__)
