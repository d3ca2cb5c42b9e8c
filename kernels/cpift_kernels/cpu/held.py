"""Held elements on the CPU: the work on all tensors is one list, cut for threads by its length and not by tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from ..held import HeldElements
from .compiled import in_threads
from .freeze import restore_items, spans_of, zero_spans

CHUNKS = 32  # of the list: enough that threads end together, few enough that handing them out costs nothing


class HeldOnCpu(HeldElements):
    """See `HeldElements`."""

    def __init__(self, values: Sequence[Tensor], words: Sequence[Tensor]):
        super().__init__(values, words, "cpu")
        self._spans = [spans_of(mask) for mask in words]
        self._masks = np.array([mask.data_ptr() for mask in words], np.int64)
        self._widths = np.array([x.element_size() for x in values], np.int64)
        self._items = np.array(self._listed(), np.int64).reshape(-1, 4)
        bounds = np.linspace(0, len(self._items), min(CHUNKS, len(self._items)) + 1).astype(int).tolist()
        self._chunks = list(pairwise(bounds))

    def _listed(self) -> list[tuple[int, int, int, int]]:
        """See `restore_items`; spans without a set bit are left out."""
        items = []
        for place, (spans, saved, starts) in enumerate(zip(self._spans, self._saved, self._starts, strict=True)):
            for (first, last), (begin, end) in zip(spans, pairwise(starts.tolist()), strict=True):
                if end > begin:
                    items.append((place, first, last, saved.data_ptr() + saved.element_size() * begin))
        return items

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._items.nbytes + self._masks.nbytes + self._widths.nbytes

    def zero_(self, place: int, gradient: Tensor) -> None:
        self._check_one("gradient", gradient, self._sizes[place])
        zero_spans(gradient, self._words[place], self._spans[place])

    def restore_(self, values: Sequence[Tensor]) -> None:
        self._check(values)
        addresses = np.array([x.data_ptr() for x in values], np.int64)
        in_threads(lambda chunk: restore_items(self._items, addresses, self._masks, self._widths, *chunk), self._chunks)


def hold_masked(values: Sequence[Tensor], words: Sequence[Tensor]) -> HeldElements:
    """See `cpift_kernels.hold_masked`."""
    return HeldOnCpu(values, words)
