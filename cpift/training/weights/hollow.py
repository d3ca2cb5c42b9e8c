"""A model of shapes without values: its layers run, and nothing is computed or allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cpift.pretrained.loading import empty_network


def hollow_network(folder: Path, attention: str | None) -> Any:
    """The network of a folder on `meta`, in float32, with transformers' own attention or `without_masks()`."""
    how = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        return empty_network(folder, dtype=torch.float32, **how)


def without_masks() -> str:
    """The name of an attention that is torch's own and builds no mask: whether rows need one, only values tell, and the
    longest batch has no padding."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("cpift_counted", sdpa_attention_forward)
    AttentionMaskInterface.register("cpift_counted", lambda *_, **__: None)
    return "cpift_counted"


def onto_cpu(model: torch.nn.Module) -> None:
    """From `meta`, in FakeTensorMode: tensors of a device that autocast and libraries know, without memory."""
    known: dict[int, torch.nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            there = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
            setattr(module, name, known.setdefault(id(parameter), there))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
