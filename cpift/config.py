"""One run, described. Every field of a run's YAML file, its meaning, unit and default.

Relative paths of inputs are resolved against the folder of the YAML file; `output` against the working directory.
`${NAME}` in a path is replaced from the environment. Loading is in `config_loading.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cpift.config_inputs import (
    Bytes,
    CheckpointConfig,
    DataSource,
    ModelConfig,
    Name,
    Section,
    exactly_one,
    needed,
)
from cpift.config_training import IntegrationConfig, ResourcesConfig, TaskResources, Tracker, TrainingConfig

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]


class TaskConfig(Section):
    """One task Ti: its fine-tune or the data to make it from, and how it is scored."""

    name: Name
    checkpoint: CheckpointConfig | None = Field(None, description="θi, used instead of training a probe")
    train: DataSource | None = Field(None, description="rows to train on; needed unless `checkpoint` is given")
    test: DataSource | None = Field(None, description="rows to score on; needed by `cpift evaluate` and `run`")
    metric: Literal["loss", "choice", "number", "rouge"] = Field(
        "loss",
        description="choice: accuracy by option likelihood; number: exact match of the final number generated; "
        "rouge: ROUGE-L F1 of the text generated; loss: negative log-likelihood per answer token only",
    )
    max_new_tokens: int = Field(128, ge=1, description="generation limit for `number` and `rouge`")
    resources: TaskResources = TaskResources(
        workers=None, cpus_per_worker=None, gpus_per_worker=None, threads_per_worker=None
    )

    @property
    def train_data(self) -> DataSource:
        return needed(self.train, f"tasks.{self.name}.train", "training")

    @property
    def test_data(self) -> DataSource:
        return needed(self.test, f"tasks.{self.name}.test", "evaluation")


class RegionsConfig(Section):
    """Core regions Ci: the ⌊p·D⌋ elements that moved most."""

    p: Fraction = Field(0.01, description="core fraction (a fraction: the paper's 1 % is 0.01)")
    scope: Literal["global", "tensor"] = Field(
        "global", description="global: the top ⌊p·D⌋ of all parameters at once (paper); tensor: p of each tensor"
    )
    include: tuple[str, ...] = Field(("*",), description="glob patterns of parameter names")
    exclude: tuple[str, ...] = Field((), description="glob patterns taken out again, for example '*embed*'")


class GroupsConfig(Section):
    """Task groups: connected components of the graph with an edge where S(i,j) ≥ τ."""

    tau: float | None = Field(None, ge=0, le=1, description="absolute Jaccard threshold (paper: 0.1)")
    tau_chance: float | None = Field(None, gt=0, description="threshold as a multiple of chance, p/(2−p)")
    order: Literal["random", "given", "similarity"] = "random"

    @model_validator(mode="after")
    def _one_threshold(self) -> GroupsConfig:
        exactly_one(self, ("tau", "tau_chance"))
        return self


class BackboneConfig(Section):
    """θ_base, into which cores are transplanted."""

    source: str = Field("staged", description="staged (paper) | pretrained | a local directory or hub id")
    revision: str | None = None
    training: TrainingConfig | None = Field(None, description="of each stage of `staged`; default: as `probe`")


class FusionConfig(Section):
    """Transplant and SLERP; or another way to merge, to compare with."""

    method: Literal["cpift", "linear", "task_arithmetic", "slerp", "ties", "dare"] = Field(
        "cpift", description="cpift: the paper's; the others merge θ1..θN onto θ0, with no regions and no backbone"
    )
    weight: float = Field(1.0, description="of every task: linear (normalised), λ of task_arithmetic, ties and dare")
    weights: dict[str, float] = Field(default_factory=dict, description="by task, where they differ from `weight`")
    density: Fraction = Field(0.2, description="share of each update that ties and dare keep")
    trim: Literal["tensor", "global"] = Field("tensor", description="ties: keep the largest of each tensor, or of all")
    t: float = Field(
        0.5, ge=0, le=1, description="slerp of two tasks: 0 is the first, 1 the second; of more, each weighs the same"
    )
    omega: Literal["uniform"] | Annotated[float, Field(ge=0, le=1)] = Field(
        "uniform", description="uniform: ω_i = 1/(i+1), every model weighs the same; a number: the paper's fixed ω"
    )
    epsilon: float = Field(1e-6, ge=0, description="radians; LERP where the angle is smaller")
    granularity: Literal["tensor", "row", "model"] = "tensor"
    space: Literal["weights", "delta"] = "weights"
    conflict: Literal["magnitude", "last", "mean"] = "magnitude"
    transplant: bool = Field(True, description="false: no cores, SLERP everywhere, to see what the transplant does")
    vocabulary: Literal["error", "base"] = Field(
        "error", description="where models have other numbers of tokens, base: those of θ0, with its rows where missing"
    )
    shard_size: Bytes = Field(5 * 10**9, description="most bytes of one file of the fused model, for example 5GB")


class EvaluationConfig(Section):
    """Scoring of θ0, every θi, the fused and the final model on every task's test rows."""

    batch_size: int = Field(16, ge=1)
    max_length: int = Field(1024, ge=8)
    limit: int | None = Field(None, ge=1, description="test rows per task at most")


class RunConfig(Section):
    """A whole run of CPI-FT."""

    name: Name
    output: Path | None = Field(None, description="folder for everything the run makes; default: runs/<name>")
    seed: int = 0
    model: ModelConfig
    tasks: tuple[TaskConfig, ...] = Field(min_length=1, max_length=16)
    probe: TrainingConfig | None = Field(None, description="how probes are trained; needed unless all are given")
    regions: RegionsConfig = RegionsConfig()
    groups: GroupsConfig = GroupsConfig(tau=0.1, tau_chance=None)
    backbone: BackboneConfig = BackboneConfig()
    fusion: FusionConfig = FusionConfig()
    integration: IntegrationConfig | None = Field(None, description="needed by `cpift integrate` and `run`")
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()
    tracking: tuple[Tracker, ...] = Field(
        ("tensorboard",),
        description="where losses go while training: tensorboard (files in <output>/logs); mlflow and wandb as their "
        "own environment variables say (MLFLOW_TRACKING_URI, WANDB_PROJECT)",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> RunConfig:
        names = [task.name.lower() for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tasks: {', '.join(repr(n) for n in twice)} is named twice; give every task its own name")
        return self

    @model_validator(mode="after")
    def _lora_is_not_sharded(self) -> RunConfig:
        trainings = (self.probe, self.backbone.training)
        if self.resources.strategy == "fsdp" and any(training and training.lora for training in trainings):
            raise ValueError("resources.strategy fsdp is for full fine-tunes; use ddp with lora")
        return self

    @property
    def output_dir(self) -> Path:
        return (self.output or Path("runs") / self.name).absolute()

    @model_validator(mode="after")
    def _weights_name_tasks(self) -> RunConfig:
        known = {task.name for task in self.tasks}
        for name in self.fusion.weights:
            if name not in known:
                raise ValueError(f"fusion.weights: {name!r} is no task; there are {', '.join(sorted(known))}")
        return self

    @model_validator(mode="after")
    def _probes_can_be_had(self) -> RunConfig:
        for task in self.trained:
            if task.train is None:
                raise ValueError(f"tasks.{task.name}: give `train` to train its probe, or the `checkpoint` to use")
            if self.probe is None:
                raise ValueError(f"probe: is required, for tasks.{task.name} has no checkpoint")
        return self

    @property
    def trained(self) -> tuple[TaskConfig, ...]:
        """The tasks whose probes are trained here."""
        return tuple(task for task in self.tasks if task.checkpoint is None)

    @property
    def merges_only(self) -> bool:
        """Whether everything up to the fused model is given: no fine-tune, θ0 and all θi used where they lie."""
        return not self.trained and self.backbone_source != "staged"

    @property
    def backbone_source(self) -> str:
        """`backbone.source`; `pretrained` for methods of fusion that know no backbone, for they merge onto θ0."""
        return self.backbone.source if self.fusion.method == "cpift" else "pretrained"

    @property
    def probe_training(self) -> TrainingConfig:
        return needed(self.probe, "probe", "training")

    @property
    def backbone_training(self) -> TrainingConfig:
        return self.backbone.training or needed(self.probe, "backbone.training", "the staged backbone")

    @property
    def integration_training(self) -> IntegrationConfig:
        return needed(self.integration, "integration", "integrated fine-tuning")

    def task(self, name: str) -> TaskConfig:
        return next(task for task in self.tasks if task.name == name)
