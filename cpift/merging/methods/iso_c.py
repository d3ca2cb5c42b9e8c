"""Iso-C: the summed updates with all singular values alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cpift.merging.methods.spectral import SpectralMerge, defined_singular, singular

if TYPE_CHECKING:
    import torch


class IsoC(SpectralMerge):
    """The sum of singular values stays as it is, shared by all directions in which the tasks moved a matrix. That takes
    one eigenvalue decomposition of the shorter side a matrix."""

    formula = "θ0 + λ·σ̄·U·Vᵀ, U·Σ·Vᵀ the singular value decomposition of Σ (θi − θ0), σ̄ the mean of Σ that is not 0"
    source = "arXiv 2502.04959"
    fields = ("scale",)

    @classmethod
    def count(cls, tasks: int) -> int:
        return 1

    def parts(self, updates: torch.Tensor) -> torch.Tensor:
        return updates.sum(0, keepdim=True)

    def factors(self, products: torch.Tensor, least: float) -> torch.Tensor:
        values, vectors = singular(products[0, 0], least)
        mean = values.sum() / max(len(values), 1)
        return ((vectors * (mean / values)) @ vectors.mT)[None]

    def defined_matrix(self, updates: np.ndarray, least: float) -> np.ndarray:
        left, values, right = defined_singular(updates.sum(0), least)
        found: np.ndarray = values.sum() / max(len(values), 1) * left @ right.T
        return found
