"""Multi-SLERP: the mean direction of fine-tunes or of their updates, with the mean of their lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.writing import TensorRecord
from cpift.config.run import FusionConfig
from cpift.errors import CpiftError, Problem
from cpift.formats.safetensors import TensorInfo
from cpift.merging.definition import Definition, from_origin, moves_of, runs_of, total, vectors_of, weighted
from cpift.merging.forms import WeightedMerge
from cpift.merging.methods.karcher import CANCEL, Karcher


class MultiSlerp(WeightedMerge):
    """Tensor by tensor. Directions are averaged in the tangent space at their own weighted mean, where that average is
    0: what is left is the mean direction itself; `karcher` is the mean on the sphere. A tensor that is 0 has no
    direction, and is left out. One pass for the products, one merges."""

    formula = "Σ w_i·‖x_i‖ · m/‖m‖, m = Σ w_i·x_i/‖x_i‖, Σ w_i = 1; x = θ, with space delta θ − θ0, added to θ0"
    source = "mergekit's documentation"
    fields = ("weight", "weights", "space")
    reads = 1

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        return Karcher.problems(config, tasks)

    @property
    def models(self) -> list[Checkpoint]:
        return [*([self.pretrained] if self.config.space == "delta" else []), *self.tuned.values()]

    def coefficients(self, info: TensorInfo) -> tuple[list[float], TensorRecord | None]:

        gram, delta = self.gram(info).numpy(), self.config.space == "delta"
        whole = np.eye(len(gram))
        whole[:, 0] = 1.0  # of (θ1, θ2 − θ1, …) the products of (θ1, θ2, …)
        products = gram[1:, 1:] if delta else whole @ gram @ whole.T
        shares = np.array(self.weights) / sum(self.weights)
        norms = np.sqrt(np.maximum(np.diagonal(products), 0.0))
        along = np.divide(shares, norms, out=np.zeros_like(shares), where=norms > 0)
        length = math.sqrt(max(float(along @ products @ along), 0.0))
        self._require_direction(length, norms, info.name)
        factors = (along * (shares @ norms) / length).tolist() if norms.any() else along.tolist()
        return [1 - sum(factors), *factors] if delta else factors, None

    def _require_direction(self, length: float, norms: np.ndarray, name: str) -> None:
        if norms.any() and length < CANCEL:
            what = f"merge method {self.config.method_name}: tensor {name}: directions cancel out"
            raise CpiftError(f"{what}, and their mean has none → give other weights, or merge by linear")

    def definition(self, info: TensorInfo) -> Definition:
        delta = self.config.space == "delta"
        vectors = moves_of(self.models, info) if delta else vectors_of(self.models, info)
        shares, runs = np.array(self.weights) / sum(self.weights), runs_of(vectors, info.numel)
        sizes = np.sqrt(total(runs, lambda run: np.square(run).sum(1), shares.shape))
        inverse = np.where(sizes > 0, 1 / np.where(sizes > 0, sizes, 1), 0)
        length = math.sqrt(total(runs, lambda run: np.square((shares * inverse) @ np.stack(run)).sum(), ()))
        wanted = weighted(vectors, shares * inverse * (shares @ sizes) / (length or 1.0))
        return from_origin(wanted, self.pretrained, info.name) if delta else wanted
