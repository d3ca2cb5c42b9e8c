"""One file a way to merge: its formula, where it is from, what writes it, and its definition in fp64.

`cpift` (the paper's: cores transplanted, the rest by SLERP), `linear`, `task_arithmetic`, `slerp`, `ties`, `dare`,
`dare_ties`, `nearswap`, `model_stock`.
What they have in common is `merging.base`; by name they stand in `merging.registry.METHODS`.
"""
