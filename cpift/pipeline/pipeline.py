"""The stages of CPI-FT in order: probe → regions → group → backbone → fuse → integrate → evaluate.

Each stage is an artifact (see `disk/artifacts.py`), made if it is not there. A stage asks for the ones it needs, so
every stage can be run alone; what each is and does stands in its file in `stages/`. What is trained and scored runs on
an *engine* that the caller passes in (`engine.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cpift.config.run import RunConfig
from cpift.console.view import View
from cpift.disk.artifacts import Artifact
from cpift.evaluation.scores import Score
from cpift.method.groups import Grouping
from cpift.pipeline.engine import Engine
from cpift.pipeline.identity import StageArtifacts
from cpift.pipeline.run import Fit, Run, unless_damaged
from cpift.pipeline.stages import backbone, evaluate, fuse, group, integrate, model, order, probe, regions
from cpift.pipeline.stages.names import Known, ModelRef


@dataclass(frozen=True)
class Baselines:
    """What a run is compared with (`compare/run_baselines.py`).

    make: all of them by title, made if need be, of a run whose own models are there. fits: the fine-tunes among them
    that may run beside the integration, for of the run they need its groups alone.
    """

    make: Callable[[Pipeline], Mapping[str, Artifact]]
    fits: Callable[[Pipeline], Sequence[Fit]]


class Pipeline(Run):
    """One run's stages. Methods named after a stage make it (and what it needs) and return its artifact."""

    artifacts: StageArtifacts

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        view: View | None = None,
        maker: str = "",
        baselines: Baselines | None = None,
    ):
        """`maker`: see `Artifact.maker`.

        baselines: what makes those that `config.baselines` names.
        """
        super().__init__(StageArtifacts(config, maker), engine, view or View())
        self.baselines = baselines

    def pretrained(self) -> ModelRef:
        """θ0 as a safetensors folder."""
        return model.make(self)

    def probe(self) -> dict[str, ModelRef]:
        """Stage 1: θ1..θN by task."""
        return probe.make(self)

    def regions(self) -> Artifact:
        """Stage 2: core regions of all tasks."""
        return regions.make(self)

    def group(self) -> Grouping:
        """Stage 3: task groups in stage order."""
        return group.make(self)

    def backbone(self) -> ModelRef:
        """Stage 4: θ_base."""
        return backbone.make(self)

    def fuse(self) -> ModelRef:
        """Stage 5: the fused model."""
        return fuse.make(self)

    def integrate(self) -> ModelRef:
        """Stage 6: the final model."""
        return integrate.make(self)

    def evaluate(self, models: Sequence[ModelRef] | None = None) -> dict[str, dict[str, Score]]:
        """Stage 7: scores by model and task, of every model or of the ones given."""
        return self._every_score() if models is None else evaluate.make(self, models)

    @unless_damaged
    def _every_score(self) -> dict[str, dict[str, Score]]:
        evaluate.check_rows(self)
        return evaluate.make(self, self.models())

    def models(self) -> list[ModelRef]:
        """Every model that is scored, in the report's order, made if need be."""
        if self.config.integration is not None:
            integrate.make(self, self.baselines.fits(self) if self.baselines else ())
        else:
            self.fuse()
        known = self.known()
        beside = [ModelRef.of(title, artifact) for title, artifact in self.beside().items()]
        return [
            *order.models(self.artifacts, known, *order.FIRST),
            *beside,
            *order.models(self.artifacts, known, *order.LAST),
        ]

    def outputs(self) -> dict[str, Artifact]:
        """Every artifact of a finished run by title."""
        known = self.known()
        return {
            **order.outputs(self.artifacts, known, *order.FIRST),
            **self.beside(),
            **order.outputs(self.artifacts, known, *order.LAST),
            **evaluate.outputs(self.artifacts, self.models()),
        }

    def beside(self) -> Mapping[str, Artifact]:
        """The baselines by title, made if need be."""
        return self.baselines.make(self) if self.baselines else {}

    def known(self) -> Known:
        """The groups that came out, made if need be, and θ_base as it is or will be: a staged one is not trained here.

        Without groups where nothing asks for them.
        """
        if not regions.wanted(self.config):
            return Known(None, model.base(self.artifacts))
        groups = self.group().groups
        staged = self.artifacts.backbone(groups)
        return Known(groups, self.backbone() if staged is None else ModelRef.of("backbone", staged))
