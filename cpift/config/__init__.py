"""Every field of a run, and how a YAML file becomes one or one message that lists what is wrong.

`run` is the whole; `inputs` (models, rows), `columns` (templates over a row), `tasks`, `training` are its parts.
`loading` reads, `problems` says what pydantic found, `code` loads what users bring. `other_tools` knows the files of
other trainers and of `mergekit`. `paths` says which fields are paths, `identity` which fields name which outputs,
`words` what a field may say, `variation` how other files vary a run, `needs` what each command needs.

    config = load_config(Path("my-run.yaml"), ["regions.p=0.02"])
"""
