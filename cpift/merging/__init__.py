"""One model out of many, slice by slice, in bounded memory, checked by code that did not write it.

`methods/` (a file a way to merge; the paper's is `cpift`), `registry` (all of them by name), `base` (what a way is),
`conflicts` (who donates what several tasks' cores hold), `engine` (any method over all tensors), `definition` (what
methods' definitions in fp64 are made of), `verify`, `core_checks` and `checks` (what was written, beside them),
`state_dicts` (in memory), `options` (what a merge may be told), `planning` (what headers tell beforehand),
`peft_formulas` (two methods' own).
"""
