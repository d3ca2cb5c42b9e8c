"""What takes the steps: `optimizer` of a fine-tune, each a library's own.

Freezing holds under all of them, for it puts values back after a step, whatever that did (`method/freezing.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Group = dict[str, Any]  # params, lr, weight_decay
Make = Callable[[torch.nn.Module, list[Group]], torch.optim.Optimizer]


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for matrices inside the layers, its AdamW for all else: embeddings, head, norms, biases, stacks of
    experts (Jordan et al., 2024). Muon's steps are scaled to the size of AdamW's (`match_rms_adamw`, Liu et al., 2025,
    arXiv 2502.16982), so that one learning rate serves both.

    The two share groups and state with this one, which is all that schedulers and checkpoints see.
    """

    def __init__(self, matrices: Sequence[Group], others: Sequence[Group]):
        kinds = [(torch.optim.Muon, matrices, {"adjust_lr_fn": "match_rms_adamw"}), (torch.optim.AdamW, others, {})]
        super().__init__([group for _, groups, _ in kinds for group in groups], {})
        self._parts: list[tuple[torch.optim.Optimizer, slice]] = []
        first = 0
        for kind, groups, options in kinds:
            own = slice(first, first + len(groups))
            first += len(groups)
            if groups:
                part: torch.optim.Optimizer = kind(self.param_groups[own], **options)
                self._parts.append((part, own))
        self._share()

    def _share(self) -> None:
        for part, own in self._parts:
            part.param_groups, part.state = self.param_groups[own], self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # as torch's
        """One step of both."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part, _ in self._parts:
            part.step()
        return loss


def outside_layers(model: torch.nn.Module) -> set[int]:
    """The parameters, by `id`, of the embeddings and of the head."""
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    return {id(parameter) for end in ends if end is not None for parameter in end.parameters()}


def muon(model: torch.nn.Module, groups: list[Group]) -> torch.optim.Optimizer:
    """`MuonAndAdamW` of a transformers model."""
    outside = outside_layers(model)

    def part(inside: bool) -> list[Group]:
        chosen = [
            group | {"params": [p for p in group["params"] if (p.ndim == 2 and id(p) not in outside) is inside]}
            for group in groups
        ]
        return [group for group in chosen if group["params"]]

    return MuonAndAdamW(part(True), part(False))


def _adafactor(model: torch.nn.Module, groups: list[Group]) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups)


def _adamw_8bit(model: torch.nn.Module, groups: list[Group]) -> torch.optim.Optimizer:
    import bitsandbytes

    made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups)
    return made


# `optimizer` → what makes it of a model and its groups; None: the Trainer itself
OPTIMIZERS: dict[str, Make | None] = {
    "adamw": None,
    "adafactor": _adafactor,
    "adamw_8bit": _adamw_8bit,
    "muon": muon,
}
