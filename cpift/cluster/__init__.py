"""Ray: fine-tunes, evaluations and merges side by side, and jobs on a cluster.

`engine` (the pipeline's, on Ray), `fits` (fine-tunes as Ray Train runs), `tasks` (a sweep's, as Ray tasks),
`placement` (which fit at once), `merging` and `stored_merge` (ranges of a merge), `session` (the connection),
`storage` (checkpoints), `submit` (jobs).
"""
