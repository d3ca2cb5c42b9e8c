"""Linear layers that nothing trains, held in 4 bits by bitsandbytes: NF4 with double quantisation (QLoRA, Dettmers et
al., 2023, arXiv 2305.14314), about half a byte a weight.

They stand in for θ0 while adapters beside them are trained. What is kept of the fine-tune is θ0 as it is stored plus
the adapters' products (`Merged`): quantising changes no weight of the model by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.layout import Layout
from cpift.disk.facts import remembered
from cpift.errors import Problem, first_line
from cpift.pretrained.architecture import config_text
from cpift.training.weights.hollow import hollow_network, onto_cpu, without_masks

_BLOCK, _BLOCKS = 64, 256  # weights that share a scale of 8 bits, scales that share one of 32
_INSTEAD = "write base: stored"


def nf4_bytes(weights: int) -> int:
    """What so many weights of one layer take, less the tables that all layers have alike."""
    scales = -(-weights // _BLOCK)
    return -(-weights // 2) + scales + 4 * -(-scales // _BLOCKS)


def quantisable(model: Any) -> dict[str, torch.nn.Linear]:
    """The linear layers of a network by their names, but the head, and those that share their weights."""
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and module is not head and holders[id(module.weight)] == 1
    }


def hold_in_nf4(model: Any, compute: torch.dtype, device: torch.device) -> dict[str, Callable[[torch.Tensor], None]]:
    """What takes the values of linear layers' weights, by the weights' names: each puts a layer that holds them in 4
    bits on `device`, and multiplies in `compute`, into the place of one that holds them as they are."""
    model.is_loaded_in_4bit = True  # what peft asks
    return {f"{name}.weight": partial(_quantise, model, name, compute, device) for name in quantisable(model)}


def _quantise(model: Any, name: str, compute: torch.dtype, device: torch.device, values: torch.Tensor) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    plain = model.get_submodule(name)
    how = {"compress_statistics": True, "quant_type": "nf4"}
    layer = Linear4bit(plain.in_features, plain.out_features, bias=False, compute_dtype=compute, device="meta", **how)
    layer.weight = Params4bit(values.to(device), requires_grad=False, module=layer, **how).to(device)
    layer.weight.quant_state.dtype = compute  # of the weights in the backward pass, or they would be others there
    layer.bias = plain.bias
    layer.support_avx512bf16_for_cpu = False  # else weights are laid out for inference whenever a loss is looked at
    model.set_submodule(name, layer)


class Merged(torch.nn.Module):
    """θ0 and what adapters add to it, as a state that is computed tensor by tensor when it is asked for: W + s·B·A in
    float32 of the weights as they are stored, and everything else as it is stored."""

    def __init__(self, adapted: Any, layout: Layout, origin: Checkpoint):
        super().__init__()
        layers = adapted.get_base_model().named_modules()
        added = {f"{name}.weight": layer for name, layer in layers if hasattr(layer, "get_delta_weight")}
        self._state = _State(added, layout, origin)

    def state_dict(self, *_: Any, **__: Any) -> Any:
        """By the class's names."""
        return self._state


class _State(Mapping[str, torch.Tensor]):
    def __init__(self, added: Mapping[str, Any], layout: Layout, origin: Checkpoint):
        self._added, self._layout, self._origin = added, layout, origin
        self._last: tuple[str, torch.Tensor] | None = None  # is asked for several times in a row

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            self._last = (name, self._merged(name))
        return self._last[1]

    @torch.no_grad()
    def _merged(self, name: str) -> torch.Tensor:
        stored = self._layout.parameter(name, self._origin.mapped)
        layer = self._added.get(name)
        return stored if layer is None else stored.float() + layer.get_delta_weight("default").float().cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout.blocks)

    def __len__(self) -> int:
        return len(self._layout.blocks)


def not_quantised(folder: Path, where: str) -> list[Problem]:
    """Why linear layers of the model in a folder are not held in 4 bits; empty if they can be. `where`: the field.

    Raises CheckpointError.
    """
    reasons = remembered("not in 4 bits", config_text(folder), lambda: _reasons(folder))
    return [Problem(where, f"is nf4, and {reason}", _INSTEAD) for reason in reasons]


def _reasons(folder: Path) -> list[str]:
    model = hollow_network(folder, without_masks())
    linear = quantisable(model)
    ends = {id(p) for end in (model.get_input_embeddings(), model.get_output_embeddings()) for p in end.parameters()}
    inside = sum(p.numel() for p in model.parameters() if id(p) not in ends)
    held = sum(layer.weight.numel() for layer in linear.values())
    if 2 * held < inside:
        return [f"of {inside:,} weights inside the model's layers {held:,} are linear layers', which alone it holds"]
    if odd := [name for name, layer in linear.items() if layer.in_features % 2]:
        return [f"{odd[0]} takes an odd number of inputs, and two weights share a byte"]
    return _read_otherwise(model, linear)


class _Sealed(torch.nn.Module):
    """A linear layer whose weights nobody but itself can read, as those in 4 bits."""

    def __init__(self, outputs: int):
        super().__init__()
        self._outputs = outputs

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.new_empty((*values.shape[:-1], self._outputs))


def _read_otherwise(model: Any, linear: Mapping[str, torch.nn.Linear]) -> list[str]:
    """Layers that take the weights of linear layers and multiply by themselves, as mamba's do."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name, layer in linear.items():
        model.set_submodule(name, _Sealed(layer.out_features))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        onto_cpu(model)
        try:
            model(input_ids=torch.zeros((1, 8), dtype=torch.long), use_cache=False)
        except AttributeError as error:
            return [f"the model's class reads weights of linear layers by itself ({first_line(error)})"]
    return []
