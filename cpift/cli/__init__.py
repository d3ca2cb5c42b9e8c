"""The commands: words and options, and nothing else.

`main` has the stages, and collects all other commands. `init`, `plan`, `check`, `data`, `merge`, `compare` and `schema`
have a file each; `runs` has watch, runs and clean, `many` has sweep and submit, `standard` has standard and bench.
`group` says how a command is found and how it ends, `options` what several take.
"""
