"""Tensors in one buffer a model, and launches that are counted and not made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from cpift_kernels import Flat, FlatLayout
from cpift_kernels.triton import common
from cpift_kernels.triton.offline import describe
from torch import Tensor

WRITTEN = ("upper", "counts", "faults", "keys", "found", "sums", "partial", "settled", "out")


def laid(tensors: Sequence[Tensor], layout: FlatLayout) -> Tensor:
    """[total]: tensors at their places, and zeros."""
    flat = torch.zeros(layout.total, dtype=tensors[0].dtype)
    for number, values in enumerate(tensors):
        layout.tensor(flat, number).copy_(values)
    return flat


def laid_words(words: Sequence[Tensor], layout: FlatLayout) -> Tensor:
    """int32 [total / 32]: the masks of the tensors."""
    flat = torch.zeros(layout.total // 32, dtype=torch.int32)
    for number, mask in enumerate(words):
        layout.words(flat, number).copy_(mask)
    return flat


def flats_of(models: Sequence[Sequence[Tensor]]) -> list[Flat]:
    """By the tensors' dtypes in each of the models; without what is empty."""
    groups: dict[tuple[torch.dtype, ...], list[int]] = {}
    for number, tensors in enumerate(zip(*models, strict=True)):
        if tensors[0].numel():
            groups.setdefault(tuple(x.dtype for x in tensors), []).append(number)
    flats = []
    for numbers in groups.values():
        layout = FlatLayout([models[0][number].numel() for number in numbers])
        flats.append(Flat(layout, numbers, [laid([model[n] for n in numbers], layout) for model in models]))
    return flats


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Within it no kernel runs: what one would have written is 0. Gives the number of launches by kernel."""
    counts: Counter[str] = Counter()

    def launch(*args: Any, **options: Any) -> None:
        launched = describe(*args, **options)
        if launched.programs:
            counts[launched.kernel.__name__] += 1
        for name in WRITTEN:
            written = launched.arguments.get(name)
            for tensor in written if isinstance(written, tuple) else (written,):
                if isinstance(tensor, Tensor):
                    tensor.zero_()

    with patch.object(common, "launch", launch):
        yield counts
