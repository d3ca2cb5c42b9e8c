"""What identifies each stage's output: the artifacts of a run, made or not.

A downstream artifact's fingerprint follows from its inputs' fingerprints. Only the groups are taken by content: stages
after grouping depend on which groups came out, not on the threshold that gave them. Which fields of the config are part
of it, each says beside itself (`config/identity.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from cpift.checkpoints.opening import as_read, given_fingerprint, locate, model_files, pinned
from cpift.config.code import code_of
from cpift.config.identity import identity_of
from cpift.config.run import (
    CheckpointConfig,
    DataSource,
    ModelConfig,
    ResourcesConfig,
    RunConfig,
    TaskConfig,
    TrainingConfig,
)
from cpift.data.chat_templates import decided_by
from cpift.data.sources import rows_of
from cpift.data.tasks import source_fingerprint
from cpift.disk.artifacts import Artifact
from cpift.disk.files import read_json
from cpift.disk.input_watch import InputWatch
from cpift.extensions import Extension
from cpift.merging.conflicts import conflict_named
from cpift.merging.registry import method_named
from cpift.method.groups import Grouping
from cpift.models.checks import source_files
from cpift.models.sources import model_fingerprint

# Raise a stage's number when its code starts to give another result: artifacts made before are then made anew.
_VERSIONS = {"model": 1, "probe": 1, "regions": 1, "group": 1, "backbone": 1, "fuse": 2, "integrate": 1, "evaluate": 1}


@dataclass(frozen=True)
class Model:
    """A model of the run: its name in the report, its folder, and the fingerprint that stands for its content."""

    title: str
    path: Path
    fingerprint: str

    @classmethod
    def of(cls, title: str, artifact: Artifact) -> Model:
        return cls(title, artifact.path, artifact.fingerprint)


class StageArtifacts:
    """The artifacts of one run."""

    def __init__(self, config: RunConfig, maker: str = ""):
        self.config, self.maker = config, maker
        self.root = config.output_dir
        self.watch = InputWatch()
        self._train_rows: dict[str, str] = {}

    def artifact(self, stage: str, label: str, inputs: Mapping[str, str], fields: Mapping[str, Any]) -> Artifact:
        return Artifact(self.root, stage, label, inputs, fields, _VERSIONS[stage], self.maker, self.watch)

    @cached_property
    def model(self) -> Artifact:
        return self.model_of("model", "", self.source)

    @cached_property
    def source(self) -> ModelConfig:
        """Where θ0 comes from; of the hub, at one commit."""
        return pinned(self.config.model)

    def model_of(self, title: str, label: str, source: ModelConfig) -> Artifact:
        """A copy of a model as fine-tunes start from it. `title`: the field that names it; `source`: pinned."""
        value = self.watch.identify(title, lambda: source_files(source), lambda: model_fingerprint(source))
        return self.artifact("model", label, {"source": value}, {})

    def given(
        self,
        title: str,
        field: str,
        source: CheckpointConfig | ModelConfig,
        read: Callable[[str, Path], str] = lambda fingerprint, folder: fingerprint,
    ) -> Model:
        """A model that is read where it lies. `field` names it in the config; `read`: see `opening.as_read`."""
        source = pinned(source)
        folder = locate(source)
        value = self.watch.identify(field, lambda: model_files(folder), lambda: read(given_fingerprint(source), folder))
        return Model(title, folder, value)

    def _code(self, fields: str) -> dict[str, str]:
        """The user's code that fields of these names name; of ours nothing."""
        found = {field: one for field, one in self._extensions.items() if field.startswith(fields)}
        return {f"code {field}": self._code_at(field, one) for field, one in found.items()}

    def _code_at(self, field: str, one: Extension) -> str:
        return self.watch.identify(field, lambda: [one.file], lambda: one.fingerprint)

    @cached_property
    def _extensions(self) -> dict[str, Extension]:
        return code_of(self.config)

    def _data(self, task: str, split: str, source: DataSource) -> str:
        files = rows_of(source).files
        return self.watch.identify(f"tasks.{task}.{split}", files, lambda: source_fingerprint(source))

    def train_rows(self, task: str) -> str:
        """What identifies the training rows of a task."""
        if task not in self._train_rows:
            self._train_rows[task] = self._data(task, "train", self.config.task(task).train_data)
        return self._train_rows[task]

    @cached_property
    def _train_data(self) -> dict[str, str]:
        return {f"data {task.name}": self.train_rows(task.name) for task in self.config.tasks}

    def _training_fields(
        self, stage: str, training: TrainingConfig, threads: int, resources: ResourcesConfig
    ) -> dict[str, Any]:
        """What fixes the bits of a fine-tune."""
        fields = identity_of(training, stage) | identity_of(resources, stage)
        fields |= {"seed": self.config.seed, "threads": threads}
        return fields | ({"strategy": resources.strategy} if resources.workers > 1 else {})

    @property
    def threads_alone(self) -> int:
        return self.config.resources.threads_alone or self.config.resources.threads

    @cached_property
    def base(self) -> Model:
        """θ0: where it lies if nothing is trained from it, else the copy that fine-tunes start from."""
        if self.in_place:
            return self.given("base", "model", self.config.model, as_read)
        return Model.of("base", self.model)

    @property
    def in_place(self) -> bool:
        """Whether θ0 is used where it lies."""
        model = self.config.model
        return self.config.merges_only and model.dtype == "auto" and (model.path or model.hub) is not None

    @cached_property
    def tuned(self) -> dict[str, Model]:
        """θ1..θN: the probes, trained here or given."""
        return {
            task.name: Model.of(f"probe {task.name}", self.probes[task.name])
            if task.checkpoint is None
            else self._given(task.name, task.checkpoint)
            for task in self.config.tasks
        }

    def _given(self, task: str, source: CheckpointConfig) -> Model:
        base = self.base.path if self.in_place or self.model.complete else None
        read = partial(as_read, base=base)
        return self.given(f"probe {task}", f"tasks.{task}.checkpoint", source, read)

    @cached_property
    def probes(self) -> dict[str, Artifact]:
        """The probes that are trained here."""
        return {task.name: self._probe(task) for task in self.config.trained}

    def _probe(self, task: TaskConfig) -> Artifact:
        inputs = {"model": self.model.fingerprint, "data": self.train_rows(task.name)}
        resources = self.config.resources.overridden(task.resources)
        fields = self._training_fields("probe", self.config.probe_training, resources.threads, resources)
        return self.artifact("probe", task.name, inputs, fields)

    @property
    def _probe_inputs(self) -> dict[str, str]:
        return {f"probe {task}": model.fingerprint for task, model in self.tuned.items()}

    @cached_property
    def regions(self) -> Artifact:
        inputs = {"model": self.base.fingerprint} | self._probe_inputs
        return self.artifact("regions", "", inputs, identity_of(self.config.regions, "regions"))

    @cached_property
    def group(self) -> Artifact:
        fields = identity_of(self.config.groups, "group") | {"seed": self.config.seed}
        fields |= {"tasks": [task.name for task in self.config.tasks]}  # stages are ordered by it; regions are not
        return self.artifact("group", "", {"regions": self.regions.fingerprint}, fields)

    def backbone(self, groups: Sequence[Sequence[str]]) -> Artifact | None:
        """None where no staged backbone is trained."""
        if self.config.backbone_source != "staged":
            return None
        inputs = {"model": self.model.fingerprint} | self._train_data
        fields = self._training_fields(
            "backbone", self.config.backbone_training, self.threads_alone, self.config.resources
        )
        fields |= {"groups": [list(group) for group in groups]}
        return self.artifact("backbone", "", inputs, fields)

    def fuse(self, groups: Sequence[Sequence[str]], backbone: Model) -> Artifact:
        """The fused model; of other methods than cpift, neither groups nor backbone matter."""
        if not self.config.fusion.isolates:
            return self._merged()
        inputs = {"model": self.base.fingerprint, "regions": self.regions.fingerprint}
        fields = identity_of(self.config.fusion, "fuse") | self._template_fields
        if conflict_named(self.config.fusion.conflict).by_stage:
            fields["groups"] = [list(group) for group in groups]
        return self.artifact("fuse", "", inputs | self._probe_inputs | {"backbone": backbone.fingerprint}, fields)

    @cached_property
    def _template_fields(self) -> dict[str, Any]:
        """The chat template that the config says; θ0's copy has it, models that are read where they lie have not."""
        lines = list(decided_by(self.config.model))
        return {"chat template": lines} if lines else {}

    def _merged(self) -> Artifact:
        fields = identity_of(self.config.fusion, "merge") | self._template_fields
        if method_named(fields["method"]).seeded:
            fields["seed"] = self.config.seed
        return self.artifact("fuse", fields["method"], {"model": self.base.fingerprint} | self._probe_inputs, fields)

    def integrate(self, groups: Sequence[Sequence[str]], fused: Artifact) -> Artifact:
        integration = self.config.integration_training
        fields = self._training_fields("integrate", integration, self.threads_alone, self.config.resources)
        fields |= {"groups": [list(group) for group in groups]}
        inputs = {"fused": fused.fingerprint, "regions": self.regions.fingerprint} | self._train_data
        return self.artifact("integrate", "", inputs, fields)

    def evaluate(self, model: Model) -> Artifact:
        tasks = self.config.tasks
        inputs = {"model": model.fingerprint} | {
            f"data {task.name}": self._data(task.name, "test", task.test_data) for task in tasks
        }
        inputs |= self._code("tasks.")
        fields = identity_of(self.config.evaluation, "evaluate") | {"threads": self.config.resources.threads}
        fields |= self._template_fields
        fields["tasks"] = [[task.name, task.metric_name, task.max_new_tokens] for task in tasks]
        return self.artifact("evaluate", model.title.replace(" ", "-"), inputs, fields)

    def known_grouping(self) -> Grouping | None:
        """The grouping if it has been made, else None."""
        if not self.group.complete:
            return None
        kept = read_json(self.group.path / "groups.json")
        groups = tuple(tuple(group) for group in kept["groups"])
        jaccard = np.array(kept["jaccard"])
        return Grouping(tuple(kept["tasks"]), jaccard, kept["chance"], kept["tau"], groups, tuple(kept["warnings"]))
