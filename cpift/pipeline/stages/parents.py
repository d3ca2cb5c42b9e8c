"""Whether a run can go on from the finished run that it names, asked before anything is made."""

from __future__ import annotations

from collections.abc import Iterator

from cpift.config.run import RunConfig
from cpift.errors import ConfigError, Problem
from cpift.lineage.parent import Parent
from cpift.pipeline.stages import regions
from cpift.pipeline.stages.names import Names


def check_parent(config: RunConfig, stage: str | None) -> list[Problem]:
    """What stands against it; rows and models of the config have been looked at."""
    if config.parent is None:
        return []
    if stage is not None and stage.startswith(("sweep", "compare")):
        what = f"goes on from {config.parent.run}, and `cpift {stage.split()[0]}` varies runs that begin with θ0"
        return [Problem("parent", what, f"give the config of {config.parent.run}, without `parent`")]
    names = Names(config)
    try:
        parent = names.parent
    except ConfigError as error:
        return list(error.problems)
    return [] if parent is None else list(_differences(names, parent))


def _differences(names: Names, parent: Parent) -> Iterator[Problem]:
    """Whatever is not as the finished run has it: then its cores would be those of another model."""
    wanted, root = regions.artifact(names), parent.root
    for field in sorted({*wanted.fields, *parent.regions.fields}):
        ours, theirs = wanted.fields.get(field), parent.regions.fields.get(field)
        if ours != theirs:
            yield Problem(f"regions.{field}", f"is {ours!r}, and {theirs!r} in {root}", "leave it as it was there")
    if wanted.version != parent.regions.version:
        yield Problem("parent.run", f"core regions of {root} are of an earlier release", "run its config again first")
    for task in names.config.earlier:
        if f"probe {task.name}" not in parent.made_of:
            yield Problem("parent.tasks", f"{root} has no core region of {task.name}", "leave the task out")
    for label, value in wanted.inputs.items():
        if parent.made_of.get(label, value) != value:
            if label == "model":
                what, remedy = f"is not the θ0 that {root} was made from", "give that one"
                yield Problem(f"model.{names.config.model.kind}", what, f"{remedy}; another one needs a run of its own")
            elif label.startswith("moments "):
                field = f"tasks.{label.removeprefix('moments ')}.moments"
                yield Problem(field, f"is not the file that {root} selected core regions by", "give that one")
            else:
                name = label.removeprefix("probe ")
                what = f"the rows or the fields of its fine-tune are not those that {root} trained it with"
                yield Problem(f"tasks.{name}", what, "put them back as they were")
