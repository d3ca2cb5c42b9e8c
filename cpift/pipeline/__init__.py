"""A run: probe → regions → group → backbone → fuse → integrate → evaluate → report.

`pipeline` has the stages in order, `stages` what each does, `identity` what names each output, `fuse` the fusion.
`plan`, `preflight`, `row_checks` and `costs` come before a run; `engine` says where fine-tunes and evaluations run,
`inprocess` runs them here; `outcomes` and `shared` are for several runs; `session`, `run_folders` and `watch` for
who looks at one.
"""
