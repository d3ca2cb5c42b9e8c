"""Updates that disagree: an element's sign is elected, and what has it is averaged (TIES, arXiv 2306.01708).

Of updates u_t [n], each of which counts as u_t / density_t, with weights w_t; sums run over the tasks in turn:

    normalize None       side = sign of Σ u_t / density_t, 0 elects +
                         out  = Σ u_t · (w_t / density_t) over those whose sign is `side`, over their number; in fp32
    normalize True       moved_t = w_t · u_t / density_t in fp64; side = sign of Σ moved_t
                         out  = Σ moved_t over those whose sign is `side`, over their Σ w_t, unless that is 0
    normalize False      the same, not divided

and all of it times `scale`. The sums that elect are in fp64, so that updates that cancel out but for their rounding
elect one sign on every processor.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .dispatch import Backend, implementation, resolve

if TYPE_CHECKING:
    from torch import Tensor

NONE = 1e-8  # a sum of weights that counts as 0


def elect_signs_reference(
    updates: Tensor, weights: Sequence[float], densities: Sequence[float], normalize: bool | None, scale: float
) -> Tensor:
    """`elect_signs` in plain torch."""
    import torch

    exact = torch.tensor([list(weights), list(densities)], dtype=torch.float64, device=updates.device)[:, :, None]
    if normalize is not None:
        return _weighted(updates.double() / exact[1], exact[0], normalize) * scale
    agrees = updates.sign() == torch.where(_in_turn(updates.double() / exact[1]) >= 0, 1.0, -1.0)
    factors = exact.float()
    found = _in_turn(updates * (factors[0] / factors[1]) * agrees) / agrees.sum(0).clamp(min=1)
    scaled: Tensor = found * scale
    return scaled


def _weighted(updates: Tensor, weights: Tensor, normalize: bool) -> Tensor:
    """fp32 [n]; updates [N, n] and weights [N, 1] in fp64."""
    import torch

    moved = updates * weights
    agrees = moved.sign() == torch.where(_in_turn(moved) >= 0, 1.0, -1.0)
    found = _in_turn(moved * agrees)
    if normalize:
        total = _in_turn(weights * agrees)
        found = found / torch.where(total.abs() < NONE, 1.0, total)
    return found.float()


def _in_turn(moved: Tensor) -> Tensor:
    total: Tensor = functools.reduce(operator.add, moved)
    return total


def elect_signs(
    updates: Tensor,
    weights: Sequence[float],
    densities: Sequence[float],
    normalize: bool | None = None,
    scale: float = 1.0,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """fp32 [n]: the merged update of fp32 updates [N, n], with a weight and a density for each of N tasks.

    On a GPU `auto` is plain torch. Raises ValueError for other shapes or dtypes.
    """
    if updates.dim() != 2 or str(updates.dtype) != "torch.float32" or not len(updates):
        raise ValueError(f"updates are {updates.dtype} {list(updates.shape)}; pass float32 [N, n] of at least one task")
    if not len(weights) == len(densities) == len(updates):
        raise ValueError(f"{len(weights)} weights and {len(densities)} densities for {len(updates)} updates")
    if backend == "auto" and updates.device.type != "cpu":
        backend = "reference"
    chosen = implementation(resolve(backend, updates), elect_signs_reference)
    return chosen(updates, weights, densities, normalize, scale)
