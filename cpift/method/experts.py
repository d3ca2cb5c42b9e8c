"""Mixtures of experts: which expert of which layer a tensor is of, by its name, or by a stack's first dimension."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cpift.method.changes import Change, together

if TYPE_CHECKING:
    import torch

Expert = tuple[str, int]  # what stands before `experts` in names, for example model.layers.3.mlp, and the number

_ONE = re.compile(r"(?P<block>.*?)\.?\bexperts\.(?P<number>\d+)\.")
_STACK = re.compile(r"(?P<block>.*?)\.?\b(experts\.[^\d.]|(block_sparse_moe|moe)\.\w+_linear\.)")


def stacked(name: str, shape: Sequence[int]) -> int:
    """How many experts a tensor holds along its first dimension; 0 for one that is no stack."""
    told = _STACK.match(name) is not None and _ONE.match(name) is None
    bias = len(shape) == 2 and name.endswith("bias")
    return shape[0] if told and (len(shape) == 3 or bias) else 0


def by_expert(tensors: Mapping[str, Change], stacks: Mapping[str, Sequence[Change]]) -> dict[Expert, Change]:
    """What changed of every expert, in the order of names and numbers.

    tensors: of all names; stacks: of those that hold several experts, what changed of each.
    """
    parts: dict[Expert, list[Change]] = {}
    for expert, change in (*_alone(tensors), *_in_stacks(stacks)):
        parts.setdefault(expert, []).append(change)
    return {expert: together(of) for expert, of in parts.items()}


def _alone(tensors: Mapping[str, Change]) -> Iterator[tuple[Expert, Change]]:
    for name, change in tensors.items():
        if match := _ONE.match(name):
            yield (match["block"], int(match["number"])), change


def _in_stacks(stacks: Mapping[str, Sequence[Change]]) -> Iterator[tuple[Expert, Change]]:
    for name, changes in stacks.items():
        yield from (((_block_of(name), number), change) for number, change in enumerate(changes))


def _block_of(name: str) -> str:
    match = _STACK.match(name)
    assert match is not None  # `stacked` says that it is one
    return f"{match['block']}.{match[3]}" if match[3] else match["block"]


@dataclass(frozen=True)
class ExpertCore:
    """Of an expert: elements of it in the parameter space, and how many of them are a task's core."""

    elements: int
    core: int

    def __add__(self, other: ExpertCore) -> ExpertCore:
        return ExpertCore(self.elements + other.elements, self.core + other.core)


def core_by_expert(
    cores: Mapping[str, int], shapes: Mapping[str, Sequence[int]], words: Callable[[str], torch.Tensor]
) -> dict[Expert, ExpertCore]:
    """A task's core expert by expert, in the order of names and numbers; empty where the model has no experts.

    cores: core elements by tensor of the parameter space. words: the packed mask of a tensor, asked for stacks alone.
    """
    found: dict[Expert, ExpertCore] = {}
    for name, count in cores.items():
        for expert, part in _parts_of(name, count, shapes[name], words):
            found[expert] = found[expert] + part if expert in found else part
    return found


def _parts_of(
    name: str, count: int, shape: Sequence[int], words: Callable[[str], torch.Tensor]
) -> Iterator[tuple[Expert, ExpertCore]]:
    numel = int(np.prod(shape, dtype=np.int64))
    if match := _ONE.match(name):
        yield (match["block"], int(match["number"])), ExpertCore(numel, count)
    elif experts := stacked(name, shape):
        packed, size = words(name).numpy().view(np.uint32), numel // experts
        for number in range(experts):
            core = _set_bits(packed, number * size, (number + 1) * size)
            yield (_block_of(name), number), ExpertCore(size, core)


def _set_bits(words: np.ndarray, start: int, stop: int) -> int:
    """How many of the bits start..stop-1 are set; bit j%32 of word j//32."""
    first, last = start // 32, (stop + 31) // 32
    if first == last:
        return 0
    part = words[first:last].copy()
    part[0] &= np.uint32((0xFFFFFFFF << start % 32) & 0xFFFFFFFF)
    if stop % 32:
        part[-1] &= np.uint32((1 << stop % 32) - 1)
    return int(np.bitwise_count(part).sum())


def shared_mass(one: Mapping[Expert, ExpertCore], other: Mapping[Expert, ExpertCore]) -> float | None:
    """Σ min(a, b) over experts, a and b the shares of two tasks' core elements in all experts that lie in this one: 1
    where both cores spread over the experts alike, 0 where they touch other ones. None where one has none there."""
    totals = [sum(expert.core for expert in cores.values()) for cores in (one, other)]
    if 0 in totals:
        return None
    empty = ExpertCore(0, 0)
    return sum(min(own.core / totals[0], other.get(name, empty).core / totals[1]) for name, own in one.items())
