"""One model's scores, and what they say.

`scoring` (a model on the tasks' test rows), `metrics` (the table of them), `text`, `likelihood`, `generation`,
`judge`, `rows` and `checks` (which rows can be scored), `standard` and `task_files` (lm-eval); `retention` (what a
model keeps of each task's own fine-tune), `estimates` and `measures` (figures with intervals), `verdict` (a run in
one sentence).
"""
