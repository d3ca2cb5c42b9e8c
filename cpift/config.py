"""One run, described. Every field of a run's YAML file, its meaning, unit and default.

Relative paths of inputs are resolved against the folder of the YAML file; `output` against the working directory.
`${NAME}` in a path is replaced from the environment. Loading is in `config_loading.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Freeze = Literal["earlier", "all"]
Strategy = Literal["ddp", "fsdp"]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]


def _identifier(name: str) -> str:
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise ValueError("use letters, digits, '-', '_' and '.' only: the name becomes part of file names")
    return name


Name = Annotated[str, Field(min_length=1, max_length=60), AfterValidator(_identifier)]


class Section(BaseModel):
    """A part of the file. Unknown fields are errors, and values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _exactly_one(section: Section, names: tuple[str, ...]) -> None:
    given = [name for name in names if getattr(section, name) is not None]
    if len(given) != 1:
        found = "none of them is there" if not given else f"found {' and '.join(given)}"
        raise ValueError(f"give exactly one of {', '.join(names)}; {found}")


class GgufFile(Section):
    """A GGUF file, dequantised once and kept as safetensors."""

    file: str = Field(description="file name, inside `package` if that is given, else a path")
    package: str | None = Field(None, description="installed Python package that ships the file")


class ScratchModel(Section):
    """A small Llama with random weights and a byte-level tokenizer, made on the spot."""

    hidden_size: int = Field(64, ge=8)
    intermediate_size: int = Field(128, ge=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    max_length: int = Field(256, ge=16, description="tokens the position encoding is made for")
    seed: int = 0

    @model_validator(mode="after")
    def _heads_divide(self) -> ScratchModel:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 2 × heads ({2 * self.heads})")
        return self


class ModelConfig(Section):
    """The pre-trained model θ0. Exactly one of `path`, `hub`, `gguf`, `scratch`."""

    path: Path | None = Field(None, description="local directory with config.json and safetensors")
    hub: str | None = Field(None, description="model id on the Hugging Face hub")
    revision: str | None = Field(None, description="branch, tag or commit of `hub`; pin a commit to be exact")
    gguf: GgufFile | None = None
    scratch: ScratchModel | None = None
    dtype: Dtype = Field("auto", description="dtype that checkpoints are kept in; auto = θ0's own, GGUF: bfloat16")

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        _exactly_one(self, ("path", "hub", "gguf", "scratch"))
        return self


class DataSource(Section):
    """Where a split's rows come from. Exactly one of `file`, `hub`, `procedural`.

    A row is either chat (`messages`: list of role and content) or `prompt` and `completion`; `answer` (text) and
    `choices` (list of text) where the metric needs them. `columns` builds these from other columns.
    """

    file: Path | None = Field(None, description="JSON lines")
    hub: str | None = Field(None, description="data set id on the Hugging Face hub")
    subset: str | None = Field(None, description="configuration name of the hub data set")
    split: str = "train"
    revision: str | None = None
    procedural: str | None = Field(None, description="name of a generator in cpift.synthetic")
    size: int | None = Field(None, ge=1, description="rows to generate (procedural)")
    seed: int = Field(0, description="generator seed (procedural)")
    limit: int | None = Field(None, ge=1, description="use the first so many rows")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="templates over the row's own columns, for example prompt: '{question}'",
    )

    @model_validator(mode="after")
    def _one_source(self) -> DataSource:
        _exactly_one(self, ("file", "hub", "procedural"))
        if self.procedural is not None and self.size is None:
            raise ValueError("a procedural source needs `size`, the number of rows to generate")
        return self


class TaskConfig(Section):
    """One task Ti: its data and how it is scored."""

    name: Name
    train: DataSource
    test: DataSource
    metric: Literal["loss", "choice", "number", "rouge"] = Field(
        "loss",
        description="choice: accuracy by option likelihood; number: exact match of the final number generated; "
        "rouge: ROUGE-L F1 of the text generated; loss: negative log-likelihood per answer token only",
    )
    max_new_tokens: int = Field(128, ge=1, description="generation limit for `number` and `rouge`")


class TrainingConfig(Section):
    """One fine-tune: AdamW, warm-up, then the schedule. `steps` are optimizer steps."""

    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(8, ge=1, description="examples per worker and forward pass")
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: int = Field(512, ge=8, description="tokens; longer examples are cut at the end")
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(200, ge=0, description="optimizer steps between checkpoints; 0 = only at stage ends")
    log_every: int = Field(5, ge=1)

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        _exactly_one(self, ("steps", "epochs"))
        return self


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
        _exactly_one(self, ("tau", "tau_chance"))
        return self


class BackboneConfig(Section):
    """θ_base, into which cores are transplanted."""

    source: str = Field("staged", description="staged (paper) | pretrained | a local directory or hub id")
    revision: str | None = None
    training: TrainingConfig | None = Field(None, description="of each stage of `staged`; default: as `probe`")


class FusionConfig(Section):
    """Transplant and SLERP."""

    omega: Literal["uniform"] | Annotated[float, Field(ge=0, le=1)] = Field(
        "uniform", description="uniform: ω_i = 1/(i+1), every model weighs the same; a number: the paper's fixed ω"
    )
    epsilon: float = Field(1e-6, ge=0, description="radians; LERP where the angle is smaller")
    granularity: Literal["tensor", "row", "model"] = "tensor"
    space: Literal["weights", "delta"] = "weights"
    conflict: Literal["magnitude", "last", "mean"] = "magnitude"


class IntegrationConfig(TrainingConfig):
    """The final staged fine-tune with earlier cores frozen."""

    samples_per_task: int | None = Field(None, ge=1, description="balanced sample; default: the smallest task's rows")
    freeze: Freeze = Field(
        "earlier",
        description="earlier: cores of the groups before this stage's (paper); all: every core in every stage",
    )


class EvaluationConfig(Section):
    """Scoring of θ0, every θi, the fused and the final model on every task's test rows."""

    batch_size: int = Field(16, ge=1)
    max_length: int = Field(1024, ge=8)
    limit: int | None = Field(None, ge=1, description="test rows per task at most")


class ResourcesConfig(Section):
    """What one fine-tune may use, and how many run at once."""

    workers: int = Field(1, ge=1, description="Ray Train workers (data parallel) per fine-tune")
    strategy: Strategy = Field(
        "ddp",
        description="with several workers, ddp: each holds the model and its optimizer (16 bytes a parameter); "
        "fsdp: FSDP2, each holds its share of them",
    )
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    threads_per_worker: int | None = Field(
        None,
        ge=1,
        description="torch threads; default: cpus_per_worker rounded down. Part of what fixes the result's bits",
    )
    threads_alone: int | None = Field(
        None, ge=1, description="torch threads where no other fine-tune runs (backbone, integration); default: the same"
    )
    parallel: int | None = Field(None, ge=1, description="fine-tunes at once; default: as many as fit")
    address: str | None = Field(None, description="Ray cluster address; default: RAY_ADDRESS, else start Ray here")
    max_failures: int = Field(2, ge=0, description="worker failures survived per fine-tune")

    @property
    def threads(self) -> int:
        return self.threads_per_worker or max(1, int(self.cpus_per_worker))


class RunConfig(Section):
    """A whole run of CPI-FT."""

    name: Name
    output: Path | None = Field(None, description="folder for everything the run makes; default: runs/<name>")
    seed: int = 0
    model: ModelConfig
    tasks: tuple[TaskConfig, ...] = Field(min_length=1, max_length=16)
    probe: TrainingConfig
    regions: RegionsConfig = RegionsConfig()
    groups: GroupsConfig = GroupsConfig(tau=0.1, tau_chance=None)
    backbone: BackboneConfig = BackboneConfig()
    fusion: FusionConfig = FusionConfig()
    integration: IntegrationConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _names_differ(self) -> RunConfig:
        names = [task.name.lower() for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tasks: {', '.join(repr(n) for n in twice)} is named twice; give every task its own name")
        return self

    @property
    def output_dir(self) -> Path:
        return (self.output or Path("runs") / self.name).absolute()

    @property
    def backbone_training(self) -> TrainingConfig:
        return self.backbone.training or self.probe

    def task(self, name: str) -> TaskConfig:
        return next(task for task in self.tasks if task.name == name)
