"""What a training worker holds, counted on the model's own class without its memory: its layers run over tensors that
have shapes and no values, and what they keep for the backward pass is added up.

On top come what single operations need for a moment (the gradient of the logits among it), buffers of communication,
and what the allocator does not give back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.resources import SHARDED, Strategy
from cpift.config.run import TrainingConfig
from cpift.config.training import IntegrationConfig, LoraConfig
from cpift.errors import CheckpointError
from cpift.pretrained.architecture import recomputable, skeleton
from cpift.pretrained.attention import implementation
from cpift.training.adapters import with_adapters
from cpift.training.optimizers import outside_layers
from cpift.training.weights.frozen import Dtypes, hold_as_stored, stored_dtypes
from cpift.training.weights.hollow import hollow_network, onto_cpu, without_masks
from cpift.training.weights.quantised import nf4_bytes, not_quantised, quantisable
from cpift.training.weights.units import layers_of

_SMALL_8BIT = 4096  # elements of a tensor whose moments bitsandbytes keeps in 32 bits


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes a worker. activations: of its longest batch, with the bfloat16 copies of weights that products keep."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.activations


_SHARE = 0.8  # of the memory there is that what is counted may take, for single operations come on top


def recomputes(folder: Path, training: TrainingConfig, shards: int, narrow: bool, room: float) -> bool:
    """Whether activations are computed twice, as `gradient_checkpointing` says: for `auto` where a fine-tune that keeps
    them would take more than 0.8 of `room` bytes. Otherwise as for `training_memory`."""
    if training.gradient_checkpointing != "auto":
        return training.gradient_checkpointing
    if not recomputable(folder):
        return False
    keeps = training.model_copy(update={"gradient_checkpointing": False})
    return training_memory(folder, keeps, shards, narrow).total > _SHARE * room


def training_memory(folder: Path, training: TrainingConfig, shards: int, narrow: bool) -> TrainingMemory:
    """Of a fine-tune of the model in a local folder. shards: workers that FSDP2 shares its state out to, or 1; narrow:
    whether products are bfloat16. `gradient_checkpointing: auto` counts as true."""
    model, less = hollow_network(folder, _attention(training)), 0
    if training.lora is not None:
        if training.lora.in_four_bits:
            less = _in_four_bits(model, torch.bfloat16 if narrow else torch.float32)
        elif narrow:
            hold_as_stored(model, _stored(folder))
        model = with_adapters(model, training.lora, 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        onto_cpu(model)
        model.config.use_cache = False
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        moved = [parameter for parameter in model.parameters() if parameter.requires_grad]
        state = sum(_state(training.optimizer, parameter, inside) for parameter, inside in _places(model, moved))
        trained, weights = sum(p.numel() for p in moved), sum(p.nbytes for p in model.parameters()) - less
        average = 4 * trained if training.ema else 0
        held = _activations(model.train(), training, narrow)
    return TrainingMemory(weights // shards, 4 * trained // shards, state // shards, average // shards, held)


def _attention(training: TrainingConfig) -> str | None:
    """transformers' name of an attention that keeps what the one that is asked for keeps: of a flash kernel's and of
    flex's, whose masks are no tensors over pairs of tokens, that is torch's without a mask."""
    name = implementation(training.attention).name
    masked = name == "eager" or (training.packing and name in (None, "sdpa"))  # rows of several examples have one
    return name if masked else without_masks()


class _Dequantised(torch.nn.Linear):
    """A linear layer in 4 bits, as its weights are when they are multiplied: made anew each time, and not kept."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return super().forward(values.to(self.weight.dtype)).to(values.dtype)


def _in_four_bits(model: Any, compute: torch.dtype) -> int:
    """Put such layers in the place of those that would be held so; returns by how many bytes these are smaller."""
    linear = list(quantisable(model).values())
    for layer in linear:
        layer.__class__ = _Dequantised
        layer.weight = torch.nn.Parameter(torch.empty_like(layer.weight, dtype=compute), requires_grad=False)
    return sum(layer.weight.nbytes - nf4_bytes(layer.weight.numel()) for layer in linear)


def _stored(folder: Path) -> Dtypes:
    """What the parameters of a folder are stored in; where it has a config alone, all in what that says."""
    if any(folder.glob("*.safetensors")):
        return stored_dtypes(Checkpoint(folder))
    network = skeleton(folder)
    dtype: Any = network.config.dtype or torch.float32
    return dict.fromkeys(network.state_dict(), dtype)


def _places(model: Any, moved: list[torch.nn.Parameter]) -> Iterator[tuple[torch.Tensor, bool]]:
    """Each parameter, and whether it is a matrix inside the layers."""
    outside = outside_layers(model)
    for parameter in moved:
        yield parameter, parameter.ndim == 2 and id(parameter) not in outside


def _state(optimizer: str, parameter: torch.Tensor, inside: bool) -> int:
    """Bytes that an optimizer keeps of a parameter, less its count of steps."""
    size = parameter.numel()
    if optimizer == "adafactor":
        return 4 * (size // parameter.shape[-1] + size // parameter.shape[-2]) if parameter.ndim > 1 else 4 * size
    if optimizer == "adamw_8bit" and size >= _SMALL_8BIT:
        return 2 * size
    return 4 * size if optimizer == "muon" and inside else 8 * size


def _activations(model: Any, training: TrainingConfig, narrow: bool) -> int:
    """What the longest batch keeps for the backward pass; with recomputed layers what one of them keeps meanwhile."""
    batch = {"input_ids": torch.zeros((training.batch_size, training.max_length), dtype=torch.long)}
    if training.packing:  # rows of several examples have a mask that keeps them apart
        batch["position_ids"] = torch.zeros_like(batch["input_ids"])
    held = _kept(model, batch, narrow)
    if not training.gradient_checkpointing:
        return held
    layers = len(layers_of(model))
    model.gradient_checkpointing_disable()
    return held + max(0, _kept(model, batch, narrow) - held) // max(layers, 1)


def _kept(model: Any, batch: dict[str, torch.Tensor], narrow: bool) -> int:
    weights = {_storage(parameter) for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # each once, and alive, so that none takes the place of another

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in weights:
            kept[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        model(**batch, labels=batch["input_ids"])
    return sum(storage.nbytes() for storage in kept.values())


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


_ADAPTERS = LoraConfig()
_WHOLE: Strategy = "ddp"


def ways_to_save(
    training: TrainingConfig, shards: int, strategy: Strategy = "ddp", again: bool = True
) -> Iterator[tuple[str, TrainingConfig]]:
    """Changes that take less memory, those first that change least of what is learnt; each with all before it.

    strategy: of the resources, which decides what else has to be changed. again: whether the class can compute
    activations again.
    """
    if again and not training.gradient_checkpointing:
        training = training.model_copy(update={"gradient_checkpointing": True})
        yield "gradient_checkpointing: true", training
    if training.batch_size > 1:
        steps = training.gradient_accumulation * training.batch_size
        training = training.model_copy(update={"batch_size": 1, "gradient_accumulation": steps})
        yield f"batch_size: 1, gradient_accumulation: {steps}", training
    if training.optimizer == "adamw" and shards == 1 and not training.keep_moments:  # which are of adamw alone
        training = training.model_copy(update={"optimizer": "adamw_8bit"})
        yield "optimizer: adamw_8bit", training
    if shards > 1 or training.keep_moments or isinstance(training, IntegrationConfig):
        return
    if training.lora is None:
        besides = f"resources.strategy: {_WHOLE}, " if SHARDED[strategy] else ""  # of one worker it says nothing else
        training = training.model_copy(update={"lora": _ADAPTERS})
        yield f"{besides}lora: {{rank: {_ADAPTERS.rank}}}", training
    assert training.lora is not None
    if not (training.lora.in_four_bits or training.compile):
        adapters = training.lora.model_copy(update={"base": "nf4"})
        yield "lora.base: nf4", training.model_copy(update={"lora": adapters})


@dataclass(frozen=True)
class Fitting:
    """A fine-tune on a GPU. ways: what each change would take, up to the first that fits; workers: how many FSDP2 would
    need where no change of a full fine-tune is enough, None where even all too many hold too much. recomputes: whether
    activations are computed twice, where that is decided by the GPU.
    """

    section: str
    memory: TrainingMemory
    fits: bool
    ways: tuple[tuple[str, TrainingMemory], ...] = ()
    workers: int | None = None
    recomputes: bool | None = None


def fitting(
    section: str, folder: Path, training: TrainingConfig, shards: int, limit: int, strategy: Strategy = "ddp"
) -> Fitting:
    """Whether a fine-tune fits `limit` bytes of a GPU, and what to change if it does not."""
    narrow, chosen = training.precision != "float32", None
    if training.gradient_checkpointing == "auto":
        chosen = recomputes(folder, training, shards, narrow, limit)
        training = training.model_copy(update={"gradient_checkpointing": chosen})
    memory = training_memory(folder, training, shards, narrow)
    if memory.total <= limit:
        return Fitting(section, memory, True, recomputes=chosen)
    ways: list[tuple[str, TrainingMemory]] = []
    full = [memory] if training.lora is None else []  # what FSDP2 can share out
    for change, changed in ways_to_save(training, shards, strategy, recomputable(folder)):
        if changed.lora is not None and changed.lora.in_four_bits and not_quantised(folder, "lora.base"):
            continue
        try:
            less = training_memory(folder, changed, shards, narrow)
        except CheckpointError:
            if training.lora is None and changed.lora is not None:
                continue  # the class, mamba's for one, takes no such adapters
            raise
        ways.append((change, less))
        full += [less] if changed.lora is None else []
        if less.total <= limit:
            break
    return Fitting(section, memory, False, tuple(ways), _workers(full, shards, limit), chosen)


def _workers(full: Sequence[TrainingMemory], shards: int, limit: int) -> int | None:
    if not full or any(memory.total <= limit for memory in full):
        return None
    least = min(full, key=lambda one: one.activations)
    room, state = limit - least.activations, (least.total - least.activations) * shards
    return math.ceil(state / room) if room > 0 else None


@dataclass(frozen=True)
class Holding:
    """What a part of a run that trains nothing holds on a GPU, in bytes, and in words; the rest comes on top."""

    section: str
    held: int
    fits: bool
    what: str


def scoring_weights(folder: Path, narrow: bool) -> int:
    """Bytes of a model that is scored: float32, and bfloat16 for factors of products that are narrow."""
    network = skeleton(folder)
    shared = {id(layer.weight) for layer in network.modules() if isinstance(layer, torch.nn.Embedding)}
    linear = {id(layer.weight) for layer in network.modules() if isinstance(layer, torch.nn.Linear)} - shared
    return sum(one.numel() * (2 if narrow and id(one) in linear else 4) for one in network.parameters())
