"""The definitions of fusion and of the other methods, evaluated in fp64 and compared with what was written.

Sequential SLERP is folded vector after vector over whole tensors, as the paper has it; nothing is shared with the code
that fuses. Tensors and elements are sampled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from cpift_kernels import unpack_mask

from cpift.checkpoints import Checkpoint
from cpift.fusion import Fusion, omegas
from cpift.methods import Baseline, Dare, Linear, Slerp, TaskArithmetic, Ties, survives
from cpift.safetensors_files import TensorInfo
from cpift.streaming import pieces

_TENSORS = 4  # tensors that are evaluated anew
_LARGEST = 1 << 24  # elements of a tensor that is not too large for that
_RUN = 1 << 20  # elements that are held in fp64 at once, a multiple of 32
_SAMPLE = 1 << 13  # elements of the first and the last slice that are compared, a multiple of 32
# Half a unit in the last place of the output's dtype; the fp32 sum may add as much again at a rounding boundary.
_EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
_ANTIPARALLEL = 1e-2


@dataclass(frozen=True)
class _Expected:
    """What the definition gives: values [P] in fp64 at places [P], counted from the start of the elements asked for;
    scale [P]: the largest magnitude that went into each."""

    values: np.ndarray
    places: np.ndarray
    scale: np.ndarray


Definition = Callable[[int, int], _Expected]  # for elements start..stop-1 of one tensor


def check_definition(method: Fusion | Baseline, written: Checkpoint) -> dict[str, Any]:
    """Sampled elements of sampled tensors against the definition, as `name`, `passed` and `detail`.

    Of CPI-FT's fusion, elements in no core, a vector being one tensor (`granularity` tensor).
    """
    fit = [info for info in written.tensors.values() if _defined(method, info) and 0 < info.numel <= _LARGEST]
    chosen = sorted(fit, key=lambda info: hashlib.sha256(info.name.encode()).digest())[:_TENSORS]
    compared = wrong = 0
    for info in chosen:
        definition = _definition(method, info)
        for start, stop in pieces(info.numel)[:: max(len(pieces(info.numel)) - 1, 1)]:  # the first and the last
            found = definition(start, min(stop, start + _SAMPLE))
            allowed = 2 * _EPSILON[info.dtype] * np.abs(found.values) + 2.0**-20 * found.scale
            compared += len(found.places)
            wrong += int((np.abs(_at(written, info.name, start, found.places) - found.values) > allowed).sum())
    where = "sampled elements in no core" if isinstance(method, Fusion) else "sampled elements"
    return {
        "name": f"{where} equal the definition of {method.config.method} in fp64 within rounding",
        "passed": wrong == 0,
        "detail": f"{compared:,} elements of {len(chosen)} tensors compared, {wrong:,} beyond rounding",
    }


def _defined(method: Fusion | Baseline, info: TensorInfo) -> bool:
    return method.masks.has(info.name) if isinstance(method, Fusion) else info.floating


def _definition(method: Fusion | Baseline, info: TensorInfo) -> Definition:
    if isinstance(method, Fusion):
        return _fused(method, info)
    vectors = _vectors_of(method.models, info)
    if isinstance(method, Slerp):
        return _combined(vectors, sequential_slerp(info.numel, vectors, method.factors, method.config.epsilon))
    if isinstance(method, Linear):
        return _weighted(vectors, np.array(method.weights) / sum(method.weights))
    if isinstance(method, TaskArithmetic):
        return _weighted(vectors, np.array([1.0 - sum(method.weights), *method.weights]))
    return _updated(method, info)


# For elements start..stop-1: every model's vector [stop - start], and the places [P] that are defined.
Vectors = Callable[[int, int], tuple[list[np.ndarray], np.ndarray]]


def _vectors_of(models: Sequence[Checkpoint], info: TensorInfo) -> Vectors:
    return lambda start, stop: (
        [model.slice(info.name, start, stop).double().numpy() for model in models],
        np.arange(stop - start),
    )


def _weighted(vectors: Vectors, weights: np.ndarray) -> Definition:
    def values(start: int, stop: int) -> _Expected:
        found, places = vectors(start, stop)
        return _Expected(weights @ np.stack(found), places, np.max(np.abs(found), axis=0, initial=0.0))

    return values


def _combined(vectors: Vectors, folds: list[Fold]) -> Definition:
    def values(start: int, stop: int) -> _Expected:
        found, places = vectors(start, stop)
        found = [vector[places] for vector in found]
        return _Expected(_folded(found, folds), places, np.max(np.abs(found), axis=0, initial=0.0))

    return values


def _fused(fusion: Fusion, info: TensorInfo) -> Definition:
    def vectors(start: int, stop: int) -> tuple[list[np.ndarray], np.ndarray]:
        """θ_base, θ1..θN (less θ0 in delta space), 0 in the cores; and the places in no core."""
        sources, core = fusion.sources(info.name, start, stop), fusion.union(info.name, start, stop)
        kept = ~unpack_mask(core, stop - start).numpy()
        found = [source.double().numpy() for source in sources]
        found = [vector - found[0] for vector in found[1:]] if fusion.config.space == "delta" else found
        return [vector * kept for vector in found], np.flatnonzero(kept)

    factors = omegas(fusion.config, len(fusion.inputs.tuned))
    combined = _combined(vectors, sequential_slerp(info.numel, vectors, factors, fusion.config.epsilon))

    def values(start: int, stop: int) -> _Expected:
        found = combined(start, stop)
        if fusion.config.space == "weights":
            return found
        origin = _at(fusion.inputs.pretrained, info.name, start, found.places)
        return replace(found, values=found.values + origin, scale=np.maximum(found.scale, np.abs(origin)))

    return values


def _updated(method: Baseline, info: TensorInfo) -> Definition:
    """TIES and DARE, element by element."""

    def values(start: int, stop: int) -> _Expected:
        origin, *tuned = (model.slice(info.name, start, stop).double().numpy() for model in method.models)
        updates = np.stack([vector - origin for vector in tuned])
        weights = np.array(method.weights)[:, None]
        if isinstance(method, Ties):
            words = [method.masks.words(task, info.name, start, stop) for task in method.tuned]
            updates *= np.stack([unpack_mask(mask, stop - start).numpy() for mask in words])
            agrees = np.sign(updates) == np.where(updates.sum(0) >= 0, 1, -1)
            merged = (updates * weights * agrees).sum(0) / np.maximum(agrees.sum(0), 1)
        else:
            assert isinstance(method, Dare)
            density = method.config.density
            kept = [survives(method.seed, task, info.name, start, stop, density) for task in method.tuned]
            merged = (updates * np.stack(kept) / density * weights).sum(0)
        scale = np.max(np.abs([origin, *tuned]), axis=0, initial=0.0) / method.config.density
        return _Expected(origin + merged, np.arange(stop - start), scale)

    return values


def _at(model: Checkpoint, name: str, start: int, places: np.ndarray) -> np.ndarray:
    """fp64 [P]: the elements of a tensor at places [P], counted from start."""
    if len(places) == 0:
        return np.zeros(0)
    return model.slice(name, start, start + int(places[-1]) + 1)[torch.from_numpy(places)].double().numpy()


Fold = tuple[float, float]  # running ← first · running + second · next vector


def sequential_slerp(numel: int, vectors: Vectors, factors: Sequence[float], epsilon: float) -> list[Fold]:
    """The definition, fold after fold over whole vectors, in fp64: the weights of every fold."""
    folds: list[Fold] = []
    for index, omega in enumerate(factors):
        sums = np.zeros(5)
        for start in range(0, numel, _RUN):
            found, _ = vectors(start, min(start + _RUN, numel))
            a, b = _folded(found[: index + 1], folds), found[index + 1]
            d = b - a
            sums += (a @ a, b @ b, d @ d, a @ d, a @ b)
        folds.append(_weights(sums, omega, epsilon))
    return folds


def _folded(vectors: list[np.ndarray], folds: list[Fold]) -> np.ndarray:
    running = vectors[0]
    for vector, (first, second) in zip(vectors[1:], folds, strict=True):
        running = first * running + second * vector
    return running


def _weights(sums: np.ndarray, omega: float, epsilon: float) -> Fold:
    """The weights of SLERP(a, b, ω), of LERP where the angle is degenerate; sums: aa, bb, dd, ad, ab of d = b − a."""
    aa, bb, dd, ad, ab = sums.tolist()
    angle = math.atan2(math.sqrt(max(aa * dd - ad * ad, 0.0)), ab)
    if min(aa, bb) <= 0 or angle <= epsilon or math.pi - angle < max(epsilon, _ANTIPARALLEL):
        return 1 - omega, omega
    return math.sin((1 - omega) * angle) / math.sin(angle), math.sin(omega * angle) / math.sin(angle)
