"""What is new in CPI-FT: core regions, task groups and element-wise freezing (docs/method.md).

`regions` (C_i: where task i moved the model most; stage 2), `measures` (most of what, among which elements), `groups`
(overlap → connected components → order; stage 3), `freezing` (θ ← θ + Δθ ⊙ M under any optimizer; stage 6), `masks`
(regions as files), `cores` (regions as Python objects), `freeze_callback` (freezing in anybody's trainer).
"""
