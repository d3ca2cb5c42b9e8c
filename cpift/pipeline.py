"""The stages of CPI-FT in order: probe → regions → group → backbone → fuse → integrate → evaluate → report.

Each stage is an artifact (see `artifacts.py`), made if it is not there. A stage asks for the ones it needs, so every
stage can be run alone. What is trained and scored runs on an *engine* that the caller passes in (`distributed.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cpift.artifacts import Artifact, link_or_copy, read_json, write_json, write_text
from cpift.config import RunConfig, TrainingConfig
from cpift.data import source_fingerprint
from cpift.errors import StageError
from cpift.grouping import Grouping, group_tasks
from cpift.models import materialise, model_fingerprint
from cpift.view import View

STAGES = ("probe", "regions", "group", "backbone", "fuse", "integrate", "evaluate", "report")

# Raise a stage's number when its code starts to give another result: artifacts made before are then made anew.
_VERSIONS = {"model": 1, "probe": 1, "regions": 1, "group": 1, "backbone": 1, "fuse": 1, "integrate": 1, "evaluate": 1}


class Engine(Protocol):
    """Where fine-tunes and evaluations run."""

    def session(self) -> AbstractContextManager[None]:
        """Keep one connection over several stages."""

    def fit(self, specs: Sequence[Any], on_progress: Callable[[dict[str, Any]], None]) -> None:
        """Run every FitSpec; each leaves its model in its `export`."""

    def evaluate(
        self,
        models: dict[str, Path],
        on_result: Callable[[str, dict[str, Any]], None],
        on_progress: Callable[[dict[str, Any]], None],
    ) -> None:
        """Score every model on every task."""


@dataclass(frozen=True)
class Model:
    """A model of the run: its name in the report, its folder, and the fingerprint that stands for its content."""

    title: str
    path: Path
    fingerprint: str


class Pipeline:
    """One run's stages. Methods named after a stage make it (and what it needs) and return its artifact."""

    def __init__(self, config: RunConfig, engine: Engine | None = None, view: View | None = None):
        self.config, self.view = config, view or View()
        self._engine = engine
        self.worked = False  # whether any stage had to be made
        self.root = config.output_dir

    # ---- what identifies each stage's output -----------------------------------------------------------------------

    def _artifact(self, stage: str, label: str, inputs: Mapping[str, str], fields: Mapping[str, Any]) -> Artifact:
        return Artifact(self.root, stage, label, inputs, fields, _VERSIONS[stage])

    @cached_property
    def model_artifact(self) -> Artifact:
        return self._artifact("model", "", {"source": model_fingerprint(self.config.model)}, {})

    @cached_property
    def _train_data(self) -> dict[str, str]:
        return {f"data {task.name}": source_fingerprint(task.train) for task in self.config.tasks}

    def _training_fields(self, training: TrainingConfig) -> dict[str, Any]:
        """What fixes the bits of a fine-tune. How often it checkpoints and logs does not."""
        resources = self.config.resources
        fields = training.model_dump(mode="json", exclude={"checkpoint_every", "log_every"})
        return fields | {"seed": self.config.seed, "threads": resources.threads, "workers": resources.workers}

    @cached_property
    def probe_artifacts(self) -> dict[str, Artifact]:
        model, fields = self.model_artifact.fingerprint, self._training_fields(self.config.probe)
        return {
            task.name: self._artifact(
                "probe", task.name, {"model": model, "data": self._train_data[f"data {task.name}"]}, fields
            )
            for task in self.config.tasks
        }

    @property
    def _probe_inputs(self) -> dict[str, str]:
        return {f"probe {task}": probe.fingerprint for task, probe in self.probe_artifacts.items()}

    @cached_property
    def regions_artifact(self) -> Artifact:
        inputs = {"model": self.model_artifact.fingerprint} | self._probe_inputs
        return self._artifact("regions", "", inputs, self.config.regions.model_dump(mode="json"))

    @cached_property
    def group_artifact(self) -> Artifact:
        fields = self.config.groups.model_dump(mode="json") | {"seed": self.config.seed}
        return self._artifact("group", "", {"regions": self.regions_artifact.fingerprint}, fields)

    def backbone_artifact(self, groups: Sequence[Sequence[str]]) -> Artifact | None:
        """None where no staged backbone is trained."""
        if self.config.backbone.source != "staged":
            return None
        inputs = {"model": self.model_artifact.fingerprint} | self._train_data
        fields = self._training_fields(self.config.backbone_training) | {"groups": [list(group) for group in groups]}
        return self._artifact("backbone", "", inputs, fields)

    def fuse_artifact(self, groups: Sequence[Sequence[str]], backbone: Model) -> Artifact:
        inputs = {"model": self.model_artifact.fingerprint, "regions": self.regions_artifact.fingerprint}
        fields = self.config.fusion.model_dump(mode="json")
        if self.config.fusion.conflict == "last":
            fields["groups"] = [list(group) for group in groups]
        return self._artifact("fuse", "", inputs | self._probe_inputs | {"backbone": backbone.fingerprint}, fields)

    def integrate_artifact(self, groups: Sequence[Sequence[str]], fused: Artifact) -> Artifact:
        integration = self.config.integration
        fields = self._training_fields(integration) | {"groups": [list(group) for group in groups]}
        inputs = {"fused": fused.fingerprint, "regions": self.regions_artifact.fingerprint} | self._train_data
        return self._artifact("integrate", "", inputs, fields)

    def evaluate_artifact(self, model: Model) -> Artifact:
        tasks = self.config.tasks
        inputs = {"model": model.fingerprint} | {f"data {task.name}": source_fingerprint(task.test) for task in tasks}
        fields = self.config.evaluation.model_dump(mode="json") | {"threads": self.config.resources.threads}
        fields["tasks"] = [[task.name, task.metric, task.max_new_tokens] for task in tasks]
        return self._artifact("evaluate", model.title.replace(" ", "-"), inputs, fields)

    # ---- the stages ------------------------------------------------------------------------------------------------

    def pretrained(self) -> Model:
        """θ0 as a safetensors folder."""
        self._make(self.model_artifact, "model θ0", lambda out: materialise(self.config.model, out))
        return Model("base", self.model_artifact.path, self.model_artifact.fingerprint)

    def probe(self) -> dict[str, Model]:
        """Stage 1: one fine-tune a task, all in parallel."""
        base = self.pretrained()
        from cpift.stages import probe_specs

        self._fit(self.probe_artifacts.values(), "probes", lambda: probe_specs(self, base))
        return {
            task: Model(f"probe {task}", made.path, made.fingerprint) for task, made in self.probe_artifacts.items()
        }

    def regions(self) -> Artifact:
        """Stage 2: core regions of all tasks."""
        probes = self.probe()
        from cpift.stages import build_regions

        base = self.pretrained()
        return self._make(self.regions_artifact, "core regions", lambda out: build_regions(self, base, probes, out))

    def group(self) -> Grouping:
        """Stage 3: task groups in stage order."""
        regions = self.regions()
        self._make(self.group_artifact, "task groups", lambda out: self._build_groups(regions, out))
        grouping = self.known_grouping()
        assert grouping is not None
        for warning in set(grouping.warnings) - self._said:
            self.view.warn(warning)
        self._said.update(grouping.warnings)
        return grouping

    def backbone(self) -> Model:
        """Stage 4: θ_base."""
        groups = self.group().groups
        artifact = self.backbone_artifact(groups)
        if artifact is not None:
            base = self.pretrained()
            from cpift.stages import backbone_spec

            self._fit([artifact], "staged backbone", lambda: [backbone_spec(self, base, groups, artifact)])
            return Model("backbone", artifact.path, artifact.fingerprint)
        return self.pretrained() if self.config.backbone.source == "pretrained" else self._given_backbone()

    def fuse(self) -> Model:
        """Stage 5: transplant and SLERP."""
        groups, backbone = self.group().groups, self.backbone()
        artifact = self.fuse_artifact(groups, backbone)
        from cpift.stages import build_fusion

        self._make(artifact, "fusion", lambda out: build_fusion(self, groups, backbone, out))
        return Model("fused", artifact.path, artifact.fingerprint)

    def integrate(self) -> Model:
        """Stage 6: the staged fine-tune with earlier cores frozen."""
        groups, fused = self.group().groups, self.fuse()
        artifact = self.integrate_artifact(groups, self.fuse_artifact(groups, self.backbone()))
        from cpift.stages import integration_spec

        self._fit([artifact], "integration", lambda: [integration_spec(self, fused, groups, artifact)])
        return Model("final", artifact.path, artifact.fingerprint)

    def models(self) -> list[Model]:
        """Every model that is scored, in the report's order, made if need be."""
        final, fused, backbone = self.integrate(), self.fuse(), self.backbone()
        staged = [backbone] if self.config.backbone.source != "pretrained" else []
        return [self.pretrained(), *self.probe().values(), *staged, fused, final]

    def evaluate(self) -> dict[str, dict[str, Any]]:
        """Stage 7: scores by model and task."""
        models = self.models()
        artifacts = {model.title: self.evaluate_artifact(model) for model in models}
        todo = {model.title: model.path for model in models if not artifacts[model.title].complete}

        def keep(title: str, scores: dict[str, Any]) -> None:
            with artifacts[title].build() as out:
                write_json(out / "scores.json", scores)

        if todo:
            self.worked = True
            with self.view.stage(f"evaluation of {len(todo)} models"):
                self._said.add("evaluation")
                self.engine.evaluate(todo, keep, self.view.progress)
        else:
            self._say_cached("evaluation")
        return {title: read_json(made.path / "scores.json") for title, made in artifacts.items()}

    def report(self) -> Path:
        """The page a person reads; written anew each time, for it costs nothing."""
        scores = self.evaluate()
        from cpift.report import summary, write_report
        from cpift.stages import report_data

        data = report_data(self, scores)
        path = self.root / "report.html"
        write_report(data, path)
        write_json(self.root / "summary.json", summary(data))
        write_text(self.root / "config.yaml", data.config_yaml)
        return path

    # ---- helpers ---------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise StageError("this pipeline was made for planning: it has no engine to train and evaluate on")
        return self._engine

    def known_grouping(self) -> Grouping | None:
        """The grouping if it has been made, else None."""
        if not self.group_artifact.complete:
            return None
        kept = read_json(self.group_artifact.path / "groups.json")
        groups = tuple(tuple(group) for group in kept["groups"])
        jaccard = np.array(kept["jaccard"])
        return Grouping(tuple(kept["tasks"]), jaccard, kept["chance"], kept["tau"], groups, tuple(kept["warnings"]))

    def _build_groups(self, regions: Artifact, out: Path) -> None:
        from cpift.regions import read_summary

        found = read_summary(regions.path)
        overlaps = np.array(found["overlaps"])
        grouping = group_tasks(found["tasks"], overlaps, self.config.regions.p, self.config.groups, self.config.seed)
        write_json(out / "groups.json", asdict(grouping) | {"jaccard": grouping.jaccard.tolist()})

    def _given_backbone(self) -> Model:
        """A backbone that the user names: a local directory or a hub id."""
        from cpift.config import ModelConfig

        source, local = self.config.backbone.source, Path(self.config.backbone.source).is_dir()
        given = ModelConfig(
            path=Path(source) if local else None,
            hub=None if local else source,
            revision=self.config.backbone.revision,
            dtype=self.config.model.dtype,
            gguf=None,
            scratch=None,
        )
        artifact = self._artifact("model", "backbone", {"source": model_fingerprint(given)}, {})
        self._make(artifact, "given backbone", lambda out: materialise(given, out))
        return Model("backbone", artifact.path, artifact.fingerprint)

    def _say_cached(self, title: str) -> None:
        if title not in self._said:
            self._said.add(title)
            self.view.cached(title)

    @cached_property
    def _said(self) -> set[str]:
        return set()

    def _make(self, artifact: Artifact, title: str, build: Callable[[Path], None]) -> Artifact:
        if artifact.complete:
            self._say_cached(title)
            return artifact
        self._said.add(title)
        self.worked = True
        with self.view.stage(title), artifact.build() as out:
            build(out)
        return artifact

    def _fit(self, artifacts: Any, title: str, specs: Callable[[], Sequence[Any]]) -> None:
        """Run the fine-tunes whose artifacts are missing, and keep what each exported."""
        missing = [artifact for artifact in artifacts if not artifact.complete]
        if not missing:
            self._say_cached(title)
            return
        self._said.add(title)
        self.worked = True
        wanted = {artifact.work_dir / "export": artifact for artifact in missing}
        chosen = [spec for spec in specs() if spec.export in wanted]
        with self.view.stage(title):
            try:
                self.engine.fit(chosen, self.view.progress)
            finally:  # a failed one does not cost the others
                for export, artifact in wanted.items():
                    if (export / "training.json").is_file():
                        _adopt(artifact, export)


def _adopt(artifact: Artifact, export: Path) -> None:
    """Complete an artifact with the files that a fine-tune exported."""
    from cpift.devices import device_name

    trained = read_json(export / "training.json")
    with artifact.build(trained.get("device", device_name())) as out:
        for path in sorted(export.iterdir()):
            link_or_copy(path, out / path.name)  # not moved: a crash here must leave the export whole
