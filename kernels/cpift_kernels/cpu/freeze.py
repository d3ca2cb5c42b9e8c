"""Freezing on the CPU: the masked elements are found by counting trailing zeros of the mask words."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..freeze import saved_mismatch
from .compiled import cpu_features, in_threads, inner, kernel
from .emit import BF16, FP32, LANES
from .words import clear, compress, expand, lowest_bit, move, popcount, read_word

SPAN = 1 << 15  # mask words of one call
GATHER, SCATTER = 0, 1
# Without these LLVM takes such a copy apart, one branch an element.
COMPRESSES = all(cpu_features().get(name) for name in ("avx512f", "avx512vbmi2"))


def zero_masked_(values: Tensor, words: Tensor) -> None:
    """See `cpift_kernels.zero_masked_`."""
    size, numel = values.element_size(), values.numel()
    zero = np.zeros(1, np.int64)
    in_threads(
        lambda span: _zero(size, values.data_ptr(), words.data_ptr(), *span, numel, zero.ctypes.data), _spans(words)
    )


def gather_masked(values: Tensor, words: Tensor) -> Tensor:
    """See `cpift_kernels.gather_masked`."""
    offsets = _offsets(words)
    saved = torch.empty(int(offsets[-1]), dtype=values.dtype)
    _move_all(GATHER, values, words, saved, offsets)
    return saved


def mask_starts(words: Tensor, numel: int) -> Tensor:
    """See `cpift_kernels.mask_starts`."""
    return torch.from_numpy(_offsets(words))


def scatter_masked_(values: Tensor, words: Tensor, saved: Tensor, *, starts: Tensor | None = None) -> None:
    """See `cpift_kernels.scatter_masked_`."""
    offsets = _offsets(words) if starts is None else starts.numpy()
    if saved.numel() != offsets[-1]:
        raise saved_mismatch(saved.numel(), int(offsets[-1]))
    _move_all(SCATTER, values, words, saved, offsets)


def _spans(words: Tensor) -> list[tuple[int, int]]:
    return [(start, min(start + SPAN, words.numel())) for start in range(0, words.numel(), SPAN)]


def _offsets(words: Tensor) -> np.ndarray:
    """[spans + 1]: the number of set bits before each span, and in all."""
    counts = in_threads(lambda span: _count(words.data_ptr(), *span), _spans(words))
    return np.concatenate([[0], np.cumsum(np.array(counts, np.int64))]).astype(np.int64)


def _move_all(direction: int, values: Tensor, words: Tensor, saved: Tensor, offsets: np.ndarray) -> None:
    size = values.element_size()
    in_threads(
        lambda item: _move(
            direction, size, values.data_ptr(), words.data_ptr(), *item[0], saved.data_ptr() + size * int(item[1])
        ),
        list(zip(_spans(words), offsets[:-1], strict=True)),
    )


@kernel
def _count(words, start, stop):  # type: ignore[no-untyped-def]
    """Set bits of the words start..stop-1."""
    total = 0
    for word in range(start, stop):
        total += popcount(read_word(words + 4 * word))
    return total


@kernel
def _zero(size, values, words, start, stop, numel, zero):  # type: ignore[no-untyped-def]
    """Zero the masked elements of the words start..stop-1; size: bytes an element; zero: address of a zero."""
    if size == 2:
        _zero_as(BF16, size, values, words, start, stop, numel, zero)
    else:
        _zero_as(FP32, size, values, words, start, stop, numel, zero)


@inner
def _zero_as(storage, size, values, words, start, stop, numel, zero):  # type: ignore[no-untyped-def]
    for word in range(start, stop):
        bits = read_word(words + 4 * word)
        first = values + size * LANES * word
        if bits != 0 and numel - word * LANES >= LANES:
            clear(storage, first, bits)
        else:
            while bits != 0:
                move(storage, zero, first + size * lowest_bit(bits))
                bits = np.uint32(bits & (bits - np.uint32(1)))


@kernel
def _move(direction, size, values, words, start, stop, saved):  # type: ignore[no-untyped-def]
    """Move the masked elements of the words start..stop-1 to or from `saved`, in order."""
    if size == 2:
        _move_as(BF16, direction, size, values, words, start, stop, saved)
    else:
        _move_as(FP32, direction, size, values, words, start, stop, saved)


@inner
def _move_as(storage, direction, size, values, words, start, stop, saved):  # type: ignore[no-untyped-def]
    for word in range(start, stop):
        bits = read_word(words + 4 * word)
        if bits == 0:
            continue
        first = values + size * LANES * word
        if COMPRESSES:
            if direction == GATHER:
                compress(storage, first, saved, bits)
            else:
                expand(storage, saved, first, bits)
            saved += size * popcount(bits)
        else:
            while bits != 0:
                value = first + size * lowest_bit(bits)
                if direction == GATHER:
                    move(storage, value, saved)
                else:
                    move(storage, saved, value)
                saved += size
                bits = np.uint32(bits & (bits - np.uint32(1)))
