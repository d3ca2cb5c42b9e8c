"""How fine-tunes of a run are trained, and what they may use. See `run.py`."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, model_validator

from cpift.config.identity import FITS, identity
from cpift.config.inputs import Bytes, Precision, Section, exactly_one
from cpift.errors import entry

Freeze = Literal["earlier", "all", "none"]
Strategy = Literal["ddp", "fsdp"]
SHARDED = {"ddp": False, "fsdp": True}  # `resources.strategy` → whether several workers share out a model
Tracker = Literal["tensorboard", "mlflow", "wandb"]


class Mixing(Section):
    """How much each task of a joint stage gives."""

    temperature: float = Field(
        1.0,
        **identity(*FITS),
        ge=1,
        description="1: every row once; larger: shares ∝ size^(1/temperature), towards equal shares",
    )
    by: Literal["rows", "tokens"] = Field("rows", **identity(*FITS), description="what size counts")


class LoraConfig(Section):
    """LoRA (needs the `peft` extra): W + (alpha / rank)·B·A with A and B trained, merged when the model is kept."""

    rank: int = Field(16, **identity(*FITS), ge=1, description="of A and B")
    alpha: float = Field(32, **identity(*FITS), gt=0, description="scaling is alpha / rank")
    dropout: float = Field(0.0, **identity(*FITS), ge=0, lt=1, description="of the adapters' inputs while training")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        **identity(*FITS),
        description="ends of module names, for example [q_proj, v_proj]; all-linear: all but the head",
    )


class TrainingConfig(Section):
    """One fine-tune: AdamW, warm-up, then the schedule. `steps` are optimizer steps of a stage."""

    steps: int | None = Field(None, **identity(*FITS), ge=1, description="optimizer steps of a stage")
    steps_per: Literal["stage", "task"] = Field(
        "stage",
        **identity(*FITS, absent="stage", swept=True),
        description="what takes `steps`: stage: each stage, however many tasks it trains; task: each of its tasks, so "
        "that the groups do not change how much is trained altogether",
    )
    epochs: float | None = Field(
        None, **identity(*FITS), gt=0, description="passes over a stage's rows, in place of `steps`"
    )
    batch_size: int = Field(8, **identity(*FITS), ge=1, description="examples per worker and forward pass")
    gradient_accumulation: int = Field(
        1, **identity(*FITS), ge=1, description="forward passes a worker sums up before a step"
    )
    learning_rate: float = Field(1e-4, **identity(*FITS), gt=0, description="the largest, after warm-up")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", **identity(*FITS), description="of the learning rate after warm-up: down to 0, or constant"
    )
    warmup_ratio: float = Field(
        0.05, **identity(*FITS), ge=0, lt=1, description="share of the steps in which the learning rate rises from 0"
    )
    weight_decay: float = Field(
        0.0, **identity(*FITS), ge=0, description="AdamW's, decoupled; frozen elements have none"
    )
    max_grad_norm: float = Field(
        1.0, **identity(*FITS), gt=0, description="larger gradients are scaled down to this norm"
    )
    max_length: int = Field(512, **identity(*FITS), ge=8, description="tokens; longer examples are cut at the end")
    packing: bool = Field(
        False,
        **identity(*FITS),
        description="several examples in one row of max_length tokens, none sees another; batch_size counts rows",
    )
    mixing: Mixing = Field(Mixing(), **identity(*FITS), description="of stages that train several tasks")
    lora: LoraConfig | None = Field(
        None,
        **identity(*FITS),
        description="train adapters only; core regions come from the merged weights",
    )
    gradient_checkpointing: bool = Field(
        False, **identity(*FITS), description="activations are computed twice: less memory, more time"
    )
    precision: Precision = Field(
        "auto",
        **identity(*FITS, absent="auto", swept=True),
        description="of products, weights are trained in float32; auto: bfloat16 where the machine has it, so another "
        "machine may give other numbers; float32: nearly the same numbers everywhere",
    )
    checkpoint_every: int = Field(
        200,
        **identity(),
        ge=0,
        description="optimizer steps between checkpoints; 0 = only at stage ends",
    )
    checkpoint_minutes: float | None = Field(
        None,
        **identity(absent=None),
        gt=0,
        description="one more checkpoint where so many minutes have passed since the last",
    )
    log_every: int = Field(5, **identity(), ge=1, description="optimizer steps between logged losses")

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        exactly_one(self, ("steps", "epochs"))
        return self

    @property
    def length(self) -> str:
        """How long a stage is, for people."""
        each = " for each task" if self.steps_per == "task" else ""
        return f"{self.steps} steps{each}" if self.steps is not None else f"{self.epochs:g} epochs"


class IntegrationConfig(TrainingConfig):
    """The final staged fine-tune with earlier cores frozen."""

    samples_per_task: int | None = Field(
        None,
        **identity("integrate"),
        ge=1,
        description="balanced sample; default: the smallest task's rows",
    )
    freeze: Freeze = Field(
        "earlier",
        **identity("integrate"),
        description="earlier: cores of the groups before this stage's (paper); all: every core in every stage; "
        "none: nothing, to see what freezing does",
    )
    penalty: float | None = Field(
        None,
        **identity("integrate", absent=None, swept=True),
        gt=0,
        description="instead of freezing, every step takes those cores the share penalty · learning rate of the way "
        "back to the fused model's values (an L2 penalty); default: frozen, bit for bit (paper)",
    )
    stages: Literal["groups", "mixed"] = Field(
        "groups",
        **identity("integrate", absent="groups", swept=True),
        description="groups: one stage a group (paper); mixed: all tasks in one stage as long as those together, which "
        "has no earlier cores to freeze",
    )

    @model_validator(mode="after")
    def _no_lora(self) -> IntegrationConfig:
        if self.lora is not None:
            raise ValueError("lora: no mask can hold single elements of W + s·B·A; leave it out, or use it for probes")
        return self


class TaskResources(Section):
    """What a task's probe takes instead of what `resources` says."""

    workers: int | None = Field(None, **identity("probe", by="resources"), ge=1, description="as resources.workers")
    cpus_per_worker: float | None = Field(
        None, **identity("probe", by="threads"), gt=0, description="as resources.cpus_per_worker"
    )
    gpus_per_worker: float | None = Field(None, **identity(), ge=0, description="as resources.gpus_per_worker")
    threads_per_worker: int | None = Field(
        None, **identity("probe", by="threads"), ge=1, description="as resources.threads_per_worker"
    )


class ResourcesConfig(Section):
    """What one fine-tune may use, and how many run at once."""

    workers: int = Field(1, **identity(*FITS), ge=1, description="Ray Train workers (data parallel) per fine-tune")
    min_workers: int | None = Field(
        None,
        **identity(*FITS, absent=None),
        ge=1,
        description="elastic: where nodes are missing go on with fewer workers, down to this many, and with all again "
        "when they are back. Steps see as many examples as before, but sum them in another order; default: never",
    )
    strategy: Strategy = Field(
        "ddp",
        **identity(*FITS, by="where workers are several"),
        description="with several workers, ddp: each holds the model and its optimizer (16 bytes a parameter); "
        "fsdp: FSDP2, each holds its share of them",
    )
    cpus_per_worker: float = Field(
        1, **identity(*FITS, "evaluate", by="threads"), gt=0, description="CPUs that Ray reserves for each worker"
    )
    gpus_per_worker: float = Field(
        0, **identity(), ge=0, description="GPUs for each worker; 0: none is used, even where there are some"
    )
    threads_per_worker: int | None = Field(
        None,
        **identity(*FITS, "evaluate", by="threads"),
        ge=1,
        description="torch threads; default: cpus_per_worker rounded down. Part of what fixes the result's bits",
    )
    threads_alone: int | None = Field(
        None,
        **identity("backbone", "integrate", by="threads"),
        ge=1,
        description="torch threads where no other fine-tune runs (backbone, integration, baselines.full_sft); default: "
        "the same",
    )
    parallel: int | None = Field(None, **identity(), ge=1, description="fine-tunes at once; default: as many as fit")
    address: str | None = Field(
        None, **identity(), description="Ray cluster address; default: RAY_ADDRESS, else start Ray here"
    )
    memory_budget: Bytes = Field(
        2**30,
        **identity(),
        description="most bytes that regions and fusion hold (the system's page cache apart), for example 512MiB",
    )
    distributed: bool = Field(
        False,
        **identity(),
        description="run regions and fusion as Ray tasks too; models where all nodes find them, output on storage that "
        "all nodes see, or `storage` a URI",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "cpu",
        **identity(),
        description="where regions and fusion are computed: `cuda` copies slices of the models to this machine's first "
        "GPU (NVIDIA or AMD) and runs the Triton kernels there; `auto` times it and the CPU on the first elements and "
        "takes the faster, without a GPU the CPU. The bytes are the same",
    )
    verify: bool = Field(True, **identity(), description="read a fused model back and compare it with its inputs")
    max_failures: int = Field(2, **identity(), ge=0, description="worker failures survived per fine-tune")
    hang_timeout: float = Field(
        1800,
        **identity(),
        gt=0,
        description="seconds without a training step after which a worker on Ray counts as hung: it logs where, ends, "
        "and another goes on from the last checkpoint. Must be longer than any step with its checkpoint",
    )
    storage: str | None = Field(
        None,
        **identity(),
        description="where fine-tunes that run keep their checkpoints: a folder that every node sees, or a URI such as "
        "s3://bucket/folder, to which they are uploaded while training goes on (AWS_ENDPOINT_URL names another store "
        "than Amazon's); default: the run's folder. With a URI, distributed regions and fusion go through it too: "
        "only this process then needs to see `output`",
    )

    @model_validator(mode="after")
    def _elastic(self) -> ResourcesConfig:
        least = 2 if self.sharded else 1
        if self.min_workers is not None and not least <= self.min_workers <= self.workers:
            raise ValueError(
                f"min_workers {self.min_workers}: give a number from {least} to workers ({self.workers})"
                + ("; one worker alone cannot read what several shared out" if self.sharded else "")
            )
        return self

    @property
    def sharded(self) -> bool:
        """Whether each of several workers holds its share of a model, not all of it."""
        return entry(SHARDED, self.strategy, "resources.strategy")

    @property
    def on_cluster(self) -> bool:
        """Whether regions and fusion run as Ray tasks: asked for, or a cluster is named."""
        return self.distributed or self.address is not None or "RAY_ADDRESS" in os.environ

    @property
    def remote_storage(self) -> bool:
        """Whether `storage` is an object store."""
        return "://" in (self.storage or "")

    @property
    def by_train(self) -> bool:
        """Whether fine-tunes need Ray Train: for several workers, or to keep checkpoints elsewhere."""
        return self.workers > 1 or self.storage is not None

    @property
    def threads(self) -> int:
        return self.threads_per_worker or max(1, int(self.cpus_per_worker))

    @property
    def most_threads(self) -> int:
        """Of whatever one process runs alone."""
        return max(self.threads, self.threads_alone or 0)

    def overridden(self, own: TaskResources) -> ResourcesConfig:
        """These resources with what a task asks for itself."""
        return self.model_copy(update=own.model_dump(exclude_none=True))
