"""Held elements: `freeze` for a list of tensors whose masked elements are put back again and again.

What depends on the masks alone is prepared once. Zeroing is one tensor at a time, for gradients become ready one after
another (and under DDP must be zero before the next one is there); putting back is the whole list in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .checks import check_values, check_words
from .dispatch import Backend, Resolved, implementation, resolve
from .freeze import (
    gather_masked_reference,
    mask_starts_reference,
    scatter_masked_reference_,
    zero_masked_reference_,
)

if TYPE_CHECKING:
    from torch import Tensor


class HeldElements:
    """The masked elements of tensors, as they were when it was made. Made by `hold_masked`."""

    def __init__(self, values: Sequence[Tensor], words: Sequence[Tensor], backend: Resolved):
        self._gather = implementation(backend, gather_masked_reference)
        self._find_starts = implementation(backend, mask_starts_reference)
        self._zero = implementation(backend, zero_masked_reference_)
        self._scatter = implementation(backend, scatter_masked_reference_)
        self._words = list(words)
        self._sizes = [x.numel() for x in values]
        self._saved: list[Tensor] = []
        self._starts: list[Tensor] = []
        self._save(values)

    def _save(self, values: Sequence[Tensor]) -> None:
        """Set what is saved of each tensor, and where in it blocks of its mask begin."""
        for x, mask in zip(values, self._words, strict=True):
            self._saved.append(self._gather(x, mask))
            self._starts.append(self._find_starts(mask, x.numel()))

    @property
    def count(self) -> int:
        """How many elements are held."""
        return sum(saved.numel() for saved in self._saved)

    @property
    def nbytes(self) -> int:
        """Memory: the masks, the saved elements, and where in them blocks of a mask begin."""
        return sum(tensor.nbytes for held in (self._words, self._saved, self._starts) for tensor in held)

    def replace(self, place: int, values: Tensor) -> None:
        """Hold the masked elements of `values` from now on as those of tensor `place`.

        Raises ValueError for another number of elements, or another dtype.
        """
        self._check_same(f"values for tensor {place}", values, place)
        self._saved[place].copy_(self._gather(values, self._words[place]))

    def zero_(self, place: int, gradient: Tensor) -> None:
        """Set the held elements of tensor `place` to +0 in its `gradient` (same elements, 1-D, any floating dtype)."""
        self._check_one("gradient", gradient, self._sizes[place])
        self._zero(gradient, self._words[place])

    def restore_(self, values: Sequence[Tensor]) -> None:
        """Put the held elements back into `values`, the list that this was made from, bit for bit.

        Raises ValueError for another number of tensors, another number of elements, or another dtype.
        """
        self._check(values)
        for x, mask, saved, starts in zip(values, self._words, self._saved, self._starts, strict=True):
            self._scatter(x, mask, saved, starts=starts)

    def pull_(self, values: Sequence[Tensor], shares: Sequence[float]) -> None:
        """Move the held elements in `values` a share (0..1, one a tensor) of the way to what is held.

        Raises ValueError as `restore_` does.
        """
        self._check(values)
        parts = zip(values, shares, self._words, self._saved, self._starts, strict=True)
        for x, share, mask, saved, starts in parts:
            self._scatter(x, mask, self._gather(x, mask).lerp_(saved, share), starts=starts)

    def chosen(self, place: int, values: Tensor) -> Tensor:
        """1-D: of `values` (as many elements as tensor `place`, any floating dtype) those where elements are held."""
        self._check_one("values", values, self._sizes[place])
        return self._gather(values, self._words[place])

    def pull_each_(self, values: Sequence[Tensor], shares: Sequence[Tensor]) -> None:
        """`pull_` with a share for each held element: of each tensor as many as `chosen` has, in its dtype.

        Raises ValueError as `restore_` does, and for shares of another number or dtype.
        """
        self._check(values)
        self._check_shares(shares)
        parts = zip(values, shares, self._words, self._saved, self._starts, strict=True)
        for x, share, mask, saved, starts in parts:
            self._scatter(x, mask, self._gather(x, mask).lerp_(saved, share), starts=starts)

    def _check_shares(self, shares: Sequence[Tensor]) -> None:
        wanted = [(saved.shape, saved.dtype) for saved in self._saved]
        if [(share.shape, share.dtype) for share in shares] != wanted:
            raise ValueError("shares are not one for each held element, in the dtype of what is held; see `chosen`")

    def _check(self, values: Sequence[Tensor]) -> None:
        if len(values) != len(self._words):
            raise ValueError(f"values holds {len(values)} tensors, {len(self._words)} are held; pass the same list")
        for place, x in enumerate(values):
            self._check_same(f"values[{place}]", x, place)

    def _check_same(self, name: str, x: Tensor, place: int) -> None:
        self._check_one(name, x, self._sizes[place])
        if x.dtype != self._saved[place].dtype:
            raise ValueError(f"{name} has dtype {x.dtype}, what is held {self._saved[place].dtype}; pass the same list")

    @staticmethod
    def _check_one(name: str, tensor: Tensor, numel: int) -> None:
        check_values(name, tensor)
        if tensor.dim() != 1 or tensor.numel() != numel:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; pass the {numel} elements as they were held, 1-D"
            )


def hold_masked_reference(values: Sequence[Tensor], words: Sequence[Tensor]) -> HeldElements:
    """`hold_masked` in plain torch."""
    return HeldElements(values, words, "reference")


def hold_masked(values: Sequence[Tensor], words: Sequence[Tensor], *, backend: Backend = "auto") -> HeldElements:
    """Save the masked elements of `values` (each 1-D and contiguous, all on one device), to be put back often.

    words: a packed mask for each; they are kept, not copied.
    Raises ValueError for lists of different lengths, other tensors and other masks.
    """
    if len(values) != len(words):
        raise ValueError(f"words holds {len(words)} masks for {len(values)} tensors; pass one for each")
    for place, (x, mask) in enumerate(zip(values, words, strict=True)):
        check_values(f"values[{place}]", x)
        if x.dim() != 1:
            raise ValueError(f"values[{place}] has shape {tuple(x.shape)}; pass a 1-D view, tensor.view(-1)")
        check_words(f"words[{place}]", mask, x.numel())
    return implementation(resolve(backend, *values, *words), hold_masked_reference)(values, words)
