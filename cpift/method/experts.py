"""Mixtures of experts: which expert of which layer a tensor is of, by its name, or by a stack's first dimension."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from cpift.method.changes import Change, together

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
        match = _STACK.match(name)
        assert match is not None  # `stacked` says that it is one
        block = f"{match['block']}.{match[3]}" if match[3] else match["block"]
        yield from (((block, number), change) for number, change in enumerate(changes))
