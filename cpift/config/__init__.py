"""Every field of a run, and how a YAML file becomes one or one message that lists what is wrong.

`run` is the whole; `inputs` (models, rows), `columns` (templates over a row), `tasks`, `training`, `fusion` are its
parts, `resources` what may be used. `loading` reads, also what other files vary, `problems` says what pydantic found,
`code` loads what users bring. `paths` says which fields are paths, `identity` which fields name which outputs, `words`
what a field may say, `needs` what each command needs.

    >>> from pathlib import Path
    >>> from cpift.config import parse_config
    >>> task = {"name": "a", "train": {"procedural": "echo", "size": 40}, "holdout": {"rows": 8}}
    >>> fields = {"name": "x", "model": {"scratch": {}}, "tasks": [task], "probe": {"steps": 2}}
    >>> parse_config(fields, Path.cwd(), "x", ["regions.p=0.02"]).regions.p
    0.02
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.config.identity import identity_of as identity_of
    from cpift.config.inputs import DataSource as DataSource
    from cpift.config.inputs import ModelConfig as ModelConfig
    from cpift.config.loading import dump_config as dump_config
    from cpift.config.loading import load_config as load_config
    from cpift.config.loading import parse_config as parse_config
    from cpift.config.loading import with_fields as with_fields
    from cpift.config.resources import ResourcesConfig as ResourcesConfig
    from cpift.config.run import FusionConfig as FusionConfig
    from cpift.config.run import RegionsConfig as RegionsConfig
    from cpift.config.run import RunConfig as RunConfig
    from cpift.config.tasks import EvaluationConfig as EvaluationConfig
    from cpift.config.tasks import TaskConfig as TaskConfig
    from cpift.config.training import TrainingConfig as TrainingConfig
else:
    __getattr__, __dir__ = handed_out(__name__)
