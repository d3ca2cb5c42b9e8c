"""Layers of models one after another, as checkpoints: each model's under the numbers that they get; all together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.settings import BEFORE_LAYERS, layer_of
from cpift.errors import CheckpointError, Problem
from cpift.formats.safetensors import TensorInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """Layers first..first+count-1 of a model as layers at..at+count-1 of another, of `total`."""

    first: int
    count: int
    at: int
    total: int


def layers_in(model: Checkpoint) -> int:
    """How many layers a model has. Raises CheckpointError where its tensors are no single stack of them."""
    found = [layer for name in model.tensors if (layer := layer_of(name)) is not None]
    stacks = sorted({stack for stack, _ in found})
    if len(stacks) != 1:
        what = f"has layers in {len(stacks)} places ({', '.join(stacks[:3])})" if stacks else "has no layers"
        remedy = "layers of a model of one stack alone can be put one after another"
        raise CheckpointError(f"model {model.folder}", [Problem("its tensors", what, remedy)])
    return 1 + max(number for _, number in found)


class Layers(Checkpoint):
    """Some layers of a model, under other numbers. What comes before its layers is in it where they are the first, what
    comes after where they are the last."""

    def __init__(self, inner: Checkpoint, place: Place):
        self.folder, self.config = inner.folder, inner.config
        self.ties, self.is_apart = inner.ties, inner.is_apart
        self._inner, self._place, self._maps = inner, place, {}
        names = {self._renamed(name): name for name in inner.tensors}
        self._names = {new: name for new, name in sorted(names.items()) if new}
        self.tensors = {new: replace(inner.tensors[name], name=new) for new, name in self._names.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._inner, self._place)

    def _renamed(self, name: str) -> str:
        """The name that a tensor gets; nothing where it is left out."""
        layer, place = layer_of(name), self._place
        if layer is None:
            there = place.at == 0 if BEFORE_LAYERS.search(name) else place.at + place.count == place.total
            return name if there else ""
        stack, number = layer
        if not place.first <= number < place.first + place.count:
            return ""
        return f"{stack}{number - place.first + place.at}{name[len(stack) + len(str(number)) :]}"

    @property
    def files(self) -> Any:
        return self._inner.files

    def apart(self) -> Checkpoint:
        return Layers(self._inner.apart(), self._place)

    def require_unchanged(self) -> None:
        self._inner.require_unchanged()

    def unequal_copies(self) -> Iterator[Problem]:
        return self._inner.unequal_copies()

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._inner.slice(self._names[name], start, stop)

    def gather(self, name: str, starts: np.ndarray, length: int) -> torch.Tensor:
        return self._inner.gather(self._names[name], starts, length)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        self._inner.prefetch(self._names[name], start, stop)

    def release(self, name: str, start: int, stop: int) -> None:
        self._inner.release(self._names[name], start, stop)


class Stack(Checkpoint):
    """The model that slices make, as far as its headers go: names, shapes, dtypes, config.json. It has no values.

    A tensor has the dtype that `base` has in its first layer that has such a tensor, else that of its slice.
    """

    def __init__(self, base: Checkpoint, slices: Sequence[Checkpoint], config: Mapping[str, Any]):
        self.folder, self.config = base.folder, dict(config)
        self.rewritten = {**base.rewritten, "config.json": self.config}
        self.ties, self.is_apart, self._maps = base.ties, base.is_apart, {}
        self._base, self._slices = base, slices
        kinds: dict[str, str] = {}
        for info in base.tensors.values():
            kinds.setdefault(_any_layer(info.name), info.kind)
        infos = (info for one in slices for info in one.tensors.values())
        self.tensors = {
            info.name: TensorInfo(info.name, info.shape, kinds.get(_any_layer(info.name), info.kind), base.folder)
            for info in sorted(infos, key=lambda info: info.name)
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._base, self._slices, self.config)

    @cached_property
    def files(self) -> Any:
        return tuple(dict.fromkeys(file for one in self._slices for file in one.files))


def _any_layer(name: str) -> str:
    layer = layer_of(name)
    return name if layer is None else name[: len(layer[0])] + name[len(layer[0]) + len(str(layer[1])) :]
