"""What TIES does with updates that disagree: an element's sign is elected, and updates that have it are averaged.

`fusion.normalize` says how. Unset, the sign is that of the updates' sum, and the merged update is Σ w·u of those that
have it, over their number. Set, the sign is that of Σ w·u, and the merged update is Σ w·u of those that have it,
divided by their Σ w (true) or not (false).

The sums that elect are added in fp64, one after another in the order of the tasks, by the fast form and by the
definition: both elect the same sign where updates cancel out but for their rounding. A sum of 0 elects +.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from cpift_kernels import elect_signs

from cpift.config.fusion import FusionConfig

if TYPE_CHECKING:
    import torch

Numbers = TypeVar("Numbers", "torch.Tensor", np.ndarray)

NONE = 1e-8  # a sum of weights that counts as 0


def elected(
    updates: torch.Tensor, weights: Sequence[float], densities: Sequence[float], config: FusionConfig
) -> torch.Tensor:
    """fp32 [n]: the merged update; updates: fp32 [N, n], each of which counts as u / density."""
    return elect_signs(updates, weights, densities, config.normalize, config.scale)


def defined_elected(
    updates: np.ndarray, weights: Sequence[float], densities: Sequence[float], config: FusionConfig
) -> np.ndarray:
    """The same in fp64 [n]; updates: fp64 [N, n]."""
    rescaled = updates / np.array(densities)[:, None]
    moved = rescaled * np.array(weights)[:, None]
    up = in_turn(rescaled if config.normalize is None else moved) >= 0
    agrees = np.where(up, rescaled > 0, rescaled < 0)
    if config.normalize is not None:
        agrees = np.where(up, moved > 0, moved < 0)
    sums = config.scale * np.einsum("ij,ij->j", moved, agrees)
    if config.normalize is None:
        mean: np.ndarray = sums / np.maximum(agrees.sum(0), 1)
        return mean
    total = np.array(weights) @ agrees if config.normalize else np.ones(1)
    found: np.ndarray = sums / np.where(np.abs(total) < NONE, 1.0, total)
    return found


def in_turn(moved: Numbers) -> Numbers:
    """The sum over the first axis, one after another on every processor: the order decides its last bit and, close to
    0, its sign."""
    total: Numbers = functools.reduce(operator.add, moved)
    return total
