"""A run: probe → regions → group → backbone → fuse → integrate → evaluate → report.

`stages/` has a file for each stage; `pipeline` has them in order, `run` what is common to their work, `identity` what
names each output; `report` comes after. `plan`, `preflight`, `row_checks` and `costs` come before a run; `engine` says
where fine-tunes and evaluations run, `inprocess` runs them here; `outcomes` and `shared` are for several runs;
`session`, `run_folders` and `watch` for who looks at one.
"""
