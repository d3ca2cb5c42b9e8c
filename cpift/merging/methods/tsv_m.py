"""TSV-M: of every task's update the largest singular vectors, made orthogonal to those of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cpift.merging.methods.spectral import (
    SpectralMerge,
    defined_singular,
    inverse_root,
    nearest_orthogonal,
    singular,
)

if TYPE_CHECKING:
    import torch


class TsvM(SpectralMerge):
    """Of N tasks each keeps the largest ⌊s/N⌋ of a matrix's s singular values, one at least. Directions that several
    tasks have exactly are one. That takes N + 2 eigenvalue decompositions of the shorter side a matrix."""

    formula = (
        "θ0 + λ·U'·Σ·V'ᵀ, U, Σ and V the largest 1/N of the singular vectors and values of each θi − θ0 side by side, "
        "U' and V' the orthonormal matrices nearest to U and V"
    )
    source = "arXiv 2412.00081"
    fields = ("scale",)

    @classmethod
    def count(cls, tasks: int) -> int:
        return tasks

    def parts(self, updates: torch.Tensor) -> torch.Tensor:
        return updates

    def factors(self, products: torch.Tensor, least: float) -> torch.Tensor:
        import torch

        most = max(products.shape[-1] // len(products), 1)
        found = [singular(products[i, i], least) for i in range(len(products))]
        values = torch.cat([sizes[:most] for sizes, _ in found])
        right = torch.cat([vectors[:, :most] for _, vectors in found], 1)
        left = [vectors[:, :most] / sizes[:most] for sizes, vectors in found]  # U is X times these
        cosines = torch.cat(
            [torch.cat([a.mT @ products[i, j] @ b for j, b in enumerate(left)], 1) for i, a in enumerate(left)]
        )
        rest = (inverse_root(cosines) * values) @ (right @ inverse_root(right.mT @ right)).mT
        blocks = rest.split([one.shape[1] for one in left])
        return torch.stack([one @ block for one, block in zip(left, blocks, strict=True)])

    def defined_matrix(self, updates: np.ndarray, least: float) -> np.ndarray:
        most = max(min(updates.shape[1:]) // len(updates), 1)
        found = [defined_singular(update, least) for update in updates]
        left, right = (np.concatenate([one[side][:, :most] for one in found], 1) for side in (0, 2))
        values = np.concatenate([one[1][:most] for one in found])
        merged: np.ndarray = (nearest_orthogonal(left) * values) @ nearest_orthogonal(right).T
        return merged
