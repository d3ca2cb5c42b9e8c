"""One model out of many, slice by slice, in bounded memory, checked by code that did not write it.

`fusion` (cores transplanted, the rest by SLERP: docs/method.md, stage 5), `methods` (linear, task arithmetic,
SLERP, TIES, DARE), `engine` (any method over all tensors), `verify` and `definition` (what was written, beside the
definition in fp64), `state_dicts` (in memory), `options` (what a merge may be told), `planning` (what headers tell
beforehand).
"""
