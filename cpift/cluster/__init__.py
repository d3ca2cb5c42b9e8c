"""Ray: fine-tunes, evaluations and merges side by side, and jobs on a cluster.

`engine` is the pipeline's. It gives work to a `group` of workers that stay for a whole run (`work` is what they do,
`desk` and `work_queue` hand it out), or starts a Ray Train run for each fine-tune (`fits`). `tasks` does the work of
sweeps and comparisons. `placement` says which fine-tunes fit at once. `merging` marks regions and merges, range by
range; `stored_merge` is what differs over an object store. `session` is the connection, `storage` where checkpoints go,
`submit` sends jobs.
"""
