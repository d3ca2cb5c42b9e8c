"""Which elements of a model a fine-tune holds, or pulls back, where these are not cores: the controls of freezing.

    cores   the cores that are named (paper)
    random  as many elements of every tensor as those cores have, elsewhere (see `placement`)
    others  all but those: what is trained is a core alone
    half    each element with chance ½, drawn anew for each stage (half fine-tuning, arXiv 2404.18466, which draws
            whole matrices; here elements, as cores are)
    all     every element: nothing moves, or with a penalty all is pulled back (L2-SP, Li et al., 2018)

Masks are packed, by the checkpoint's names, and made when they are asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from cpift.method.placement import place_words

if TYPE_CHECKING:
    import torch

Masks = Mapping[str, "torch.Tensor"]  # by tensor, int32 words


class Drawn(Mapping[str, "torch.Tensor"]):
    """The masks of tensors of these sizes, each made of its name and size; bits behind the last element are not set."""

    def __init__(self, sizes: Mapping[str, int], make: Callable[[str, int], np.ndarray]):
        self._sizes, self._make = sizes, make

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        size = self._sizes[name]
        words = self._make(name, (size + 31) // 32).astype(np.uint32)
        if size % 32:
            words[-1] &= np.uint32((1 << size % 32) - 1)
        return torch.from_numpy(words.view(np.int32))

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)


def _cores(cores: Masks, sizes: Mapping[str, int], seed: str) -> Masks:
    return cores


def _random(cores: Masks, sizes: Mapping[str, int], seed: str) -> Masks:
    def make(name: str, words: int) -> np.ndarray:
        placed = cores[name].numpy().copy()
        place_words(placed, sizes[name], f"{seed}\0{name}")
        return placed.view(np.uint32)

    return Drawn({name: size for name, size in sizes.items() if name in cores}, make)


def _others(cores: Masks, sizes: Mapping[str, int], seed: str) -> Masks:
    def make(name: str, words: int) -> np.ndarray:
        if name not in cores:  # outside the parameter space
            return _every(words)
        flipped: np.ndarray = ~cores[name].numpy().view(np.uint32)
        return flipped

    return Drawn(sizes, make)


def _half(cores: Masks, sizes: Mapping[str, int], seed: str) -> Masks:
    def make(name: str, words: int) -> np.ndarray:
        key = hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:16]
        drawn = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).bytes(4 * words)
        return np.frombuffer(drawn, "<u4")

    return Drawn(sizes, make)


def _all(cores: Masks, sizes: Mapping[str, int], seed: str) -> Masks:
    return Drawn(sizes, lambda name, words: _every(words))


def _every(words: int) -> np.ndarray:
    return np.full(words, 0xFFFFFFFF, np.uint32)


# By name: the masks, of the union of the cores, of the elements of each tensor that is trained, and of what decides
# what is drawn.
HELD: dict[str, Callable[[Masks, Mapping[str, int], str], Masks]] = {
    "cores": _cores,
    "random": _random,
    "others": _others,
    "half": _half,
    "all": _all,
}
