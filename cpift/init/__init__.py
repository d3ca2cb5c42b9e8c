"""`cpift init`: looks at files, models and rows, and writes a YAML file that runs as it stands.

`files` (tasks and splits), `rows` (kinds, metrics, lengths), `model` (θ0), `run` (a run's file), `others` (merges,
sweeps, examples).
"""
