"""Fine-tunes with another vocabulary than θ0's, made to fit (`fusion.vocabulary: base`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.layout import layout_of
from cpift.errors import Problem
from cpift.formats.safetensors import TensorInfo
from cpift.pretrained.architecture import embedding_names, skeleton
from cpift.pretrained.tying import file_name

if TYPE_CHECKING:
    import torch


def token_tensors(base: Checkpoint) -> set[str]:
    """Tensors of `base` with a row for every token: of its input embedding and of its output layer."""
    if not base.config:
        return set()
    names = {name: file_name(name, set(base.tensors)) for name in (*embedding_names(base.folder), *base.ties)}
    if any(found is None and name not in base.ties for name, found in names.items()):  # a file has another name for it
        shapes = {info.name: info.shape for info in base.tensors.values() if info.floating}
        layout = layout_of(skeleton(base.folder), shapes)
        names |= {name: layout.tensor_of(name) for name, found in names.items() if found is None}
    return {found for found in names.values() if found is not None}


def resized(base: Checkpoint, other: Checkpoint) -> tuple[str, ...]:
    """Embeddings and output layers that `other` has with another number of rows than `base`."""
    return tuple(
        name
        for name, info in base.tensors.items()
        if name in other.tensors and other.tensors[name].shape != info.shape
        if other.tensors[name].shape[1:] == info.shape[1:] and name in token_tensors(base)
    )


class FittedCheckpoint(Checkpoint):
    """A fine-tune with the vocabulary of `base`: rows that both have are its own, rows beyond them θ0's; what it has
    beyond θ0's rows is left out."""

    def __init__(self, inner: Checkpoint, base: Checkpoint):
        self.folder, self.config = inner.folder, inner.config
        self._inner, self._base, self._maps = inner, base, {}
        self.ties, self.is_apart = inner.ties, inner.is_apart
        self._common = {name: min(inner.tensors[name].numel, base.tensors[name].numel) for name in resized(base, inner)}
        self.tensors = {name: self._info(info) for name, info in inner.tensors.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._inner, self._base)

    def apart(self) -> Checkpoint:
        return FittedCheckpoint(self._inner.apart(), self._base.apart())

    def require_unchanged(self) -> None:
        self._inner.require_unchanged()
        self._base.require_unchanged()

    def unequal_copies(self) -> Iterator[Problem]:
        return self._inner.unequal_copies()

    def _info(self, info: TensorInfo) -> TensorInfo:
        shape = self._base.tensors[info.name].shape if info.name in self._common else info.shape
        return TensorInfo(info.name, shape, info.kind, info.file, info.start)

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """A view, or a copy where it has rows of both models."""
        import torch

        common = self._common.get(name, stop)
        if stop <= common:
            return self._inner.slice(name, start, stop)
        rest = self._base.slice(name, max(start, common), stop).to(self.tensors[name].dtype)
        return rest if start >= common else torch.cat([self._inner.slice(name, start, common), rest])

    def gather(self, name: str, starts: np.ndarray, length: int) -> torch.Tensor:
        import torch

        own = self._inner.gather(name, starts, length)
        if name not in self._common:
            return own
        places = torch.from_numpy(starts[:, None] + np.arange(length))
        return torch.where(places < self._common[name], own, self._base.gather(name, starts, length))

    def prefetch(self, name: str, start: int, stop: int) -> None:
        self._inner.prefetch(name, start, min(stop, self._common.get(name, stop)))

    def release(self, name: str, start: int, stop: int) -> None:
        self._inner.release(name, start, min(stop, self._common.get(name, stop)))
