"""Models cut into segments: what a kernel needs to walk many tensors in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..streaming import CHUNK, ITEM, Ints, cut

if TYPE_CHECKING:
    from torch import Tensor

_KIND = {"torch.bfloat16": 0, "torch.float16": 1, "torch.float32": 2}


def storage_kind(tensor: Tensor) -> int:
    """The number by which kernels tell storage types apart: 0 bf16, 1 fp16, 2 fp32."""
    return _KIND[str(tensor.dtype)]


@dataclass(frozen=True)
class Segments:
    """S segments of N models and their base, in linear order; no segment is empty.

    chunk_size: elements of a chunk, a multiple of 32;
    tensor, start (within it), numel, chunk (number of its first chunk): [S]; base, base_kind [S] and tuned,
    tuned_kind [N, S]: addresses and storage kinds.
    """

    chunk_size: int
    tensor: Ints
    start: Ints
    numel: Ints
    chunk: Ints
    base: Ints
    base_kind: Ints
    tuned: Ints
    tuned_kind: Ints

    @classmethod
    def of(cls, pretrained: Sequence[Tensor], tuned: Sequence[Sequence[Tensor]]) -> Segments:
        """Cut the tensors; the tensors must outlive the segments, which hold addresses."""
        tensor, start, numel, first = cut([t.numel() for t in pretrained])
        models = [pretrained, *tuned]
        kind = np.array([[storage_kind(t) for t in model] for model in models], np.int64)[:, tensor]
        address = np.array([[t.data_ptr() for t in model] for model in models], np.int64)[:, tensor]
        address += start * np.where(kind == 2, 4, 2)
        return cls(CHUNK, tensor, start, numel, first, address[0], kind[0], address[1:], kind[1:])

    @property
    def total(self) -> int:
        """Elements of one model."""
        return int(self.numel.sum())

    def word_addresses(self, masks: Sequence[Tensor]) -> Ints:
        """[S]: where each segment's mask words begin; masks: one packed mask a tensor."""
        return np.array([words.data_ptr() for words in masks], np.int64)[self.tensor] + self.start // 8

    def items(self, threads: int) -> Iterator[tuple[int, int]]:
        """Runs of segments [first, last) for one kernel call each: at most ITEM elements, a few calls a thread."""
        models = len(self.tuned) + 1
        size = max(min(ITEM // models, self.total // (4 * threads)), 1 << 14)
        number = (np.cumsum(self.numel) - self.numel) // size
        edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(self.numel)]
        return ((first, last) for first, last in pairwise(edges) if first < last)
