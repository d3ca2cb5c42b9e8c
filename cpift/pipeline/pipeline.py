"""The stages of CPI-FT in order: probe → regions → group → backbone → fuse → integrate → evaluate → report.

Each stage is an artifact (see `disk/artifacts.py`), made if it is not there. A stage asks for the ones it needs, so
every stage can be run alone. What is trained and scored runs on an *engine* that the caller passes in
(`cluster/engine.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cpift.checkpoints.opening import locate, model_files, pinned
from cpift.config.run import ModelConfig, RunConfig
from cpift.console.view import View
from cpift.disk.artifact_state import note_times
from cpift.disk.artifacts import Artifact, claimed, require_sound
from cpift.disk.files import read_json
from cpift.disk.guarded import guarded_reads
from cpift.disk.input_watch import noted, unchanged
from cpift.errors import DamagedInput
from cpift.method.groups import Grouping
from cpift.models.sources import materialise
from cpift.pipeline.engine import Engine, Finish, fit_all, keep_scores
from cpift.pipeline.identity import Model, StageArtifacts
from cpift.training.spec import FitSpec

if TYPE_CHECKING:
    from cpift.merging.engine import Merging
    from cpift.report.write import ReportData


Result = TypeVar("Result")
Baselines = Callable[["Pipeline"], Mapping[str, Artifact]]  # by title
_DAMAGED_AT_MOST = 100  # inputs that come out damaged in one stage


def _unless_damaged(stage: Callable[[Pipeline], Result]) -> Callable[[Pipeline], Result]:
    """A stage that begins again where an input came out damaged: it was set aside, so this time it is made."""

    @wraps(stage)
    def made(run: Pipeline) -> Result:
        for _ in range(_DAMAGED_AT_MOST):
            try:
                return stage(run)
            except DamagedInput:
                continue
        return stage(run)

    return made


class Pipeline:
    """One run's stages. Methods named after a stage make it (and what it needs) and return its artifact."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        view: View | None = None,
        merging: Merging | None = None,
        maker: str = "",
        baselines: Baselines | None = None,
    ):
        """`merging`: where regions and fusion run, if not in this process. `maker`: see `Artifact.maker`.

        baselines: makes what `config.baselines` names, if need be, of a run whose own models are there.
        """
        self.config, self.view, self.merging, self.baselines = config, view or View(), merging, baselines
        self.artifacts = StageArtifacts(config, maker)
        self.engine, self.root = engine, config.output_dir
        self.worked = False  # whether any stage had to be made
        self.said: set[str] = set()  # what was told of already

    @contextmanager
    def session(self) -> Iterator[None]:
        """Keep one connection to where things run over several stages."""
        with self.merging.session() if self.merging else nullcontext(), self.engine.session():
            yield

    # ---- the stages ------------------------------------------------------------------------------------------------

    def pretrained(self) -> Model:
        """θ0 as a safetensors folder."""
        if not self.artifacts.in_place:
            self._make(self.artifacts.model, "model θ0", lambda out: _copied(self.artifacts.source, out))
        return self.artifacts.base

    @_unless_damaged
    def probe(self) -> dict[str, Model]:
        """Stage 1: one fine-tune a task, all in parallel; tasks that have their checkpoint keep it."""
        if missing := sum(not artifact.complete for artifact in self.artifacts.probes.values()):
            self.engine.expect(missing)
        base = self.pretrained()
        if not self.artifacts.probes:
            return self.artifacts.tuned
        from cpift.pipeline.stages import check_data, probe_specs

        if not all(artifact.complete for artifact in self.artifacts.probes.values()):
            check_data(self, base)
        self.train(self.artifacts.probes.values(), "probes", lambda: probe_specs(self, base))
        return self.artifacts.tuned

    @_unless_damaged
    def regions(self) -> Artifact:
        """Stage 2: core regions of all tasks."""
        self.probe()
        from cpift.pipeline.stages import build_regions

        return self._make(
            self.artifacts.regions,
            "core regions",
            lambda out: build_regions(self, out),
            [self.artifacts.base.path, *(model.path for model in self.artifacts.tuned.values())],
        )

    @_unless_damaged
    def group(self) -> Grouping:
        """Stage 3: task groups in stage order."""
        regions = self.regions()
        from cpift.pipeline.stages import build_groups

        self._make(self.artifacts.group, "task groups", lambda out: build_groups(self, regions, out))
        grouping = self.artifacts.known_grouping()
        assert grouping is not None
        for warning in set(grouping.warnings) - self.said:
            self.view.warn(warning)
        self.said.update(grouping.warnings)
        return grouping

    @_unless_damaged
    def backbone(self) -> Model:
        """Stage 4: θ_base."""
        if self.config.backbone_source == "pretrained":
            return self.pretrained()
        groups = self.group().groups
        artifact = self.artifacts.backbone(groups)
        if artifact is not None:
            base = self.pretrained()
            from cpift.pipeline.stages import backbone_spec

            self.train([artifact], "staged backbone", lambda: [backbone_spec(self, base, groups, artifact)])
            return Model.of("backbone", artifact)
        return self._given_backbone()

    @_unless_damaged
    def fuse(self) -> Model:
        """Stage 5: transplant and SLERP; or another merge of the probes, which needs no regions and no backbone."""
        self.probe()
        if self.config.fusion.isolates:
            groups, backbone = self.group().groups, self.backbone()
        else:
            groups, backbone = (), self.pretrained()
        artifact = self.artifacts.fuse(groups, backbone)
        from cpift.pipeline.stages import build_fusion

        read = [self.artifacts.base.path, backbone.path, *(model.path for model in self.artifacts.tuned.values())]
        title = "fusion" if self.config.fusion.isolates else f"merge: {self.config.fusion.method}"
        self._make(artifact, title, lambda out: build_fusion(self, groups, backbone, out), read)
        if self.merging:
            self.merging.publish(artifact.path, artifact.fingerprint)
        return Model.of("fused", artifact)

    @_unless_damaged
    def integrate(self) -> Model:
        """Stage 6: the staged fine-tune with earlier cores frozen."""
        groups, fused = self.group().groups, self.fuse()
        artifact = self.artifacts.integrate(groups, self.artifacts.fuse(groups, self.backbone()))
        from cpift.pipeline.stages import add_card, integration_spec

        specs = [integration_spec(self, fused, groups, artifact)]
        self.train(
            [artifact], "integration", lambda: specs, lambda made, out: add_card(self, "final", groups, made, out)
        )
        return Model.of("final", artifact)

    def models(self) -> list[Model]:
        """Every model that is scored, in the report's order, made if need be."""
        final = [self.integrate()] if self.config.integration is not None else []
        staged = [self.backbone()] if self.config.backbone_source != "pretrained" else []
        beside = [Model.of(title, one) for title, one in self.baselines(self).items()] if self.baselines else []
        return [self.pretrained(), *self.probe().values(), *staged, *beside, self.fuse(), *final]

    def evaluate(self, models: Sequence[Model] | None = None) -> dict[str, dict[str, Any]]:
        """Stage 7: scores by model and task, of every model or of the ones given."""
        return self._every_score() if models is None else self._scores(models)

    @_unless_damaged
    def _every_score(self) -> dict[str, dict[str, Any]]:
        self._check_rows()
        return self._scores(self.models())

    def _scores(self, models: Sequence[Model]) -> dict[str, dict[str, Any]]:
        artifacts = {model.title: self.artifacts.evaluate(model) for model in models}
        if all(artifact.complete for artifact in artifacts.values()):
            self._say_cached("evaluation")
        else:
            with claimed((one for one in artifacts.values() if not one.complete), self.view.warn):
                self._score(models, artifacts)
        return {title: read_json(made.path / "scores.json") for title, made in artifacts.items()}

    @cached_property
    def report_data(self) -> ReportData:
        """What the report shows: scores, regions, fusion, training, checks and provenance."""
        scores = self.evaluate()
        from cpift.pipeline.stages import report_data

        return report_data(self, scores)

    def report(self) -> Path:
        """The page a person reads; written anew each time, for it costs nothing."""
        data = self.report_data
        from cpift.pipeline.stages import tell_verdict
        from cpift.report.write import write_run

        tell_verdict(self, data.headline)
        with self.view.stage("report"):
            return write_run(data, self.root)

    # ---- helpers ---------------------------------------------------------------------------------------------------

    def _given_backbone(self) -> Model:
        """A backbone that the user names: a local directory or a hub id."""
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
            return self.artifacts.given("backbone", "backbone.source", given)
        given = pinned(given)
        artifact = self.artifacts.model_of("backbone.source", "backbone", given)
        self._make(artifact, "given backbone", lambda out: _copied(given, out))
        return Model.of("backbone", artifact)

    def _check_rows(self) -> None:
        """Where all probes are given no fine-tune has looked at the data before fusion: do it here."""
        if not self.artifacts.probes and not self.artifacts.evaluate(self.artifacts.base).complete:
            from cpift.pipeline.stages import check_data

            check_data(self, self.pretrained())

    def _score(self, models: Sequence[Model], artifacts: Mapping[str, Artifact]) -> None:
        """Score the models whose scores are missing, and keep each one's as soon as it is there."""
        from cpift.pipeline.stages import loadable

        todo = {
            model.title: loadable(self, model, artifacts[model.title])
            for model in models
            if not artifacts[model.title].complete
        }

        def keep(title: str, result: dict[str, Any]) -> None:
            keep_scores(artifacts[title], result, changes[title])

        self.worked = True
        self.said.add("evaluation")
        require_sound(todo.values(), self.root, self.view.warn)
        changes = {title: noted(model_files(path)) for title, path in todo.items()}
        with self.view.stage("evaluation", list(todo)):
            self.engine.evaluate(todo, keep, self.view.progress)

    def _say_cached(self, title: str) -> None:
        if title not in self.said:
            self.said.add(title)
            self.view.cached(title)

    def _make(
        self, artifact: Artifact, title: str, build: Callable[[Path], None], read: Sequence[Path] = ()
    ) -> Artifact:
        """Make an artifact unless it is there; `read`: the folders that are read for it."""
        masks = artifact.stage == "regions"  # all of their bytes are looked at every time
        if artifact.state(thorough=masks).kind == "whole":
            note_times(artifact.path)
            self._say_cached(title)
            return artifact
        with claimed([artifact], self.view.warn):
            artifact.set_aside_if_damaged(self.view.warn, thorough=masks)
            if artifact.whole:  # another process made it while this one waited
                return artifact
            require_sound(read, self.root, self.view.warn)
            self.said.add(title)
            self.worked = True
            from cpift.devices import device_name

            files = [file for folder in read for file in model_files(folder)]
            with (
                artifact.compared(self.view.warn),
                self.view.stage(title),
                artifact.build(device_name()) as out,
                guarded_reads(artifact.title, files),
            ):
                build(out)
        return artifact

    def train(
        self,
        artifacts: Iterable[Artifact],
        title: str,
        specs: Callable[[], Sequence[FitSpec]],
        finish: Finish = lambda made, out: None,
    ) -> None:
        """Run the fine-tunes whose artifacts are missing, and keep what each exported."""
        artifacts = list(artifacts)
        missing = [artifact for artifact in artifacts if not artifact.whole]
        for artifact in artifacts:
            if artifact not in missing:
                note_times(artifact.path)
        if not missing:
            self._say_cached(title)
            return
        self.said.add(title)
        self.worked = True
        fit_all(self.engine.fit, self.view, title, missing, specs(), finish)


def _copied(source: ModelConfig, out: Path) -> None:
    """Write θ0, or a given backbone, into `out`. Raises ChangedInput where a hub's files change while they are read."""
    files = model_files(locate(source)) if source.hub is not None else []
    with unchanged(f"the copy of {source.hub}", files):
        materialise(source, out)
