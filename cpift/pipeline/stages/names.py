"""What the outputs of a run are named with: its config, and what its inputs were when they were looked at.

An output's fingerprint follows from its inputs' fingerprints. Only the groups are taken by content: stages after
grouping depend on which groups came out, not on the threshold that gave them. Which fields of the config are part of
it, each says beside itself (`config/identity.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar

from cpift.checkpoints.opening import given_fingerprint, locate, model_files, pinned
from cpift.config.code import code_of
from cpift.config.run import CheckpointConfig, DataSource, ModelConfig, RunConfig
from cpift.data.chat_templates import decided_by
from cpift.data.sources import rows_of
from cpift.data.tasks import source_fingerprint
from cpift.disk.artifacts import Artifact
from cpift.disk.input_watch import InputWatch
from cpift.errors import ConfigError, Problem
from cpift.extensions import Extension
from cpift.lineage.parent import Parent, read_parent

Groups = Sequence[Sequence[str]]  # of tasks, in stage order
Result = TypeVar("Result")


@dataclass(frozen=True)
class ModelRef:
    """A model of the run: its name in the report, its folder, and the fingerprint that stands for its content."""

    title: str
    path: Path
    fingerprint: str

    @classmethod
    def of(cls, title: str, artifact: Artifact) -> ModelRef:
        return cls(title, artifact.path, artifact.fingerprint)


@dataclass(frozen=True)
class Known:
    """What names later outputs and stands in no config: the groups that came out, and θ_base. None: not known yet."""

    groups: Groups | None
    backbone: ModelRef | None


NOTHING = Known(None, None)


class Names:
    """One run, as far as its outputs' names go. `maker`: see `Artifact.maker`."""

    def __init__(self, config: RunConfig, maker: str = ""):
        self.config, self.maker = config, maker
        self.root = config.output_dir
        self.watch = InputWatch()
        self.values: dict[Any, Any] = {}  # by what looks for it, see `once`

    @cached_property
    def parent(self) -> Parent | None:
        """The finished run that this one goes on from. Raises ConfigError where it is not what it was."""
        asked = self.config.parent
        if asked is None:
            return None
        found = read_parent(asked.run, "parent.run")
        if found.fingerprint != asked.fingerprint:
            what = f"{asked.run} is another run now: {found.fingerprint[:12]}, and was {asked.fingerprint[:12]}"
            remedy = "put back what was there, or go on from what is there now, into another folder"
            raise ConfigError(f"run {self.config.name}", [Problem("parent.fingerprint", what, remedy)])
        return found

    def artifact(
        self, stage: str, version: int, inputs: Mapping[str, str], fields: Mapping[str, Any], label: str = ""
    ) -> Artifact:
        return Artifact(self.root, stage, label, inputs, fields, version, self.maker, self.watch)

    def input_model(
        self,
        title: str,
        field: str,
        source: CheckpointConfig | ModelConfig,
        read: Callable[[str, Path], str] = lambda fingerprint, folder: fingerprint,
    ) -> ModelRef:
        """A model that is read where it lies. `field` names it in the config; `read`: see `opening.as_read`."""
        source = pinned(source)
        folder = locate(source)
        value = self.watch.identify(field, lambda: model_files(folder), lambda: read(given_fingerprint(source), folder))
        return ModelRef(title, folder, value)

    def code(self, fields: str) -> dict[str, str]:
        """Fingerprints of the user's code that fields which begin so name; our own code has none."""
        named = {field: extension for field, extension in _extensions(self).items() if field.startswith(fields)}
        return {f"code {field}": self._code_at(field, extension) for field, extension in named.items()}

    def _code_at(self, field: str, extension: Extension) -> str:
        return self.watch.identify(field, lambda: [extension.file], lambda: extension.fingerprint)

    def rows(self, task: str, split: str, source: DataSource) -> str:
        """What identifies the rows of a task: `split` is train, test or validation."""
        files = rows_of(source).files
        return self.watch.identify(f"tasks.{task}.{split}", files, lambda: source_fingerprint(source))

    def train_rows(self, task: str) -> str:
        """What identifies the training rows of a task."""
        if ("train", task) not in self.values:
            self.values["train", task] = self.rows(task, "train", self.config.task(task).train_data)
        return str(self.values["train", task])

    def validation_rows(self, task: str, source: DataSource) -> str:
        """What identifies the rows of a task's `validation`."""
        if ("validation", task) not in self.values:
            self.values["validation", task] = self.rows(task, "validation", source)
        return str(self.values["validation", task])

    @property
    def template_fields(self) -> dict[str, Any]:
        """The chat template of the config: θ0's copy has it, models that are read where they lie do not."""
        lines = list(decided_by(self.config.model))
        return {"chat template": lines} if lines else {}


def once(look: Callable[[Names], Result]) -> Callable[[Names], Result]:
    """Looked up once a run, so that an output keeps the name that its input files gave it then."""

    @wraps(look)
    def looked_up(names: Names) -> Result:
        if look not in names.values:
            names.values[look] = look(names)
        value: Result = names.values[look]
        return value

    return looked_up


@once
def _extensions(names: Names) -> dict[str, Extension]:
    return code_of(names.config)
