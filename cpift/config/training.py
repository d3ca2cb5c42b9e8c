"""How fine-tunes of a run are trained. See `run.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cpift.config.identity import FITS, identity
from cpift.config.inputs import Precision, Section, Seed, exactly_one

Freeze = Literal["earlier", "all", "none"]
KEEPS = {"last": False, "best": True}  # `keep` → whether held-out loss chooses among a stage's weights
WARMUPS = {"rounded": False, "exact": True}  # `warmup` → whether the share of steps is taken as it is
BASES = {"stored": False, "nf4": True}  # `lora.base` → whether weights under adapters are held in 4 bits
# `attention` → whether it is known together with layers that are compiled
ATTENTIONS = {"auto": True, "eager": True, "sdpa": True, "flash_attention_2": False, "flex": False}
Tracker = Literal[
    "tensorboard",
    "mlflow",
    "wandb",
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "flyte",
    "kubeflow",
    "neptune",
    "swanlab",
    "trackio",
]


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
    base: Literal["stored", "nf4"] = Field(
        "stored",
        **identity(*FITS, absent="stored"),
        description="what linear layers hold beside the adapters: stored: their weights as they are; nf4: these in 4 "
        "bits, double quantisation (QLoRA; needs the `qlora` extra). The model that is kept is θ0 and the adapters, "
        "whatever stood in for θ0 while they were trained",
    )

    @property
    def in_four_bits(self) -> bool:
        """Whether weights beside the adapters are held in 4 bits."""
        return BASES[self.base]


class Validation(Section):
    """Rows of each task's `train` that are not trained on, but watched: the same rows, whatever their order."""

    rows: int = Field(
        **identity(*FITS, absent=None), ge=1, description="of each task, at least; rows with one prompt stay together"
    )
    seed: Seed = Field(0, **identity(*FITS, absent=0), description="decides which")


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
    optimizer: Literal["adamw", "adafactor", "adamw_8bit", "muon"] = Field(
        "adamw",
        **identity(*FITS, absent="adamw"),
        description="adafactor: torch's, whose learning_rate is a share of each tensor's size; muon: torch's for "
        "matrices inside the layers, AdamW for all else; adamw_8bit: needs bitsandbytes",
    )
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", **identity(*FITS), description="of the learning rate after warm-up: down to 0, or constant"
    )
    warmup_ratio: float = Field(
        0.05, **identity(*FITS), ge=0, lt=1, description="share of the steps in which the learning rate rises from 0"
    )
    warmup: Literal["rounded", "exact"] = Field(
        "rounded",
        **identity(*FITS, absent="rounded"),
        description="rounded: warmup_ratio rounded up to whole steps, the first of which has learning rate 0; exact: "
        "step t has the share t / (warmup_ratio · steps), at most 1, so that every step trains",
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
    gradient_checkpointing: bool | Literal["auto"] = Field(
        False,
        **identity(*FITS),
        description="activations are computed twice: less memory, more time, the same results. auto: where the longest "
        "batch would else take more than 0.8 of the GPU's memory, or of this machine's free memory by the CPUs of a "
        "worker",
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex"] = Field(
        "auto",
        **identity(*FITS, absent="auto"),
        description="what computes attention, as transformers has it: auto: sdpa (torch's own) where the class has it, "
        "else eager; flash_attention_2: needs flash-attn, GPUs and bfloat16 products; flex: torch's flex_attention, on "
        "GPUs. Scoring is not concerned",
    )
    compile: bool = Field(
        False,
        **identity(*FITS, absent=False),
        description="decoder layers are compiled by torch, which takes a while at the start; rows are padded to "
        "max_length, so use it with packing. The last bits of results differ from those without",
    )
    precision: Precision = Field(
        "auto",
        **identity(*FITS, absent="auto", swept=True),
        description="of products, weights are trained in float32; auto: bfloat16 where the machine has it, so another "
        "machine may give other numbers; float32: nearly the same numbers everywhere",
    )
    gather: Precision = Field(
        "auto",
        **identity(*FITS, absent="auto"),
        description="with resources.strategy fsdp, what a layer's weights are gathered and computed with as: bfloat16 "
        "halves what workers send; the weights themselves, sums of gradients and the optimizer stay float32. auto: "
        "bfloat16 on GPUs where products are and the class allows it, else float32",
    )
    evaluate_every: int | None = Field(
        None,
        **identity(*FITS, absent=None),
        ge=1,
        description="optimizer steps after which, and at a stage's end, the loss on held-out rows is computed: of "
        "tasks.N.validation, or of `validation`; default: never",
    )
    validation: Validation | None = Field(
        None,
        **identity(*FITS, absent=None),
        description="rows held out of the training rows of tasks that have no `validation` of their own",
    )
    keep: Literal["last", "best"] = Field(
        "last",
        **identity(*FITS, absent="last"),
        description="which weights a stage ends with: last: those of its last step; best: those with the lowest "
        "held-out loss, of equal ones the earliest",
    )
    patience: int | None = Field(
        None,
        **identity(*FITS, absent=None),
        ge=1,
        description="a stage ends after so many held-out losses that are not below the lowest; default: never",
    )
    ema: float | None = Field(
        None,
        **identity(*FITS, absent=None),
        gt=0,
        lt=1,
        description="a stage ends with the average of its weights after each step t, the earlier ones weighed by "
        "min(ema, (1 + t) / (10 + t)); held-out loss is the average's; default: no average",
    )
    keep_moments: bool = Field(
        False,
        **identity("probe", absent=False),
        description="probes: AdamW's second moments of the last step, exp_avg_sq, are kept beside the model in bf16 "
        "(moments.safetensors), for regions.measure: curvature and fusion.method: fisher",
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

    @model_validator(mode="after")
    def _gathers_what_is_computed(self) -> TrainingConfig:
        if (self.gather, self.precision) == ("bfloat16", "float32"):
            raise ValueError(
                "gather: bfloat16 makes products bfloat16, and precision is float32; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _compiles_what_is_known(self) -> TrainingConfig:
        if self.compile and self.lora is not None and self.lora.in_four_bits:
            raise ValueError("lora.base: nf4 is not known with compiled layers; write compile: false, or base: stored")
        if self.compile and not ATTENTIONS[self.attention]:
            raise ValueError(
                f"attention: {self.attention} is not known with compiled layers; write compile: false, or sdpa"
            )
        return self

    @model_validator(mode="after")
    def _attends_in_a_precision_there_is(self) -> TrainingConfig:
        if (self.attention, self.precision) == ("flash_attention_2", "float32"):
            raise ValueError("attention: flash_attention_2 computes in bfloat16, and precision is float32; change one")
        return self

    @model_validator(mode="after")
    def _watches(self) -> TrainingConfig:
        asks = {"validation": self.validation, "keep": KEEPS[self.keep], "patience": self.patience}
        if self.evaluate_every is None and (idle := [name for name, value in asks.items() if value]):
            raise ValueError(f"{idle[0]}: needs held-out losses; give evaluate_every, the steps between them")
        return self

    @model_validator(mode="after")
    def _moments_are_of_the_weights(self) -> TrainingConfig:
        otherwise = {
            f"optimizer {self.optimizer} has none in this form": self.optimizer != "adamw",
            "lora trains no weight of the model itself": self.lora is not None,
            "ema gives other weights than those of the last step": self.ema is not None,
            "keep: best gives other weights than those of the last step": KEEPS[self.keep],
        }
        if self.keep_moments and (why := [what for what, holds in otherwise.items() if holds]):
            raise ValueError(f"keep_moments: are AdamW's of the last step, and {why[0]}; leave one of the two out")
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

    @model_validator(mode="after")
    def _no_moments(self) -> IntegrationConfig:
        if self.keep_moments:
            raise ValueError("keep_moments: nothing reads those of the integration; give it to `probe`")
        return self
