"""Karcher mean: the point of a sphere from which fine-tunes lie equally far in all directions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpift.checkpoints.writing import TensorRecord
from cpift.config.run import FusionConfig
from cpift.errors import Problem
from cpift.formats.safetensors import TensorInfo
from cpift.merging.definition import Definition, runs_of, total, vectors_of, weighted
from cpift.merging.forms import WeightedMerge
from cpift.merging.settings import no_shares

_ROUNDS = 200
_STILL = 1e-12  # radians that a round moves the mean when it is found
# Length of a mean of directions that is none. It is the root of a sum of products, whose rounding alone makes 1e-8.
CANCEL = 1e-6


class Karcher(WeightedMerge):
    """Tensor by tensor: directions θi/‖θi‖ have their mean on the sphere, norms their ordinary one. A tensor that is 0
    has no direction, and is left out. The mean lies in the span of the models, so their products tell it."""

    formula = "Σ w_i·‖θi‖ · u, u where Σ w_i·log_u(θi/‖θi‖) = 0 on the sphere; Σ w_i = 1"
    source = "Karcher 1977"
    fields = ("weight", "weights")
    reads = 1
    needs_base = False

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        return no_shares(config, tasks, "a mean takes none below 0, and not all 0")

    def coefficients(self, info: TensorInfo) -> tuple[list[float], TensorRecord | None]:
        size = len(self.tuned)
        gram = self.gram(info)
        whole = np.eye(size)  # of (θ1, θ2 − θ1, …) the products of (θ1, θ2, …)
        whole[:, 0] = 1.0
        products = whole @ gram.numpy() @ whole.T
        return _along_the_gradient(products, np.array(self.weights)).tolist(), None

    def definition(self, info: TensorInfo) -> Definition:
        vectors, size = vectors_of(self.models, info), len(self.tuned)
        products = total(runs_of(vectors, info.numel), lambda run: np.stack(run) @ np.stack(run).T, (size, size))
        return weighted(vectors, _by_fixed_points(products, np.array(self.weights)))


def _along_the_gradient(products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[N]: factors of the models, by steps along the sphere; products [N, N]: of the models."""
    norms, used, shares = _directions(products, weights)
    cosines = products[np.ix_(used, used)] / np.outer(norms[used], norms[used])
    mean = _unit(shares, cosines)
    for _ in range(_ROUNDS):
        towards = np.clip(cosines @ mean, -1, 1)
        pulls = shares * _over_sine(towards)
        step = pulls - (pulls @ towards) * mean
        length = float(np.sqrt(max(step @ cosines @ step, 0.0)))
        if length < _STILL:
            break
        mean = _unit(np.cos(length) * mean + np.sin(length) / length * step, cosines)
    return _of_models(mean, norms, used, weights)


def _by_fixed_points(products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The same mean: where the pull is 0, it points along Σ w·(angle / sin angle)·direction."""
    norms, used, shares = _directions(products, weights)
    cosines = products[np.ix_(used, used)] / np.outer(norms[used], norms[used])
    mean = _unit(shares, cosines)
    for _ in range(_ROUNDS):
        mean = _unit(shares * _over_sine(np.clip(cosines @ mean, -1, 1)), cosines)
    return _of_models(mean, norms, used, weights)


def _directions(products: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Norms [N], which models have a direction and a weight [M], and their shares [M]."""
    norms = np.sqrt(np.maximum(np.diagonal(products), 0.0))
    used = np.flatnonzero((norms > 0) & (weights > 0))
    return norms, used, weights[used] / max(float(weights[used].sum()), np.finfo(float).tiny)


def _unit(factors: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """Factors of directions, scaled so that their sum has length 1; of directions that cancel out, the first's."""
    length = float(np.sqrt(max(factors @ cosines @ factors, 0.0)))
    if length > CANCEL:
        return factors / length
    return np.eye(1, len(factors))[0] if len(factors) else factors


def _over_sine(cosines: np.ndarray) -> np.ndarray:
    """angle / sin(angle), 1 at 0; 1 at the opposite point too, to which no way is the shortest."""
    angles = np.arccos(cosines)
    sines = np.sin(angles)
    found: np.ndarray = np.where(sines > CANCEL, angles / np.where(sines > CANCEL, sines, 1.0), 1.0)
    return found


def _of_models(mean: np.ndarray, norms: np.ndarray, used: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Factors of the models: the mean direction, with the mean of the norms."""
    found = np.zeros(len(norms))
    found[used] = float(weights @ norms / weights.sum()) * mean / norms[used]
    return found
