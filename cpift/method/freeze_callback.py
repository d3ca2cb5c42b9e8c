"""Frozen cores in anybody's training: a callback for transformers' Trainer and all that follow it, and a context.

Values are held from the moment at which training begins: a resumed Trainer has put the checkpoint's weights into the
model by then, whatever the model held before. The first step and the end are checked against copies of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from cpift_kernels import pack_mask, union_mask
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cpift.checkpoints.layout import ParameterMasks, layout_of
from cpift.errors import CpiftError, StageError
from cpift.method.cores import Core
from cpift.method.freezing import ElementFreezer, count_moved_everywhere, snapshot

Masks = Mapping[str, torch.Tensor]
# What wrappers put into the names of parameters: DDP, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class FreezeCallback(TrainerCallback):
    """Keeps elements of a model bit for bit while a Trainer trains it: `callbacks=[FreezeCallback(cores["maths"])]`.

    Several cores are frozen together. A core is one of `cpift.regions`, or any mapping from a parameter's name to a
    bool mask of its shape (or to packed words). Gradients of frozen elements are zeroed before they are clipped, values
    are put back after each step. For full fine-tunes: alone, under DDP, FSDP2 and accelerate, in any precision.

    Raises, when training begins, CpiftError for what no mask can hold (LoRA, FSDP1, DeepSpeed, quantised weights) and
    for names and shapes that do not fit; StageError, after the first step and at the end, if an element moved.
    `frozen_elements` and `moved` say how many there were, and how many were not as before at the end (0).
    """

    def __init__(self, *cores: Masks):
        if not cores:
            raise CpiftError("FreezeCallback: no cores are given → pass one or more, for example cores['maths']")
        self._cores = cores
        self._hold: Hold | None = None
        self.frozen_elements = 0
        self.moved: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._release()  # of a training that failed
        self.moved = None
        self._hold = Hold(kw["model"], kw["optimizer"], *self._cores)
        self.frozen_elements = self._hold.frozen_elements

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self._hold is not None:
            self._hold.check_once()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self._hold is not None:
            hold, self._hold = self._hold, None
            hold.release()
            self.moved = hold.moved()
            hold.require_none(self.moved)

    def _release(self) -> None:
        if self._hold is not None:
            self._hold.release()
            self._hold = None


@contextmanager
def frozen(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *cores: Masks) -> Iterator[Hold]:
    """`FreezeCallback` for a training loop of one's own: `with cpift.frozen(model, optimizer, cores["maths"]): …`.

    Model and optimizer as they are trained, after `accelerator.prepare`. Leaving the block checks that nothing moved.
    """
    hold = Hold(model, optimizer, *cores)
    try:
        yield hold
    finally:
        hold.release()
    hold.require_none(hold.moved())


class Hold:
    """Elements held at their values from now on."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *cores: Masks):
        self._model = model
        _require_elements(model)
        self._masks = _by_parameter(model, [core.words if isinstance(core, Core) else core for core in cores], cores)
        _require_floats(model, self._masks)
        self._before = snapshot(model, self._masks)
        self._freezer = ElementFreezer(model, self._masks)
        self._freezer.attach(unwrapped(optimizer))
        self._checked = False

    @property
    def frozen_elements(self) -> int:
        """Of the whole model, whatever this worker holds of it."""
        return self._freezer.frozen_elements

    def moved(self) -> int:
        """Frozen elements that differ in any bit from what they were. Where the model is sharded: collective."""
        return count_moved_everywhere(self._model, self._before, snapshot(self._model, self._masks))

    def check_once(self) -> None:
        """`require_none` after the first step: an optimizer that steps past the hooks is found at once."""
        if not self._checked:
            self._checked = True
            self.require_none(self.moved())

    def require_none(self, moved: int) -> None:
        if moved:
            raise StageError(
                f"{moved:,} of {self.frozen_elements:,} frozen elements moved → the optimizer writes weights outside "
                "its step (fused into the backward pass, or from copies of its own): use torch's AdamW, for example"
            )

    def release(self) -> None:
        self._freezer.detach()


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that steps, out of accelerate's and others' wrappers. Raises CpiftError where there is none."""
    inner, seen = optimizer, 0
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer) and seen < 10:
        inner, seen = inner.optimizer, seen + 1
    if not isinstance(inner, torch.optim.Optimizer) or not hasattr(inner, "_optimizer_step_post_hooks"):
        raise CpiftError(f"{type(optimizer).__name__} is no optimizer of torch's kind, whose steps can be followed")
    return inner


def _require_elements(model: torch.nn.Module) -> None:
    """Raise CpiftError for models whose parameters are not the checkpoint's, element by element."""
    parameters = dict(model.named_parameters())
    if hasattr(model, "peft_config") or any(".lora_" in name for name in parameters):
        raise CpiftError(
            "cannot freeze elements under LoRA or another adapter: an element of the weight W + s·BA is no element of "
            "A or B → train the whole model, or merge the adapter first"
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise CpiftError("cannot freeze elements under FSDP1, which flattens parameters → set fsdp_version: 2")
    if any(hasattr(parameter, "ds_id") for parameter in parameters.values()) or _of_deepspeed(model):
        raise CpiftError("cannot freeze elements under DeepSpeed, which steps on copies of its own → use FSDP2 or DDP")


def _of_deepspeed(model: torch.nn.Module) -> bool:
    return type(model).__module__.partition(".")[0] == "deepspeed"


def _require_floats(model: torch.nn.Module, masks: Masks) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in masks and not parameter.is_floating_point():
            kind = str(parameter.dtype).removeprefix("torch.")
            raise CpiftError(f"cannot freeze {name}: it is quantised ({kind}) → load the model in bf16, fp16 or fp32")


def _by_parameter(model: torch.nn.Module, parts: list[Masks], cores: tuple[Masks, ...]) -> Masks:
    """The union of the cores, packed, by the names that the parameters have in `model`."""
    actual = {bare(name): name for name, _ in model.named_parameters(remove_duplicate=False)}
    joint = _Union(parts)
    shapes: dict[str, tuple[int, ...]] = {}
    for core in cores:
        shapes |= core.shapes if isinstance(core, Core) else {}
    same = set(joint) <= set(actual)
    masks = joint if same or not shapes else ParameterMasks(_layout(model, shapes), joint)
    named = _Renamed({actual.get(name, name): name for name in masks}, masks)
    _require_sizes(model, named)
    return named


def _layout(model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """How the tensors of the checkpoint make the parameters of a model whose class has them otherwise."""
    bare_model: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    if not isinstance(bare_model, PreTrainedModel):
        raise CpiftError(f"{type(model).__name__} has none of the cores' names: is it the model they were selected of?")
    with torch.device("meta"):
        return layout_of(type(bare_model)(bare_model.config), shapes)


def bare(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _require_sizes(model: torch.nn.Module, masks: Masks) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, words in masks.items():
        if name in parameters and len(words) != (parameters[name].numel() + 31) // 32:
            raise CpiftError(
                f"cannot freeze {name}: its mask is of another size than the parameter "
                f"({list(parameters[name].shape)}) → use cores of this model"
            )


class _Union(Mapping[str, torch.Tensor]):
    """Masks of several cores as one, packed, put together when they are asked for."""

    def __init__(self, parts: list[Masks]):
        self._parts = parts
        self._names = tuple(dict.fromkeys(name for part in parts for name in part))

    def __getitem__(self, name: str) -> torch.Tensor:
        masks = [_packed(name, part[name]) for part in self._parts if name in part]
        if not masks:
            raise KeyError(name)
        if len({len(words) for words in masks}) > 1:
            raise CpiftError(f"cannot freeze {name}: the cores have masks of several sizes → use cores of one model")
        return union_mask(masks) if len(masks) > 1 else masks[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _packed(name: str, mask: torch.Tensor) -> torch.Tensor:
    if isinstance(mask, DTensor):
        raise CpiftError(f"cannot freeze {name}: its mask is sharded → give masks of whole parameters")
    if mask.dtype == torch.bool:
        return pack_mask(mask.reshape(-1).cpu())
    if mask.dtype == torch.int32 and mask.dim() == 1:
        return mask.cpu()
    what = f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
    raise CpiftError(f"cannot freeze {name}: its mask is {what} → give a bool mask of the parameter's shape")


class _Renamed(Mapping[str, torch.Tensor]):
    """Masks under the names that parameters have now."""

    def __init__(self, names: Mapping[str, str], masks: Masks):
        self._mine, self._masks = names, masks

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._masks[self._mine[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._mine)

    def __len__(self) -> int:
        return len(self._mine)
