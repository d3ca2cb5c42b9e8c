"""Merges of the singular vectors of whole matrices, found from products of their shorter side.

X is a matrix of updates, standing so that it has no more columns than rows. What its singular vectors are made into is
again of the form X·M, with M of the columns' size: one pass sums the products XᵀX in fp64, one merges. A matrix that is
wider than high is held, in fp32; a higher one is read in slices.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from cpift.checkpoints.finite import all_finite, require_finite
from cpift.checkpoints.slices import sweep
from cpift.config.run import FusionConfig
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import Fill, Merged, MergeMethod
from cpift.merging.definition import Definition, Expected, in_fp64
from cpift.merging.forms import row_runs

if TYPE_CHECKING:
    import torch

_COLUMNS = 1 << 12  # of a matrix that is held, multiplied at once
_COMPARED = 1024  # most columns of a matrix whose definition is evaluated, by a decomposition in fp64


class SpectralMerge(MergeMethod):
    """Tensors of other than two dimensions get λ times the mean update. A singular value counts as 0 that rounding of
    fp32 may have made, or that products in fp64 do not resolve."""

    reads = 1

    @classmethod
    def described(cls, config: FusionConfig) -> str:
        return f"λ {config.scale:g}"

    @classmethod
    def row_width(cls, config: FusionConfig, info: TensorInfo) -> int:
        return info.shape[1] if _is_matrix(info) else 0

    @classmethod
    def held(cls, config: FusionConfig, info: TensorInfo, tasks: int) -> int:
        if not _is_matrix(info):
            return 0
        (rows, width), parts = info.shape, cls.count(tasks)
        squares = 2 * parts * parts + 3 * parts + 8  # products, what is added to them, vectors, factors and room
        return 8 * squares * min(rows, width) ** 2 + (4 * parts * info.numel if width > rows else 0)

    @classmethod
    @abstractmethod
    def count(cls, tasks: int) -> int:
        """P of so many tasks."""

    @abstractmethod
    def parts(self, updates: torch.Tensor) -> torch.Tensor:
        """[P, …], the matrices that are decomposed; updates [N, …]."""

    @abstractmethod
    def factors(self, products: torch.Tensor, least: float) -> torch.Tensor:
        """fp64 [P, s, s]: M of each part; products [P, P, s, s]: XᵀX of each two; least: smaller values are 0."""

    @abstractmethod
    def defined_matrix(self, updates: np.ndarray, least: float) -> np.ndarray:
        """fp64 [rows, columns]: the merged update by singular value decompositions; updates [N, rows, columns]."""

    def merged(self, info: TensorInfo) -> Merged:
        if not _is_matrix(info) or not info.numel:
            return None, self._mean(info)
        held, products, least = self._read(info)
        factors = self.factors(products, least) * self.config.scale
        return None, self._sliced(info, factors) if held is None else self._of_held(info, factors, held)

    def _mean(self, info: TensorInfo) -> Fill:
        def fill(start: int, stop: int, out: torch.Tensor) -> None:
            for first, last in row_runs(0, start, stop):
                origin, updates = self._updates(info, first, last)
                out[first - start : last - start] = origin + self.config.scale * updates.mean(0)
            if not all_finite(out):
                self._require_finite(info)

        return fill

    def _sliced(self, info: TensorInfo, factors: torch.Tensor) -> Fill:
        def fill(start: int, stop: int, out: torch.Tensor) -> None:
            for first, last in row_runs(info.shape[1], start, stop):
                origin, updates = self._updates(info, first, last)
                rows = self.parts(updates).view(len(factors), -1, info.shape[1])
                out[first - start : last - start] = origin + (rows @ factors).sum(0).view(-1)

        return fill

    def _of_held(self, info: TensorInfo, factors: torch.Tensor, held: torch.Tensor) -> Fill:
        import torch

        width = info.shape[1]

        def fill(start: int, stop: int, out: torch.Tensor) -> None:
            mine = factors[:, :, start // width : stop // width].mT
            update = [(mine @ part.double()).sum(0) for part in held.split(_COLUMNS, 2)]
            origin = self.pretrained.slice(info.name, start, stop).double()
            out.copy_(origin + torch.cat(update, 1).view(-1))

        return fill

    def _updates(self, info: TensorInfo, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """fp64: θ0 [n] and θi − θ0 [N, n]."""
        import torch

        origin = self.pretrained.slice(info.name, start, stop).double()
        tuned = [model.slice(info.name, start, stop).double() - origin for model in self.tuned.values()]
        return origin, torch.stack(tuned)

    def _read(self, info: TensorInfo) -> tuple[torch.Tensor | None, torch.Tensor, float]:
        """A wide matrix's parts [P, rows, columns], the products of all parts, and what counts as 0."""
        import torch

        (rows, width), squares = info.shape, 0.0
        size, short = self.count(len(self.tuned)), min(info.shape)
        products = torch.zeros(size, size, short, short, dtype=torch.float64)
        held = torch.empty(size, rows, width) if width > rows else None
        for piece in sweep(self.models, info, self.pieces(info)):
            for start, stop in row_runs(width, *piece):
                origin, updates = self._updates(info, start, stop)
                squares += float(origin.square().sum())
                part = self.parts(updates).view(size, -1, width)
                if held is None:
                    products += _products(part)
                else:
                    held[:, start // width : stop // width] = part
        for block in () if held is None else held.split(_COLUMNS, 2):
            products += _products(block.double().mT)
        if not products.isfinite().all():
            self._require_finite(info)
        return held, products, _rounding(squares, info)

    def _require_finite(self, info: TensorInfo) -> None:
        for label, model in {"θ0": self.pretrained, **self.tuned}.items():
            require_finite(label, model, [info.name])

    # ---- verification ------------------------------------------------------------------------------------------------

    def compares(self, info: TensorInfo) -> bool:
        return super().compares(info) and (not _is_matrix(info) or min(info.shape) <= _COMPARED)

    def definition(self, info: TensorInfo) -> Definition:
        origin, *tuned = (in_fp64(model, info.name, 0, info.numel) for model in self.models)
        updates = np.stack(tuned) - origin
        if _is_matrix(info) and info.numel:
            least = _rounding(float(origin @ origin), info)
            wanted = self.config.scale * self.defined_matrix(updates.reshape(-1, *info.shape), least).reshape(-1)
        else:
            wanted = self.config.scale * updates.mean(0)
        sizes = np.abs(origin) + np.abs(updates).sum(0) + np.abs(wanted)

        def values(start: int, stop: int) -> Expected:
            there = slice(start, stop)
            return Expected((origin + wanted)[there], np.arange(stop - start), sizes[there])

        return values


def _is_matrix(info: TensorInfo) -> bool:
    return len(info.shape) == 2


def _products(parts: torch.Tensor) -> torch.Tensor:
    """fp64 [P, P, s, s]: XᵀX of each two of some rows [P, b, s]."""
    import torch

    return torch.einsum("abi,cbj->acij", parts, parts)


def _rounding(squares: float, info: TensorInfo) -> float:
    """The largest singular value that rounding fine-tunes to fp32 may make: of noise of one unit in the last place."""
    rows, width = info.shape
    return 2.0**-23 * math.sqrt(squares / info.numel) * (math.sqrt(rows) + math.sqrt(width))


def resolved(values: torch.Tensor, least: float) -> torch.Tensor:
    """Which of the singular values [s] are not 0."""
    found: torch.Tensor = values > max(least, float(values.max()) * math.sqrt(len(values) * 2.2e-13))
    return found


def singular(products: torch.Tensor, least: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values [k], largest first, that are not 0, and right singular vectors [s, k], of XᵀX [s, s]."""
    import torch

    squares, vectors = torch.linalg.eigh(products)
    values = squares.clamp(min=0).sqrt().flip(0)
    there = resolved(values, least)
    return values[there], vectors.flip(1)[:, there]


def inverse_root(products: torch.Tensor) -> torch.Tensor:
    """The inverse of the root of a positive matrix [k, k], 0 where it is 0."""
    import torch

    squares, vectors = torch.linalg.eigh(products)
    there = squares > 1e-10 * squares.max() if len(squares) else squares > 0
    found: torch.Tensor = (vectors[:, there] / squares[there].sqrt()) @ vectors[:, there].mT
    return found


def defined_singular(matrix: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U [rows, k], values [k] and V [columns, k] of the singular values that are not 0, by their decomposition."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    there = values > max(least, values.max(initial=0.0) * math.sqrt(len(values) * 2.2e-13))
    return left[:, there], values[there], right[there].T


def nearest_orthogonal(vectors: np.ndarray) -> np.ndarray:
    """The orthonormal columns nearest to some [n, k], none where these are dependent."""
    left, values, right = np.linalg.svd(vectors, full_matrices=False)
    there = values > 1e-5 * values.max(initial=0.0)
    found: np.ndarray = left[:, there] @ right[there]
    return found
