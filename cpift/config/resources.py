"""What fine-tunes, evaluations and merges of a run may use. See `run.py`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from cpift.config.identity import FITS, identity
from cpift.config.inputs import Bytes, Section
from cpift.errors import entry

if TYPE_CHECKING:
    from cpift.config.training import TrainingConfig

Strategy = Literal["ddp", "fsdp"]
SHARDED = {"ddp": False, "fsdp": True}  # `resources.strategy` → whether several workers share out a model


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
        description="most bytes that regions and fusion hold (the system's page cache apart), for example 512MiB; and "
        "as much again of models that stay in a sweep's workers from point to point",
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
        description="where regions and fusion are computed: `cuda` copies slices of the models to the GPUs (NVIDIA or "
        "AMD) of this machine or of the cluster and runs the Triton kernels there; `auto` times one GPU here and the "
        "CPU on the first elements and takes the faster, without a GPU and on a cluster the CPU. The bytes are the "
        "same",
    )
    verify: bool = Field(True, **identity(), description="read a fused model back and compare it with its inputs")
    hash_inputs: bool = Field(
        False,
        **identity(),
        description="record the sha256 of all weights that a merge reads in its inputs.json, as the hub has them; else "
        "a merge that is verified has their XXH3 checksums there, which take a quarter of the time",
    )
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

    def refuse(self, section: str, training: TrainingConfig | None) -> None:
        """Raise ValueError for a fine-tune that several workers cannot do by `strategy`."""
        if training is None:
            return
        if self.sharded and training.lora:
            raise ValueError("resources.strategy fsdp is for full fine-tunes; use ddp with lora")
        if not self.sharded and training.gather == "bfloat16":
            raise ValueError(f"{section}.gather: bfloat16 is of weights that are sharded; set resources.strategy: fsdp")

    @property
    def cluster(self) -> str | None:
        """Address of the Ray cluster that is named; None where Ray starts here."""
        return self.address or os.environ.get("RAY_ADDRESS")

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
