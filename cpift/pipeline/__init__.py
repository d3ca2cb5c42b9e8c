"""A run: probe → regions → group → backbone → fuse → integrate → evaluate → report.

`stages/` has a file for each stage; `pipeline` has them in order, `run` what is common to their work, `identity` what
names each output; `report` comes after. `plan`, `preflight`, `row_checks` and `costs` come before a run; `engine` says
where fine-tunes and evaluations run, `inprocess` runs them here; `outcomes` and `shared` are for several runs;
`session`, `run_folders` and `watch` for who looks at one.

    >>> from pathlib import Path
    >>> from cpift.config.loading import parse_config
    >>> from cpift.pipeline import StageArtifacts
    >>> from cpift.pipeline.stages import regions
    >>> task = {"name": "a", "train": {"procedural": "echo", "size": 40}, "holdout": {"rows": 8}}
    >>> fields = {"name": "x", "model": {"scratch": {}}, "tasks": [task], "probe": {"steps": 2}}
    >>> names = StageArtifacts(parse_config(fields, Path.cwd(), "x"))
    >>> regions.artifact(names).stage, regions.artifact(names).complete
    ('regions', False)
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.pipeline.engine import NoEngine as NoEngine
    from cpift.pipeline.identity import StageArtifacts as StageArtifacts
    from cpift.pipeline.inprocess import InProcessEngine as InProcessEngine
    from cpift.pipeline.outcomes import own_models as own_models
    from cpift.pipeline.outcomes import scores_of as scores_of
    from cpift.pipeline.pipeline import Pipeline as Pipeline
    from cpift.pipeline.plan import Plan as Plan
    from cpift.pipeline.preflight import examined as examined
    from cpift.pipeline.session import at_work as at_work
else:
    __getattr__, __dir__ = handed_out(__name__)
