"""One run, described. Every field of a run's YAML file, its meaning, unit and default.

Relative paths of inputs are resolved against the folder of the YAML file; `output` against the working directory.
`${NAME}` in a path is replaced from the environment, and nowhere else (`paths.py`). Loading is in
`loading.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cpift.config.fusion import THETA0, ZERO, FusionConfig
from cpift.config.identity import FITS, identity
from cpift.config.inputs import (
    CheckpointConfig,
    DataSource,
    ModelConfig,
    Name,
    Section,
    Seed,
    exactly_one,
    needed,
)
from cpift.config.resources import ResourcesConfig
from cpift.config.tasks import OF_PARENT, BaselinesConfig, EvaluationConfig, ParentConfig, TaskConfig
from cpift.config.training import IntegrationConfig, Tracker, TrainingConfig
from cpift.config.words import MeasureName, ScopeName

__all__ = [
    "BackboneConfig",
    "CheckpointConfig",
    "DataSource",
    "EvaluationConfig",
    "FusionConfig",
    "GroupsConfig",
    "IntegrationConfig",
    "ModelConfig",
    "Name",
    "ParentConfig",
    "RegionsConfig",
    "ResourcesConfig",
    "RunConfig",
    "Section",
    "TaskConfig",
    "TrainingConfig",
]
Pattern = Annotated[str, Field(max_length=1000)]  # the time that a bracket takes to read grows with its square
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]


class RegionsConfig(Section):
    """Core regions Ci: the ⌊p·D⌋ elements that moved most."""

    p: Fraction = Field(0.01, **identity("regions"), description="core fraction (a fraction: the paper's 1 % is 0.01)")
    scope: ScopeName = Field(
        "global",
        **identity("regions"),
        description="global: the top ⌊p·D⌋ of all parameters at once (paper); tensor: p of each tensor",
    )
    measure: MeasureName = Field(
        "update",
        **identity("regions", absent="update", swept=True),
        description="what an element is chosen by: update: |θi − θ0| (paper); significance: |θi − θ0|·|θ0|, "
        "which takes large updates of large weights; curvature: (θi − θ0)²·vi, vi the second moments of the "
        "fine-tune: probe.keep_moments, tasks.N.moments",
    )
    placement: Literal["chosen", "random"] = Field(
        "chosen",
        **identity("regions", absent="chosen"),
        description="random: as many elements of every tensor, elsewhere: the control that says whether it matters "
        "which elements are a core",
    )
    include: tuple[Pattern, ...] = Field(("*",), **identity("regions"), description="glob patterns of parameter names")
    exclude: tuple[Pattern, ...] = Field(
        (), **identity("regions"), description="glob patterns taken out again, for example '*embed*'"
    )


class GroupsConfig(Section):
    """Task groups: connected components of the graph with an edge where S(i,j) ≥ τ."""

    tau: float | None = Field(
        None, **identity("group"), ge=0, le=1, description="absolute Jaccard threshold (paper: 0.1)"
    )
    tau_chance: float | None = Field(
        None, **identity("group"), gt=0, description="threshold as a multiple of chance, p/(2−p)"
    )
    order: Literal["random", "given", "similarity"] = Field(
        "random",
        **identity("group"),
        description="of the groups, and so of the stages: random (paper), by the seed; given: as tasks stand here; "
        "similarity: the group most like the last is the next",
    )

    @model_validator(mode="after")
    def _one_threshold(self) -> GroupsConfig:
        exactly_one(self, ("tau", "tau_chance"))
        return self


class BackboneConfig(Section):
    """θ_base, into which cores are transplanted."""

    source: str = Field(
        "staged",
        **identity("backbone", "fuse", by="what it names"),
        description="staged (paper) | pretrained | a local directory or hub id",
    )
    revision: str | None = Field(
        None, **identity("fuse", by="the commit it means"), description="branch, tag or commit of a hub id"
    )
    training: TrainingConfig | None = Field(
        None,
        **identity("backbone", by="its parts, else probe's"),
        description="of each stage of `staged`; default: as `probe`",
    )

    @model_validator(mode="after")
    def _no_moments(self) -> BackboneConfig:
        if self.training is not None and self.training.keep_moments:
            raise ValueError("training.keep_moments: nothing reads those of the backbone; give it to `probe`")
        return self


class RunConfig(Section):
    """A whole run of CPI-FT."""

    name: Name = Field(**identity(), description="of the run; its folder and models are called so")
    output: Path | None = Field(
        None, **identity(), description="folder for everything the run makes; default: runs/<name>"
    )
    seed: Seed = Field(
        0,
        **identity("probe", "group", "backbone", "merge", "integrate", by="itself; of merge only dare's"),
        description="of random weights, the order of rows and of groups, and what dare drops",
    )
    model: ModelConfig = Field(**identity("model", by="its parts"))
    tasks: tuple[TaskConfig, ...] = Field(
        **identity("probe", "regions", "group", "backbone", "fuse", "merge", "integrate", "evaluate", by="their parts"),
        min_length=1,
        max_length=16,
    )
    probe: TrainingConfig | None = Field(
        None,
        **identity("probe", "backbone", by="its parts"),
        description="how probes are trained; needed unless all are given",
    )
    regions: RegionsConfig = Field(RegionsConfig(), **identity("regions"))
    groups: GroupsConfig = Field(GroupsConfig(tau=0.1, tau_chance=None), **identity("group"))
    backbone: BackboneConfig = Field(BackboneConfig(), **identity("backbone", "fuse", by="its parts"))
    fusion: FusionConfig = Field(FusionConfig(), **identity("fuse", "merge"))
    integration: IntegrationConfig | None = Field(
        None, **identity("integrate"), description="needed by `cpift integrate` and `run`"
    )
    evaluation: EvaluationConfig = Field(EvaluationConfig(), **identity("evaluate"))
    baselines: BaselinesConfig | None = Field(
        None,
        **identity(absent=None),
        description="made and scored beside the run's own models, for example {linear: {}, ties: {}, full_sft: {}}",
    )
    resources: ResourcesConfig = Field(ResourcesConfig(), **identity(*FITS, "evaluate"))
    parent: ParentConfig | None = Field(
        None,
        **identity("backbone", *OF_PARENT, by="its parts", absent=None),
        description="the finished run that this one goes on from; written by `cpift extend` and `cpift forget`",
    )
    tracking: tuple[Tracker, ...] = Field(
        ("tensorboard",),
        **identity(),
        description="where losses go while training: tensorboard (files in <output>/logs); all others, of which "
        "transformers has the callback, as their own environment variables say (MLFLOW_TRACKING_URI, WANDB_PROJECT)",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> RunConfig:
        names = [task.name.lower() for task in self.every_task]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tasks: {', '.join(repr(n) for n in twice)} is named twice; give every task its own name")
        return self

    @model_validator(mode="after")
    def _judge_is_named(self) -> RunConfig:
        judged = [task.name for task in self.scored if task.metric == "judge"]
        if judged and self.evaluation.judge is None:
            raise ValueError(f"tasks {', '.join(judged)}: metric judge needs evaluation.judge with `url` and `model`")
        return self

    @model_validator(mode="after")
    def _trainings_fit_the_strategy(self) -> RunConfig:
        self.resources.refuse("probe", self.probe)
        self.resources.refuse("backbone.training", self.backbone.training)
        self.resources.refuse("integration", self.integration)
        return self

    @property
    def output_dir(self) -> Path:
        return (self.output or Path("runs") / self.name).absolute()

    @model_validator(mode="after")
    def _weights_name_tasks(self) -> RunConfig:
        known = {task.name for task in self.tasks}
        for field, named in (("weights", self.fusion.weights), ("densities", self.fusion.densities)):
            if unknown := [name for name in named if name not in known]:
                raise ValueError(f"fusion.{field}: {unknown[0]!r} is no task; there are {', '.join(sorted(known))}")
        return self

    @model_validator(mode="after")
    def _slices_and_tokens_are_of_given_models(self) -> RunConfig:
        fusion, known = self.fusion, [THETA0, *(task.name for task in self.tasks)]
        if not fusion.by_tokens and (fusion.tokens or fusion.pad_to_multiple_of):
            raise ValueError("fusion.tokens, pad_to_multiple_of: are of a vocabulary by tokens; set fusion.vocabulary")
        for field in (["slices"] if fusion.slices else []) + (["vocabulary"] if fusion.by_tokens else []):
            self._require_merged_whole(f"fusion.{field}", known)
        named = [source.model for one in fusion.slices for source in one.sources]
        asked = [one.source for one in fusion.tokens.values() if one.source not in (None, ZERO)]
        kept = [fusion.vocabulary] if fusion.by_tokens and fusion.vocabulary != "union" else []
        for field, names in (("slices", named), ("tokens", asked), ("vocabulary", kept)):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"fusion.{field}: {unknown[0]!r} is no model; there are {', '.join(known)}")
        if fusion.slices and (idle := [name for name in known[1:] if name not in named]):
            raise ValueError(f"fusion.slices: have no layers of tasks.{idle[0]}; leave that task out")
        return self

    def _require_merged_whole(self, field: str, known: list[str]) -> None:
        """Whether all of a model is merged at once, and nothing goes on from it or stands beside it."""
        if self.fusion.isolates:
            raise ValueError(f"{field}: cpift's core regions are of θ0's layers and tokens; name another fusion.method")
        for name, given in (("integration", self.integration), ("baselines", self.baselines)):
            if given is not None:
                raise ValueError(
                    f"{name}: is of θ0's layers and tokens, and {field} makes others; leave one of them out"
                )
        if self.model.kind not in ("path", "hub"):
            what = f"is of models as their files have them, and θ0 is made of model.{self.model.kind}"
            raise ValueError(f"{field}: {what}; save it as a folder with transformers, and give model.path")
        if twice := [name for name in (THETA0, ZERO, "union", "error") if known.count(name) > (name == THETA0)]:
            raise ValueError(f"{field}: {twice[0]!r} is no task's name there; name the task otherwise")
        if trained := [task.name for task in self.trained]:
            raise ValueError(f"{field}: tasks.{trained[0]} has no `checkpoint`, and this is of given models")

    @model_validator(mode="after")
    def _probes_can_be_had(self) -> RunConfig:
        for task in self.trained:
            if task.train is None:
                raise ValueError(f"tasks.{task.name}: give `train` to train its probe, or the `checkpoint` to use")
            if self.probe is None:
                raise ValueError(f"probe: is required, for tasks.{task.name} has no checkpoint")
        return self

    @model_validator(mode="after")
    def _extends_as_it_can(self) -> RunConfig:
        if not self.earlier:
            return self
        if not self.fusion.isolates or not self.fusion.transplant:
            field = "fusion.transplant" if self.fusion.isolates else "fusion.method"
            raise ValueError(f"{field}: leaves no core in place, and earlier tasks keep theirs; set it to its default")
        if self.baselines is not None:
            raise ValueError(
                "baselines: are made of all tasks' fine-tunes, and earlier ones are not here; leave it out"
            )
        if self.integration is not None and (self.integration.freeze == "none" or self.integration.penalty is not None):
            raise ValueError("integration: protects earlier cores with `freeze: earlier` or `all`, without `penalty`")
        return self

    @property
    def earlier(self) -> tuple[TaskConfig, ...]:
        """Tasks inside the model that this run goes on from: their cores stay, and they have no probe here."""
        return self.parent.tasks if self.parent is not None else ()

    @property
    def every_task(self) -> tuple[TaskConfig, ...]:
        """Earlier tasks, and this run's own."""
        return (*self.earlier, *self.tasks)

    @property
    def scored(self) -> tuple[TaskConfig, ...]:
        """Tasks that models are scored on: earlier ones as far as there are rows for it."""
        return (*(task for task in self.earlier if task.source("test") is not None), *self.tasks)

    @property
    def integrated(self) -> tuple[TaskConfig, ...]:
        """Tasks that the integration trains on: this run's own, and earlier ones that are replayed."""
        replay = self.parent.replay if self.parent is not None else ()
        return (*self.tasks, *(task for task in self.earlier if task.name in replay))

    @property
    def trained(self) -> tuple[TaskConfig, ...]:
        """The tasks whose probes are trained here."""
        return tuple(task for task in self.tasks if task.checkpoint is None)

    @property
    def merges_only(self) -> bool:
        """Whether everything up to the fused model is given: no fine-tune, θ0 and all θi used where they lie."""
        return not self.trained and not self.earlier and self.backbone_source != "staged"

    @property
    def scores(self) -> bool:
        """Whether every task has rows to score on."""
        return all(task.source("test") is not None for task in self.tasks)

    @property
    def backbone_source(self) -> str:
        """`backbone.source`; `pretrained` for methods of fusion that know no backbone, for they merge onto θ0; `parent`
        where earlier tasks are inside a model already: that one."""
        if self.earlier:
            return "parent"
        return self.backbone.source if self.fusion.isolates else "pretrained"

    @property
    def probe_training(self) -> TrainingConfig:
        return needed(self.probe, "probe", "training")

    @property
    def backbone_training(self) -> TrainingConfig:
        """The probes' where it has no section of its own, but for what probes alone keep."""
        training = self.backbone.training or needed(self.probe, "backbone.training", "the staged backbone")
        return training.model_copy(update={"keep_moments": False})

    @property
    def integration_training(self) -> IntegrationConfig:
        return needed(self.integration, "integration", "integrated fine-tuning")

    def task(self, name: str) -> TaskConfig:
        return next(task for task in self.every_task if task.name == name)
