"""The stages of CPI-FT in order: probe → regions → group → backbone → fuse → integrate → evaluate → report.

Each stage is an artifact (see `artifacts.py`), made if it is not there. A stage asks for the ones it needs, so every
stage can be run alone. What is trained and scored runs on an *engine* that the caller passes in (`distributed.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cpift.artifacts import Artifact
from cpift.config import RunConfig
from cpift.errors import CpiftError
from cpift.files import link_or_copy, read_json, write_json
from cpift.fit_spec import FitSpec
from cpift.given import given_fingerprint, locate
from cpift.grouping import Grouping, group_tasks
from cpift.locks import claimed
from cpift.models import materialise, model_fingerprint
from cpift.stage_artifacts import Model, StageArtifacts
from cpift.view import View

if TYPE_CHECKING:
    from cpift.merging import Merging
    from cpift.report import ReportData


Finish = Callable[[Artifact, Path], None]  # adds to what a fine-tune exported before its artifact is complete


class Engine(Protocol):
    """Where fine-tunes and evaluations run."""

    def session(self) -> AbstractContextManager[None]:
        """Keep one connection over several stages."""

    def fit(self, specs: Sequence[FitSpec], on_progress: Callable[[dict[str, Any]], None]) -> None:
        """Run every FitSpec; each leaves its model in its `export`."""

    def evaluate(
        self,
        models: dict[str, Path],
        on_result: Callable[[str, dict[str, Any]], None],
        on_progress: Callable[[dict[str, Any]], None],
    ) -> None:
        """Score every model on every task; a result holds `scores`, `seconds` and `device`."""


class NoEngine:
    """The engine of runs in which nothing is trained or scored."""

    def session(self) -> AbstractContextManager[None]:
        return nullcontext()

    def fit(self, specs: Sequence[FitSpec], on_progress: Callable[[dict[str, Any]], None]) -> None:
        raise CpiftError(f"{', '.join(spec.title for spec in specs)}: this command trains nothing")

    def evaluate(
        self,
        models: dict[str, Path],
        on_result: Callable[[str, dict[str, Any]], None],
        on_progress: Callable[[dict[str, Any]], None],
    ) -> None:
        raise CpiftError(f"{', '.join(models)}: this command scores nothing")


class Pipeline:
    """One run's stages. Methods named after a stage make it (and what it needs) and return its artifact."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        view: View | None = None,
        merging: Merging | None = None,
        maker: str = "",
    ):
        """`merging`: where regions and fusion run, if not in this process. `maker`: see `Artifact.maker`."""
        self.config, self.view, self.merging = config, view or View(), merging
        self.artifacts = StageArtifacts(config, maker)
        self.engine = engine
        self.worked = False  # whether any stage had to be made
        self.root = config.output_dir

    @contextmanager
    def session(self) -> Iterator[None]:
        """Keep one connection to where things run over several stages."""
        with self.engine.session(), self.merging.session() if self.merging else nullcontext():
            yield

    # ---- the stages ------------------------------------------------------------------------------------------------

    def pretrained(self) -> Model:
        """θ0 as a safetensors folder."""
        if not self.artifacts.in_place:
            self._make(self.artifacts.model, "model θ0", lambda out: materialise(self.config.model, out))
        return self.artifacts.base

    def probe(self) -> dict[str, Model]:
        """Stage 1: one fine-tune a task, all in parallel; tasks that have their checkpoint keep it."""
        base = self.pretrained()
        if not self.artifacts.probes:
            return self.artifacts.tuned
        from cpift.stages import check_data, probe_specs

        if not all(artifact.complete for artifact in self.artifacts.probes.values()):
            check_data(self, base)
        self._fit(self.artifacts.probes.values(), "probes", lambda: probe_specs(self, base))
        return self.artifacts.tuned

    def regions(self) -> Artifact:
        """Stage 2: core regions of all tasks."""
        self.probe()
        from cpift.stages import build_regions

        return self._make(self.artifacts.regions, "core regions", lambda out: build_regions(self, out))

    def group(self) -> Grouping:
        """Stage 3: task groups in stage order."""
        regions = self.regions()
        self._make(self.artifacts.group, "task groups", lambda out: self._build_groups(regions, out))
        grouping = self.artifacts.known_grouping()
        assert grouping is not None
        for warning in set(grouping.warnings) - self._said:
            self.view.warn(warning)
        self._said.update(grouping.warnings)
        return grouping

    def backbone(self) -> Model:
        """Stage 4: θ_base."""
        if self.config.backbone_source == "pretrained":
            return self.pretrained()
        groups = self.group().groups
        artifact = self.artifacts.backbone(groups)
        if artifact is not None:
            base = self.pretrained()
            from cpift.stages import backbone_spec

            self._fit([artifact], "staged backbone", lambda: [backbone_spec(self, base, groups, artifact)])
            return Model.of("backbone", artifact)
        return self._given_backbone()

    def fuse(self) -> Model:
        """Stage 5: transplant and SLERP; or another merge of the probes, which needs no regions and no backbone."""
        self.probe()
        if self.config.fusion.method == "cpift":
            groups, backbone = self.group().groups, self.backbone()
        else:
            groups, backbone = (), self.pretrained()
        artifact = self.artifacts.fuse(groups, backbone)
        from cpift.stages import build_fusion

        self._make(artifact, "fusion", lambda out: build_fusion(self, groups, backbone, out))
        if self.merging:
            self.merging.publish(artifact.path, artifact.fingerprint)
        return Model.of("fused", artifact)

    def integrate(self) -> Model:
        """Stage 6: the staged fine-tune with earlier cores frozen."""
        groups, fused = self.group().groups, self.fuse()
        artifact = self.artifacts.integrate(groups, self.artifacts.fuse(groups, self.backbone()))
        from cpift.stages import add_card, integration_spec

        specs = [integration_spec(self, fused, groups, artifact)]
        self._fit(
            [artifact], "integration", lambda: specs, lambda made, out: add_card(self, "final", groups, made, out)
        )
        return Model.of("final", artifact)

    def models(self) -> list[Model]:
        """Every model that is scored, in the report's order, made if need be."""
        final, fused, backbone = self.integrate(), self.fuse(), self.backbone()
        staged = [backbone] if self.config.backbone_source != "pretrained" else []
        return [self.pretrained(), *self.probe().values(), *staged, fused, final]

    def evaluate(self, models: Sequence[Model] | None = None) -> dict[str, dict[str, Any]]:
        """Stage 7: scores by model and task, of every model or of the ones given."""
        models = self.models() if models is None else models
        artifacts = {model.title: self.artifacts.evaluate(model) for model in models}
        if all(artifact.complete for artifact in artifacts.values()):
            self._say_cached("evaluation")
        else:
            with claimed(artifact for artifact in artifacts.values() if not artifact.complete):
                self._score(models, artifacts)
        return {title: read_json(made.path / "scores.json") for title, made in artifacts.items()}

    @cached_property
    def report_data(self) -> ReportData:
        """What the report shows: scores, regions, fusion, training, checks and provenance."""
        scores = self.evaluate()
        from cpift.stages import report_data

        return report_data(self, scores)

    def report(self) -> Path:
        """The page a person reads; written anew each time, for it costs nothing."""
        data = self.report_data
        from cpift.report import write_run

        return write_run(data, self.root)

    # ---- helpers ---------------------------------------------------------------------------------------------------

    def _build_groups(self, regions: Artifact, out: Path) -> None:
        from cpift.regions import read_summary

        found, tasks = read_summary(regions.path), [task.name for task in self.config.tasks]
        places = [found["tasks"].index(task) for task in tasks]  # another order of tasks may have made the regions
        overlaps = np.array(found["overlaps"])[np.ix_(places, places)]
        grouping = group_tasks(tasks, overlaps, self.config.regions.p, self.config.groups, self.config.seed)
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
        if self.config.merges_only and given.dtype == "auto":
            return Model("backbone", locate(given), given_fingerprint(given))
        artifact = self.artifacts.artifact("model", "backbone", {"source": model_fingerprint(given)}, {})
        self._make(artifact, "given backbone", lambda out: materialise(given, out))
        return Model.of("backbone", artifact)

    def _score(self, models: Sequence[Model], artifacts: Mapping[str, Artifact]) -> None:
        """Score the models whose scores are missing, and keep each one's as soon as it is there."""
        todo = {model.title: model.path for model in models if not artifacts[model.title].complete}

        def keep(title: str, result: dict[str, Any]) -> None:
            with artifacts[title].build(result["device"], result["seconds"]) as out:
                write_json(out / "scores.json", result["scores"])

        self.worked = True
        self._said.add("evaluation")
        with self.view.stage(f"evaluation of {len(todo)} models"):
            self.engine.evaluate(todo, keep, self.view.progress)

    def _say_cached(self, title: str) -> None:
        if title not in self._said:
            self._said.add(title)
            self.view.cached(title)

    @cached_property
    def _said(self) -> set[str]:
        return set()

    def _make(self, artifact: Artifact, title: str, build: Callable[[Path], None]) -> Artifact:
        if artifact.whole:
            self._say_cached(title)
            return artifact
        with claimed([artifact]):
            if artifact.whole:  # another process made it while this one waited
                return artifact
            self._said.add(title)
            self.worked = True
            from cpift.devices import device_name

            with artifact.compared(self.view.warn), self.view.stage(title), artifact.build(device_name()) as out:
                build(out)
        return artifact

    def _fit(
        self,
        artifacts: Iterable[Artifact],
        title: str,
        specs: Callable[[], Sequence[FitSpec]],
        finish: Finish = lambda made, out: None,
    ) -> None:
        """Run the fine-tunes whose artifacts are missing, and keep what each exported."""
        missing = [artifact for artifact in artifacts if not artifact.whole]
        if not missing:
            self._say_cached(title)
            return
        self._said.add(title)
        self.worked = True
        fit_all(self.engine.fit, self.view, title, missing, specs(), finish)


def fit_all(
    fit: Callable[[Sequence[FitSpec], Callable[[dict[str, Any]], None]], None],
    view: View,
    title: str,
    artifacts: Sequence[Artifact],
    specs: Sequence[FitSpec],
    finish: Finish = lambda made, out: None,
) -> None:
    """Run the fine-tunes that export for these artifacts, and complete each one that ended.

    `fit`: as `Engine.fit`.
    """
    with claimed(artifacts):
        wanted = {artifact.work_dir / "export": artifact for artifact in artifacts if not artifact.whole}
        chosen = [spec for spec in specs if spec.export in wanted]
        if not chosen:  # other processes made them while this one waited
            return
        with view.stage(title):
            try:
                fit(chosen, view.progress)
            finally:  # a failed one does not cost the others
                for export, artifact in wanted.items():
                    if (export / "training.json").is_file():
                        with artifact.compared(view.warn):
                            _adopt(artifact, export, finish)


def _adopt(artifact: Artifact, export: Path, finish: Finish) -> None:
    """Complete an artifact with the files that a fine-tune exported."""
    trained = read_json(export / "training.json")
    with artifact.build(trained["device"], trained["seconds"]) as out:
        for path in sorted(export.iterdir()):
            link_or_copy(path, out / path.name)  # not moved: a crash here must leave the export whole
        finish(artifact, out)
