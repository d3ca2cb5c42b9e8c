"""Many tensors in one buffer: what walks them all is launched once, whatever their number.

The tensors of a model lie one after another, each from a multiple of PAD elements on, with zeros up to the next one's.
Padding is 0 in every model and every mask: it did not move, is in no core, and adds nothing to a sum. A tensor's
elements, and its mask's words, are a view of the buffer, so what is computed of one tensor has the same bits here:

    flat_overlaps   `overlap_counts_per_tensor` of each tensor
    flat_gram       `masked_gram` of each run of elements of each tensor
    flat_apply      `fused_apply` with coefficients of each tensor

`resolve_conflicts` takes buffers as they are, for it knows nothing of tensors. `stream_cores` takes them as `Flat`.
Results of the first two stay on the device, so that one copy can bring those of several to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .apply import fused_apply_reference
from .checks import MAX_SOURCES, MAX_TASKS, check_values, check_words, words_for
from .dispatch import Backend, implementation, resolve
from .gram import BLOCK, masked_gram_reference
from .overlap import overlap_counts_per_tensor_reference
from .streaming import SEGMENT, Ints

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PAD = 1 << 15  # elements: whole programs of every kernel, so that each has one tensor


class FlatLayout:
    """Where tensors of so many elements lie in a buffer of `total` elements. starts [T]: of their first ones."""

    def __init__(self, sizes: Sequence[int]):
        self.sizes = tuple(sizes)
        padded = (np.array(self.sizes, np.int64) + PAD - 1) // PAD * PAD
        self.ends: Ints = np.cumsum(padded)
        self.starts: Ints = self.ends - padded
        self.total = int(padded.sum())
        self._there: dict[tuple[str, torch.device], Tensor] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlatLayout) and self.sizes == other.sizes

    def __hash__(self) -> int:
        return hash(self.sizes)

    def tensor(self, flat: Tensor, number: int) -> Tensor:
        """A view of the elements of one tensor."""
        start = int(self.starts[number])
        return flat[start : start + self.sizes[number]]

    def words(self, flat: Tensor, number: int) -> Tensor:
        """A view of the mask words of one tensor; flat: int32 [total / 32]."""
        start = int(self.starts[number]) // 32
        return flat[start : start + words_for(self.sizes[number])]

    def number_at(self, place: int) -> int:
        """The tensor that an element of the buffer belongs to."""
        return int(np.searchsorted(self.ends, place, side="right"))

    def runs(self, elements: int) -> tuple[Ints, Ints, Ints]:
        """(tensor, first element in the buffer, elements), each [R]: the tensors cut into runs of so many."""
        counts = -(-np.array(self.sizes, np.int64) // elements)
        tensor = np.repeat(np.arange(len(self.sizes)), counts)
        start = (np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)) * elements
        numel = np.minimum(np.array(self.sizes, np.int64)[tensor] - start, elements)
        return tensor, self.starts[tensor] + start, numel

    # ---- tables on a device, made once -------------------------------------------------------------------------------

    def numbers(self, device: torch.device) -> Tensor:
        """int32 [total / PAD]: the tensor that each PAD elements belong to."""
        return self._on(device, "numbers", lambda: np.repeat(np.arange(len(self.sizes)), self._units))

    def places(self, device: torch.device) -> Tensor:
        """int32 [total / PAD]: where each PAD elements begin within their segment (`streaming.SEGMENT`)."""

        def made() -> Ints:
            units = np.arange(int(self._units.sum())) - np.repeat(self.starts // PAD, self._units)
            return units * PAD % SEGMENT

        return self._on(device, "places", made)

    def padding(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """int32 [W] each: words of a buffer's mask that have bits of no tensor, by their places, and these bits."""

        def made() -> np.ndarray:
            ends_of_tensors = self.starts + np.array(self.sizes, np.int64)
            first = ends_of_tensors // 32
            words = np.concatenate([np.zeros(0, np.int64), *map(np.arange, first, self.ends // 32)])
            bits = np.full(len(words), -1, np.int64)
            begin = np.searchsorted(words, first)[self.ends > ends_of_tensors]
            bits[begin] = -1 << (ends_of_tensors % 32)[self.ends > ends_of_tensors]
            return np.stack([words, bits])

        return tuple(self._on(device, "padding", made))

    def blocks(self, device: torch.device, elements: int) -> Tensor:
        """int32 [2, R]: the first block of 4096 elements of each of `runs`, and how many it has."""

        def made() -> Ints:
            _, first, numel = self.runs(elements)
            return np.stack([first // BLOCK, -(-numel // BLOCK)])

        return self._on(device, f"blocks of {elements}", made)

    def most_blocks(self, elements: int) -> int:
        """Blocks of the longest of `runs`."""
        return -(-min(max(self.sizes, default=0), elements) // BLOCK)

    @cached_property
    def _units(self) -> Ints:
        return (self.ends - self.starts) // PAD

    def _on(self, device: torch.device, name: str, make: Callable[[], np.ndarray]) -> Tensor:
        import torch

        if (name, device) not in self._there:
            self._there[name, device] = torch.from_numpy(make().astype(np.int32, copy=False)).to(device)
        return self._there[name, device]


@dataclass(frozen=True)
class Flat:
    """Some tensors of all models of a selection. numbers: of each of the layout's tensors its number there, ascending;
    models: θ0 first, [total] each on one device."""

    layout: FlatLayout
    numbers: Sequence[int]
    models: Sequence[Tensor]


def flat_overlaps_reference(masks: Sequence[Tensor], layout: FlatLayout) -> Tensor:
    """`flat_overlaps` in plain torch."""
    tensors = range(len(layout.sizes))
    return overlap_counts_per_tensor_reference([[layout.words(mask, t) for t in tensors] for mask in masks]).to(
        masks[0].device
    )


def flat_overlaps(masks: Sequence[Tensor], layout: FlatLayout, *, backend: Backend = "auto") -> Tensor:
    """|Ci ∩ Cj| in each tensor: int64 [T, N, N] on the masks' device, the diagonal being |Ci|.

    masks: 1 to 16, int32 [total / 32], without a bit in the padding.
    """
    if not 1 <= len(masks) <= MAX_TASKS:
        raise ValueError(f"masks holds {len(masks)} tasks; between 1 and {MAX_TASKS} are supported")
    for i, words in enumerate(masks):
        check_words(f"masks[{i}]", words, layout.total)
    return implementation(resolve(backend, *masks), flat_overlaps_reference)(masks, layout)


def flat_gram_reference(
    reference: Tensor, vectors: Sequence[Tensor], excluded: Tensor | None, layout: FlatLayout, elements: int
) -> Tensor:
    """`flat_gram` in plain torch."""
    import torch

    size = len(vectors) + 1
    grams = [torch.zeros(0, size, size, dtype=torch.float64)]
    for start, numel in zip(*(one.tolist() for one in layout.runs(elements)[1:]), strict=True):
        here, *others = (values[start : start + numel] for values in (reference, *vectors))
        words = None if excluded is None else excluded[start // 32 : start // 32 + words_for(numel)]
        grams.append(masked_gram_reference(here, others, words))
    return torch.cat(grams).to(reference.device)


def flat_gram(
    reference: Tensor,
    vectors: Sequence[Tensor],
    excluded: Tensor | None,
    layout: FlatLayout,
    *,
    elements: int,
    backend: Backend = "auto",
) -> Tensor:
    """The Gram matrices of (r, x1 − r, ..., xN − r) over the positions outside `excluded`, of each run of so many
    elements of each tensor (`FlatLayout.runs`): fp64 [R, N+1, N+1] on the models' device, each with the bits of
    `masked_gram` of its run.

    reference: r, [total]; vectors: x1..xN, N in 1..16; excluded: a mask, int32 [total / 32]; elements: a multiple of
    4096.
    """
    if elements <= 0 or elements % BLOCK:
        raise ValueError(f"elements={elements} is no multiple of {BLOCK}, in which sums are made; give one")
    if not 1 <= len(vectors) <= MAX_TASKS:
        raise ValueError(f"vectors holds {len(vectors)} buffers; between 1 and {MAX_TASKS} are supported")
    masks = [] if excluded is None else [excluded]
    _check(layout, {"reference": reference, **{f"vectors[{i}]": x for i, x in enumerate(vectors)}}, masks)
    run = implementation(resolve(backend, reference, *vectors, *masks), flat_gram_reference)
    return run(reference, vectors, excluded, layout, elements)


def flat_apply_reference(
    out: Tensor, sources: Sequence[Tensor], coefficients: Tensor, masks: Sequence[Tensor | None], layout: FlatLayout
) -> None:
    """`flat_apply` in plain torch."""
    for t, scale in enumerate(coefficients.double().cpu()):
        words = [None if mask is None else layout.words(mask, t) for mask in masks]
        here = [layout.tensor(source, t) for source in sources]
        fused_apply_reference(layout.tensor(out, t), here, scale[None], words)


def flat_apply(
    out: Tensor,
    sources: Sequence[Tensor],
    coefficients: Tensor,
    masks: Sequence[Tensor | None],
    layout: FlatLayout,
    *,
    backend: Backend = "auto",
) -> None:
    """Write the fused tensors to `out`, [total]; its padding may be anything. coefficients: fp32 [T, M] of each tensor,
    on the device of `out`; sources: 1 to 18 of [total]; masks: per source its packed core mask, or None."""
    if not 1 <= len(sources) <= MAX_SOURCES or len(masks) != len(sources):
        raise ValueError(f"{len(sources)} sources and {len(masks)} masks; pass 1 to {MAX_SOURCES} of each")
    words = [mask for mask in masks if mask is not None]
    _check(layout, {"out": out, **{f"sources[{m}]": x for m, x in enumerate(sources)}}, words)
    shape = len(layout.sizes), len(sources)
    if str(coefficients.dtype) != "torch.float32" or tuple(coefficients.shape) != shape:
        raise ValueError(
            f"coefficients is {coefficients.dtype} {tuple(coefficients.shape)}; pass float32 {list(shape)}"
        )
    run = implementation(resolve(backend, out, coefficients, *sources, *words), flat_apply_reference)
    run(out, sources, coefficients, masks, layout)


def _check(layout: FlatLayout, buffers: dict[str, Tensor], masks: Sequence[Tensor]) -> None:
    for name, values in buffers.items():
        check_values(name, values)
        if tuple(values.shape) != (layout.total,):
            raise ValueError(f"{name} has shape {list(values.shape)}; the layout's buffers have [{layout.total}]")
    for words in masks:
        check_words("a mask", words, layout.total)
