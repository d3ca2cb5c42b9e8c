"""Where the elements of a core are (`regions.placement`): where they were chosen, or at random.

Random cores are the control that says whether it matters which elements are a core. Size and profile stay: every block
of 4 Mi elements of a tensor keeps its count. Which elements they are follows from the task, the tensor, the block and
the true mask, so that fine-tunes with other seeds have other ones; by arithmetic of 64-bit integers alone, alike on
every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from cpift_kernels import Masks

BLOCK = 1 << 22  # elements


def leave(masks: Masks, tasks: Sequence[str], ks: int, names: Sequence[str], sizes: Sequence[int]) -> None:
    """The elements that were chosen."""


def place_at_random(masks: Masks, tasks: Sequence[str], ks: int, names: Sequence[str], sizes: Sequence[int]) -> None:
    """Replace every mask by random elements of the same count, in place.

    masks: by task, p and tensor, in the order of `tasks`, of 0..ks-1 and of `names`; sizes: elements of the tensors.
    """
    for number, task in enumerate(tasks):
        for k in range(ks):
            for tensor, (name, size) in enumerate(zip(names, sizes, strict=True)):
                place_words(masks.words(number, k, tensor), size, f"{task}\0{name}")


def place_words(words: np.ndarray, size: int, label: str) -> None:
    """Replace the int32 words of one tensor's mask by random ones, in place; every block keeps its count."""
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        block = words[start // 32 : (stop + 31) // 32]
        block[:] = _random_words(block, stop - start, f"{label}\0{start}")


PLACEMENTS = {"chosen": leave, "random": place_at_random}


def _random_words(words: np.ndarray, size: int, label: str) -> np.ndarray:
    """int32 words with as many of the first `size` bits set as `words` has."""
    count = int(np.bitwise_count(words.view(np.uint32)).sum())
    if count == 0:
        return words
    key = hashlib.sha256(label.encode() + b"\0" + words.tobytes()).digest()
    order = _mixed(np.arange(size, dtype=np.uint64) + np.uint64(int.from_bytes(key[:8], "little") >> 1))
    bits = np.zeros(-(-size // 32) * 32, bool)
    bits[:size] = order <= np.partition(order, count - 1)[count - 1]  # no two are equal: the mixing is a bijection
    packed: np.ndarray = np.packbits(bits, bitorder="little").view("<i4")
    return packed.astype(np.int32, copy=False)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on uint64, a bijection."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
