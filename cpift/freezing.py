"""Element-wise freezing under any optimizer: θ_{t+1} = θ_t + Δθ_t ⊙ M_k (METHOD.md, stage 6).

The *update* is masked, not only the gradient: gradients of frozen elements are zeroed as they are accumulated, so they
enter neither the clipping norm nor the optimizer's moments, and their values are put back bit for bit after each step,
so neither momentum nor decoupled weight decay moves them. Memory: the packed masks (D/8 bytes) and the frozen values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType

import torch
from cpift_kernels import gather_masked, scatter_masked_, unpack_mask, zero_masked_
from torch.utils.hooks import RemovableHandle

from cpift.errors import CpiftError


class ElementFreezer:
    """Holds the masked elements of a model at the values that they have when this object is made.

    `masks`: packed int32 words by parameter name (set bit = frozen). A name that is no parameter of the model is an
    error: an element that nobody holds still would be a silent breach of the method.
    Use as a context manager, or `attach` and `detach`.
    """

    def __init__(self, model: torch.nn.Module, masks: Mapping[str, torch.Tensor]):
        parameters = dict(model.named_parameters())
        unknown = sorted(set(masks) - set(parameters))
        if unknown:
            raise CpiftError(
                f"cannot freeze {', '.join(unknown[:5])}: the model has no parameter of that name. "
                f"Its parameters look like {next(iter(parameters), 'none')!r}"
            )
        self._parameters = {name: parameters[name] for name in masks}
        self._words = {name: words.to(parameters[name].device) for name, words in masks.items()}
        self._saved = {name: self._gather(name) for name in masks}
        self._handles: list[RemovableHandle] = []

    @property
    def frozen_elements(self) -> int:
        return sum(values.numel() for values in self._saved.values())

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Start holding: hooks on the gradients of the masked parameters and on the optimizer's step."""
        for name, parameter in self._parameters.items():
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._zero_gradient(name)))
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.restore()))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def restore(self) -> None:
        """Put every frozen value back."""
        for name, parameter in self._parameters.items():
            scatter_masked_(parameter.detach().view(-1), self._words[name], self._saved[name])

    def _zero_gradient(self, name: str) -> Callable[[torch.Tensor], None]:
        words = self._words[name]

        def hook(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                zero_masked_(parameter.grad.view(-1), words)

        return hook

    @torch.no_grad()
    def _gather(self, name: str) -> torch.Tensor:
        return gather_masked(self._parameters[name].detach().view(-1), self._words[name])

    def __enter__(self) -> ElementFreezer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


@torch.no_grad()
def snapshot(model: torch.nn.Module, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of the masked values by plain boolean indexing: an account that shares nothing with the freezer."""
    parameters = dict(model.named_parameters())
    return {
        name: parameters[name].detach().cpu().flatten()[unpack_mask(words.cpu(), parameters[name].numel())]
        for name, words in masks.items()
    }


def count_moved(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> int:
    """How many elements of two snapshots differ in any bit."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return sum(
        int((values.view(bits[values.itemsize]) != after[name].view(bits[values.itemsize])).sum())
        for name, values in before.items()
    )
