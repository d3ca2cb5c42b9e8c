"""Bit-packed element masks.

A mask of a tensor with `numel` elements is a 1-D int32 tensor of ceil(numel / 32) words. Element j
(row-major) is bit j % 32 of word j // 32; the padding bits of the last word are 0. An empty tensor has a
mask of no words. These conversions are plain torch and run on any device of a little-endian machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .checks import check_words, words_for

if TYPE_CHECKING:
    from torch import Tensor


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape into int32 words, row-major."""
    import torch

    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}; pass a bool tensor")
    numel = mask.numel()
    bits = torch.zeros(words_for(numel) * 32, dtype=torch.uint8, device=mask.device)
    bits[:numel] = mask.reshape(-1)
    place = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits.view(-1, 8) * place).sum(1, dtype=torch.uint8).view(torch.int32)


def unpack_mask(words: Tensor, numel: int) -> Tensor:
    """The bool tensor [numel] that `words` packs."""
    import torch

    check_words("words", words, numel)
    place = torch.arange(8, dtype=torch.uint8, device=words.device)
    return ((words.view(torch.uint8)[:, None] >> place) & 1).view(-1)[:numel].bool()


def count_mask(words: Tensor) -> int:
    """The number of set bits (popcount)."""
    import torch

    if words.device.type == "cpu":  # one pass that makes an eighth of its bytes, where the other makes several copies
        return int(np.bitwise_count(words.contiguous().numpy().view(np.uint32)).sum(dtype=np.int64))
    bits = words.view(torch.uint8)
    bits = bits - ((bits >> 1) & 0x55)
    bits = (bits & 0x33) + ((bits >> 2) & 0x33)
    return int(((bits + (bits >> 4)) & 0x0F).sum(dtype=torch.int64))


def union_mask(words: Sequence[Tensor]) -> Tensor:
    """The OR of the masks of one tensor; a new tensor."""
    if not words:
        raise ValueError("words is empty; pass at least one mask")
    union = copy_mask(words[0])
    for mask in words[1:]:
        if union.device.type == "cpu" and mask.shape == union.shape:
            np.bitwise_or(union.numpy(), mask.numpy(), out=union.numpy())
        else:
            union |= mask
    return union


def copy_mask(words: Tensor) -> Tensor:
    """The same words in memory of their own. On the CPU by numpy, as above: for so few bytes torch has threads of its
    own, which then wait for more by turning round, beside those of the kernels."""
    import torch

    return torch.from_numpy(words.numpy().copy()) if words.device.type == "cpu" else words.clone()
