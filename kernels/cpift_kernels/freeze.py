"""Freezing: hold the elements of a mask still under any optimizer (CPI-FT's masked update θ ← θ + Δθ ⊙ M).

`zero_masked_` takes the frozen elements out of a gradient (or of an optimizer's moments), `gather_masked`
saves their values in row-major order, `scatter_masked_` puts them back bit for bit. One tensor at a time,
1-D contiguous; masks are packed (see `masks`) and a set bit means frozen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .checks import check_values, check_words
from .dispatch import Backend, Resolved, implementation, resolve
from .masks import count_mask, unpack_mask

if TYPE_CHECKING:
    from torch import Tensor


def zero_masked_reference_(values: Tensor, words: Tensor) -> None:
    """`zero_masked_` in plain torch."""
    values.masked_fill_(unpack_mask(words, values.numel()), 0.0)


def gather_masked_reference(values: Tensor, words: Tensor) -> Tensor:
    """`gather_masked` in plain torch."""
    return values[unpack_mask(words, values.numel())]


def mask_starts_reference(words: Tensor, numel: int) -> Tensor:
    """`mask_starts` in plain torch: one block."""
    import torch

    return torch.tensor([0, count_mask(words)])


def scatter_masked_reference_(values: Tensor, words: Tensor, saved: Tensor, *, starts: Tensor | None = None) -> None:
    """`scatter_masked_` in plain torch."""
    if saved.numel() != count_mask(words):
        raise saved_mismatch(saved.numel(), count_mask(words))
    values.masked_scatter_(unpack_mask(words, values.numel()), saved)


def zero_masked_(values: Tensor, words: Tensor, *, backend: Backend = "auto") -> None:
    """Set the masked elements of `values` [numel] to +0 in place, NaN and Inf included."""
    implementation(_resolve(backend, values, words), zero_masked_reference_)(values, words)


def gather_masked(values: Tensor, words: Tensor, *, backend: Backend = "auto") -> Tensor:
    """The masked elements of `values` [numel], in order: a new tensor [count] of the same dtype."""
    return implementation(_resolve(backend, values, words), gather_masked_reference)(values, words)


def mask_starts(words: Tensor, numel: int, *, backend: Backend = "auto") -> Tensor:
    """Where the elements of each block of a mask begin among those saved: int64 [blocks + 1], the last their number.

    For `scatter_masked_` with the same backend, which cuts the blocks as it likes.
    """
    check_words("words", words, numel)
    return implementation(resolve(backend, words), mask_starts_reference)(words, numel)


def scatter_masked_(
    values: Tensor, words: Tensor, saved: Tensor, *, starts: Tensor | None = None, backend: Backend = "auto"
) -> None:
    """Put `saved` [count], from `gather_masked`, back into `values` [numel] in place, bit for bit.

    starts: what `mask_starts` gave for this mask, for a caller that restores the same mask often: one launch on a GPU
    then, and no wait for it; the length of `saved` is taken on trust.

    Raises ValueError if `saved` does not hold exactly as many values as the mask has bits.
    """
    resolved = _resolve(backend, values, words, saved)
    if saved.dim() != 1 or saved.dtype != values.dtype or not saved.is_contiguous():
        what = f"{saved.dtype} {tuple(saved.shape)}"
        raise ValueError(f"saved is {what}; pass what gather_masked gave, {values.dtype} and 1-D")
    implementation(resolved, scatter_masked_reference_)(values, words, saved, starts=starts)


def saved_mismatch(numel: int, expected: int) -> ValueError:
    """The error of a `saved` of the wrong length, in the words that every backend uses."""
    return ValueError(
        f"saved holds {numel} values, the mask {expected} bits; pass what gather_masked gave for this mask"
    )


def _resolve(backend: Backend, values: Tensor, words: Tensor, *others: Tensor) -> Resolved:
    check_values("values", values)
    if values.dim() != 1:
        raise ValueError(f"values has shape {tuple(values.shape)}; pass a 1-D view, tensor.view(-1)")
    check_words("words", words, values.numel())
    return resolve(backend, values, words, *others)
