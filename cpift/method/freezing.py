"""Element-wise freezing under any optimizer: θ_{t+1} = θ_t + Δθ_t ⊙ M_k (docs/method.md, stage 6).

The *update* is masked, not only the gradient: gradients of frozen elements are zeroed as they are accumulated, so they
enter neither the clipping norm nor the optimizer's moments, and their values are put back bit for bit after each step,
so neither momentum nor decoupled weight decay moves them. Memory: the packed masks (D/8 bytes) and the frozen values.

The same hooks serve one process, DDP and FSDP2. DDP copies a gradient into its bucket after the hook has zeroed it, on
every worker alike, so the mean is zero too. FSDP2 calls the hook on the sharded parameter after the reduce-scatter;
each worker then holds its own slice of the mask and of the values. An optimizer sees zero gradients at frozen
elements; one that mixes elements (Adafactor's row and column means) counts those zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType

import torch
from cpift_kernels import count_mask, hold_masked, pack_mask, unpack_mask
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.hooks import RemovableHandle

from cpift.errors import CpiftError


class ElementFreezer:
    """Holds the masked elements of a model at the values that they have when this object is made.

    `masks`: packed int32 words of whole parameters by name (set bit = frozen), read one at a time. A name that is no
    parameter of the model is an error: an element that nobody holds still would be a silent breach of the method. So
    is LoRA, where no mask of A's and B's elements can hold single elements of their product.
    Use as a context manager, or `attach` and `detach`. Under DDP give the model without its wrapper.
    """

    def __init__(self, model: torch.nn.Module, masks: Mapping[str, torch.Tensor]):
        self._words: dict[str, torch.Tensor] = {}
        self._parameters: list[torch.nn.Parameter] = []
        self.frozen_elements = 0  # of the whole model, whatever this worker holds of it
        for name, parameter in _parameters_of(model, masks).items():
            mask = masks[name]
            self.frozen_elements += count_mask(mask)
            local = _local_words(parameter, mask)
            if bool(local.any()):
                self._words[name] = local
                self._parameters.append(parameter)
        self._held = hold_masked(self._values(), list(self._words.values()))
        self._handles: list[RemovableHandle] = []

    def _values(self) -> list[torch.Tensor]:
        """1-D, of each masked parameter what this worker holds of it."""
        return [_flat(parameter) for parameter in self._parameters]

    @property
    def nbytes(self) -> int:
        """Memory held on this worker: masks, frozen values, and where in these the blocks of a mask begin."""
        return self._held.nbytes

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Start holding: hooks on the gradients of the masked parameters and on the optimizer's step."""
        for place, parameter in enumerate(self._parameters):
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._zeroing(place)))
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.restore()))

    def _zeroing(self, place: int) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                self._held.zero_(place, _flat(parameter.grad))

        return hook

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def restore(self) -> None:
        """Put every frozen value back."""
        self._held.restore_(self._values())

    def __enter__(self) -> ElementFreezer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


class ElementAnchor(ElementFreezer):
    """Pulls the masked elements back to what they are in `origin`, instead of holding them.

    After each step θ ← θ − lr·strength·(θ − θ_origin) there, never past θ_origin: the L2 penalty of L2-SP (Li et al.,
    2018) on some elements, decoupled from the gradient as AdamW's decay is, so that Adam's scaling does not undo it.
    `origin` gives whole parameters by name, of any floating dtype; so does `weights`, of values from 0 on: where it is
    given an element's strength is its weight over the mean weight of all masked elements (second moments, which stand
    for the diagonal of the Fisher matrix: elastic weight consolidation, arXiv 1612.00796). Raises CpiftError where that
    mean is 0.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        masks: Mapping[str, torch.Tensor],
        strength: float,
        origin: Callable[[str], torch.Tensor],
        weights: Callable[[str], torch.Tensor] | None = None,
    ):
        super().__init__(model, masks)
        self._strength = strength
        for place, (name, p) in enumerate(zip(self._words, self._parameters, strict=True)):  # one whole at a time
            self._held.replace(place, _here(p, origin(name)))
        self._weights: list[torch.Tensor] | None = None
        if weights is not None:
            mean = _mean_weight(model, masks, weights)
            self._weights = [
                self._held.chosen(place, _here(p, weights(name))) / mean
                for place, (name, p) in enumerate(zip(self._words, self._parameters, strict=True))
            ]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Start pulling: a hook on the optimizer's step."""
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        self._groups = [groups[id(parameter)] for parameter in self._parameters]
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.pull()))

    def pull(self) -> None:
        """One step back."""
        if self._weights is None:
            shares = [min(self._strength * group["lr"], 1.0) for group in self._groups]
            self._held.pull_(self._values(), shares)
            return
        each = zip(self._groups, self._weights, strict=True)
        self._held.pull_each_(
            self._values(), [(weight * (self._strength * group["lr"])).clamp_(max=1.0) for group, weight in each]
        )


def _here(parameter: torch.nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """1-D: what this worker holds of a parameter's whole values, in its dtype."""
    return _local(parameter, whole.to(parameter.dtype).view(parameter.shape)).to(parameter.device)


def _mean_weight(
    model: torch.nn.Module, masks: Mapping[str, torch.Tensor], weights: Callable[[str], torch.Tensor]
) -> float:
    """Over the masked elements of whole parameters, so that all workers have the same."""
    total, count = 0.0, 0
    for name, parameter in _parameters_of(model, masks).items():
        mask = unpack_mask(masks[name].cpu(), parameter.numel())
        total += float(weights(name).reshape(-1).cpu()[mask].sum(dtype=torch.float64))
        count += int(mask.sum())
    if total <= 0:
        raise CpiftError("the weights of a penalty are 0 wherever it pulls → take it without weights")
    return total / count


def snapshot(model: torch.nn.Module, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of this worker's masked values by plain boolean indexing: an account that shares nothing with the freezer.

    Of a parameter that FSDP2 shards, the values in this worker's shard.
    """
    return {
        name: _flat(parameter).cpu()[_local_mask(parameter, masks[name]).cpu()]
        for name, parameter in _parameters_of(model, masks).items()
    }


def count_moved(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> int:
    """How many elements of two snapshots differ in any bit."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return sum(
        int((values.view(bits[values.itemsize]) != after[name].view(bits[values.itemsize])).sum())
        for name, values in before.items()
    )


def count_moved_everywhere(
    model: torch.nn.Module, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> int:
    """`count_moved` over the shards of all workers; where the model is not sharded, of this worker. Collective."""
    moved = count_moved(before, after)
    sharded = next((parameter for parameter in model.parameters() if isinstance(parameter, DTensor)), None)
    if sharded is None:
        return moved
    total = torch.tensor(moved, device=sharded.device)
    torch.distributed.all_reduce(total)
    return int(total)


def _parameters_of(model: torch.nn.Module, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.nn.Parameter]:
    """The masked parameters by the masks' names; tied parameters answer to each of their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unknown = sorted(set(masks) - set(parameters))
    if unknown and any(".lora_" in name for name in parameters):
        raise CpiftError(
            f"cannot freeze {unknown[0]} under LoRA: an element of the weight W + s·BA is no element of A or B, so "
            "no mask can hold it. Train this stage without `lora`, or merge the adapter first"
        )
    if unknown:
        raise CpiftError(
            f"cannot freeze {', '.join(unknown[:5])}: the model has no parameter of that name. "
            f"Its parameters look like {next(iter(parameters), 'none')!r}"
        )
    held = {name: parameters[name] for name in masks}
    if len({id(parameter) for parameter in held.values()}) < len(held):
        twice = sorted(
            name for name, parameter in held.items() if sum(parameter is other for other in held.values()) > 1
        )
        raise CpiftError(f"{' and '.join(twice)} are one tied parameter: give one mask for it")
    return held


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """What this worker holds of a parameter or gradient, as a 1-D view."""
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)


def _local_mask(parameter: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Bool [elements that this worker holds]: the worker's slice of a whole parameter's mask. No communication."""
    return _local(parameter, unpack_mask(words, parameter.numel()).view(parameter.shape))


def _local(parameter: torch.Tensor, shardr: torch.Tensor) -> torch.Tensor:
    """1-D: the worker's slice of a tensor of a whole parameter's shape. No communication."""
    if isinstance(parameter, DTensor):
        placed = distribute_tensor(shardr, parameter.device_mesh, parameter.placements, src_data_rank=None)
        shardr = placed.to_local()
    return shardr.reshape(-1)


def _local_words(parameter: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """`_local_mask`, packed, where the worker's values are."""
    local = pack_mask(_local_mask(parameter, words)) if isinstance(parameter, DTensor) else words
    return local.to(_flat(parameter).device)
