"""Freezing on the CPU: mask words without a set bit are skipped, and the memory behind them with them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..freeze import saved_mismatch
from .compiled import cpu_features, in_threads, inner, kernel
from .emit import BF16, FP32, LANES
from .words import clear, clear_one, compress, expand, fetch, lowest_bit, move, popcount, read_word

# Mask words of one call. Most gradients are one: they come out of a library's threads, which wait awake on the other
# cores for their next work, and another thread there costs more than it saves.
SPAN = 1 << 15
AHEAD = 24  # mask words between what is worked on and what is fetched
LINE = 64  # bytes
GATHER, SCATTER = 0, 1
# Without these LLVM takes such a copy apart, one branch an element.
COMPRESSES = all(cpu_features().get(name) for name in ("avx512f", "avx512vbmi2"))


def zero_masked_(values: Tensor, words: Tensor) -> None:
    """See `cpift_kernels.zero_masked_`."""
    zero_spans(values, words, spans_of(words))


def gather_masked(values: Tensor, words: Tensor) -> Tensor:
    """See `cpift_kernels.gather_masked`."""
    offsets = offsets_of(words)
    saved = torch.empty(int(offsets[-1]), dtype=values.dtype)
    _move_all(GATHER, values, words, saved, offsets)
    return saved


def mask_starts(words: Tensor, numel: int) -> Tensor:
    """See `cpift_kernels.mask_starts`."""
    return torch.from_numpy(offsets_of(words))


def scatter_masked_(values: Tensor, words: Tensor, saved: Tensor, *, starts: Tensor | None = None) -> None:
    """See `cpift_kernels.scatter_masked_`."""
    offsets = offsets_of(words) if starts is None else starts.numpy()
    if saved.numel() != offsets[-1]:
        raise saved_mismatch(saved.numel(), int(offsets[-1]))
    _move_all(SCATTER, values, words, saved, offsets)


def spans_of(words: Tensor) -> list[tuple[int, int]]:
    """The first mask word of each call and the one after its last."""
    return [(start, min(start + SPAN, words.numel())) for start in range(0, words.numel(), SPAN)]


def offsets_of(words: Tensor) -> np.ndarray:
    """[spans + 1]: the number of set bits before each span, and in all."""
    counts = in_threads(lambda span: _count(words.data_ptr(), *span), spans_of(words))
    return np.concatenate([[0], np.cumsum(np.array(counts, np.int64))]).astype(np.int64)


def zero_spans(values: Tensor, words: Tensor, spans: list[tuple[int, int]]) -> None:
    """Zero the masked elements behind some words."""
    size, numel, first, mask = values.element_size(), values.numel(), values.data_ptr(), words.data_ptr()
    in_threads(lambda span: _zero(size, first, mask, *span, numel), spans)


def _move_all(direction: int, values: Tensor, words: Tensor, saved: Tensor, offsets: np.ndarray) -> None:
    size = values.element_size()
    in_threads(
        lambda item: _move(
            direction, size, values.data_ptr(), words.data_ptr(), *item[0], saved.data_ptr() + size * int(item[1])
        ),
        list(zip(spans_of(words), offsets[:-1], strict=True)),
    )


@kernel
def _count(words, start, stop):  # type: ignore[no-untyped-def]
    """Set bits of the words start..stop-1."""
    total = 0
    for word in range(start, stop):
        total += popcount(read_word(words + 4 * word))
    return total


@inner
def _fetch_ahead(size, values, words, word, stop):  # type: ignore[no-untyped-def]
    """Ask for the elements of the mask word AHEAD, which processors do not do themselves past a page or a gap.

    Without a branch: whether a word is empty cannot be predicted.
    """
    late = min(word + AHEAD, stop - 1)
    wanted = late if read_word(words + 4 * late) != 0 else word
    for line in range(0, size * LANES, LINE):
        fetch(values + size * LANES * wanted + line)


@kernel
def _zero(size, values, words, start, stop, numel):  # type: ignore[no-untyped-def]
    """Zero the masked elements of the words start..stop-1; size: bytes an element."""
    if size == 2:
        _zero_as(BF16, size, values, words, start, stop, numel)
    else:
        _zero_as(FP32, size, values, words, start, stop, numel)


@inner
def _zero_as(storage, size, values, words, start, stop, numel):  # type: ignore[no-untyped-def]
    for word in range(start, stop):
        _fetch_ahead(size, values, words, word, stop)
        bits = read_word(words + 4 * word)
        first = values + size * LANES * word
        if bits != 0 and numel - word * LANES >= LANES:
            clear(storage, first, bits)
        else:
            while bits != 0:
                clear_one(storage, first + size * lowest_bit(bits))
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
        _fetch_ahead(size, values, words, word, stop)
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


@kernel
def restore_items(items, addresses, masks, sizes, start, stop):  # type: ignore[no-untyped-def]
    """Put saved elements back, for the items start..stop-1.

    items [n, 4]: a tensor's place, first mask word, the one after its last, address of what is saved. By place, the
    addresses of tensors and masks, and bytes an element.
    """
    for item in range(start, stop):
        place, first, last, saved = items[item]
        _move(SCATTER, sizes[place], addresses[place], masks[place], first, last, saved)
