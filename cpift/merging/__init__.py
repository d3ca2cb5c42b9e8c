"""One model out of many, slice by slice, in bounded memory, checked by code that did not write it.

`methods/`, `updates/` and `selected/` (a file a way to merge; the paper's is `cpift`), `registry` (all of them by
name), `base` (what a way is), `forms` (the two that most have), `conflicts` (who donates what several tasks' cores
hold), `engine` (any method over all tensors), `on_device` (the same on a GPU), `gpu/` (what that needs), `resident/`
(models that stay in memory between merges), `definition` (what methods' definitions in fp64 are made of), `verify` and
`checks` (what was merged, beside them), `state_dicts` (dictionaries of tensors), `in_memory` (a run's merge, made where
it is scored), `options` (what a merge may be told), `planning` (what headers tell beforehand), `signs` (what TIES does
with updates that disagree).

    >>> from cpift.merging import METHODS, method_named
    >>> list(METHODS)[:3]
    ['cpift', 'linear', 'slerp']
    >>> method_named("slerp").fields
    ('t', 'epsilon')
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.merging.base import MergeMethod as MergeMethod
    from cpift.merging.conflicts import ConflictRule as ConflictRule
    from cpift.merging.conflicts import conflict_named as conflict_named
    from cpift.merging.engine import merge as merge
    from cpift.merging.engine import merge_shards as merge_shards
    from cpift.merging.options import OPTIONS as OPTIONS
    from cpift.merging.registry import METHODS as METHODS
    from cpift.merging.registry import method_named as method_named
    from cpift.merging.state_dicts import merge_dicts as merge_dicts
else:
    __getattr__, __dir__ = handed_out(__name__)
