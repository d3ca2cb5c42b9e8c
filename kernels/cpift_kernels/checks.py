"""Argument checks shared by the operations; every message names the argument, the value and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


FLOATING = ("torch.bfloat16", "torch.float16", "torch.float32")
MAX_TASKS = 16
MAX_SOURCES = MAX_TASKS + 2


def words_for(numel: int) -> int:
    """Number of int32 words of a mask over `numel` elements."""
    return (numel + 31) // 32


def check_values(name: str, tensor: Tensor) -> None:
    """A contiguous bf16, fp16 or fp32 tensor, or ValueError."""
    if str(tensor.dtype) not in FLOATING:
        raise ValueError(f"{name} has dtype {tensor.dtype}; convert it to bfloat16, float16 or float32")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {tensor.stride()}); call .contiguous() first")


def check_words(name: str, words: Tensor, numel: int) -> None:
    """A mask of `numel` elements: contiguous 1-D int32, ceil(numel / 32) words, or ValueError."""
    import torch

    if words.dtype != torch.int32 or words.dim() != 1 or not words.is_contiguous():
        raise ValueError(f"{name} is {words.dtype} of shape {tuple(words.shape)}; make it with pack_mask (int32, 1-D)")
    if words.numel() != words_for(numel):
        raise ValueError(f"{name} has {words.numel()} words for {numel} elements; expected {words_for(numel)}")


def check_same_shape(name: str, tensor: Tensor, expected: Tensor) -> None:
    """`tensor` has the shape of `expected`, or ValueError."""
    if tensor.shape != expected.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}")


def check_models(pretrained: Sequence[Tensor], tuned: Sequence[Sequence[Tensor]]) -> None:
    """At most 16 models of contiguous floating tensors with the shapes of `pretrained`, or ValueError."""
    if not 1 <= len(tuned) <= MAX_TASKS:
        raise ValueError(f"tuned holds {len(tuned)} models; between 1 and {MAX_TASKS} are supported")
    for t, tensor in enumerate(pretrained):
        check_values(f"pretrained[{t}]", tensor)
    for i, model in enumerate(tuned):
        if len(model) != len(pretrained):
            raise ValueError(f"tuned[{i}] holds {len(model)} tensors, pretrained {len(pretrained)}; pass the same list")
        for t, tensor in enumerate(model):
            check_values(f"tuned[{i}][{t}]", tensor)
            check_same_shape(f"tuned[{i}][{t}]", tensor, pretrained[t])
