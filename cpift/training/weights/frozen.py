"""Weights that nothing trains (those under adapters), in the dtype of their file: bfloat16 products narrow them anyway,
so that they come out the same, bit for bit, and half of the memory is enough.

Only linear layers', which all products are: embeddings and norms decide in what dtype states go from layer to layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.layout import Layout, checkpoint_layout

Dtypes = Mapping[str, torch.dtype]  # by parameter


def stored_dtypes(checkpoint: Checkpoint, layout: Layout | None = None) -> Dtypes:
    """What each parameter is stored in; without those that are made of several dtypes."""
    blocks = (layout or checkpoint_layout(checkpoint)).blocks
    kinds = {name: {checkpoint.tensors[block.tensor].dtype for block in parts} for name, parts in blocks.items()}
    return {name: next(iter(dtypes)) for name, dtypes in kinds.items() if len(dtypes) == 1}


def hold_as_stored(model: torch.nn.Module, stored: Dtypes) -> None:
    """Give linear layers weights of these dtypes, not written and not trained. A layer that shares its weights, as a
    head with an embedding, keeps them."""
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        if type(module) is not torch.nn.Linear:
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            dtype = stored.get(f"{prefix}.{name}", parameter.dtype)
            if dtype.itemsize < parameter.dtype.itemsize and holders[id(parameter)] == 1:
                setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, dtype=dtype), requires_grad=False))


@contextmanager
def seen_as_float32(model: torch.nn.Module) -> Iterator[None]:
    """Within it every parameter is one of float32, of a single element's memory: peft makes new adapters in the dtype
    of the layer beside them, and rounds what they begin with."""
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]  # in 4 bits they are not
    narrow = {parameter: parameter.data for parameter in weights if parameter.dtype != torch.float32}
    for parameter, values in narrow.items():
        parameter.data = torch.zeros((), dtype=torch.float32, device=values.device).expand(values.shape)
    try:
        yield
    finally:
        for parameter, values in narrow.items():
            parameter.data = values
