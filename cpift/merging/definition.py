"""The definitions of fusion and of the other methods, evaluated in fp64 and compared with what was written.

Sequential SLERP is folded vector after vector over whole rows, tensors or models, as the paper has it; nothing is
shared with the code that fuses. Tensors and elements are sampled, and at most _RUN elements of each model are held at
once. With granularity `model` the angles take as many reads of everything as there are folds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from cpift_kernels import unpack_mask

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.slices import Piece
from cpift.errors import CpiftError
from cpift.formats.safetensors import TensorInfo
from cpift.merging.fusion import Fusion, omegas
from cpift.merging.methods import Baseline, Dare, Linear, Slerp, TaskArithmetic, Ties, survives

if TYPE_CHECKING:
    pass

_TENSORS = 4  # tensors that are evaluated anew
_LARGEST = 1 << 24  # elements of a tensor that is not too large for that, where its angle is its own
_RUN = 1 << 20  # elements that are held in fp64 at once, a multiple of 32
_SAMPLE = 1 << 13  # elements of the first and the last slice that are compared, a multiple of 32
# Half a unit in the last place of the output's dtype; the fp32 sum may add as much again at a rounding boundary.
_EPSILON = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
_ANTIPARALLEL = 1e-2


@dataclass(frozen=True)
class _Expected:
    """What the definition gives: values [P] in fp64 at places [P], counted from the start of the elements asked for;
    scale [P]: the sum of the magnitudes that went into each, or the largest; gain [P]: Σ|coefficients| of a fold, which
    is large where vectors point nearly apart."""

    values: np.ndarray
    places: np.ndarray
    scale: np.ndarray
    gain: np.ndarray | float = 1.0


Definition = Callable[[int, int], _Expected]  # for elements start..stop-1 of one tensor


def check_definition(method: Fusion | Baseline, written: Checkpoint) -> dict[str, Any]:
    """Sampled elements of sampled tensors against the definition: `name`, `passed` (None: none to compare), `detail`.

    Of CPI-FT's fusion, elements in no core.
    """
    largest = _LARGEST if not isinstance(method, Fusion) or not (method.vector.row or method.vector.model) else math.inf
    fit = [info for info in written.tensors.values() if _defined(method, info) and 0 < info.numel <= largest]
    chosen = sorted(fit, key=lambda info: hashlib.sha256(info.name.encode()).digest())[:_TENSORS]
    folds = _model_folds(method) if isinstance(method, Fusion) and method.vector.model else None
    compared = wrong = 0
    for info in chosen:
        definition = _fused(method, info, folds) if isinstance(method, Fusion) else _definition(method, info)
        for start, stop in _windows(method, info):
            found = definition(start, stop)
            allowed = 2 * _EPSILON[info.kind] * np.abs(found.values) + 2.0**-20 * found.scale
            compared += len(found.places)
            wrong += int((np.abs(_at(written, info.name, start, found.places) - found.values) > allowed).sum())
    where = "sampled elements in no core" if isinstance(method, Fusion) else "sampled elements"
    detail = f"{compared:,} elements of {len(chosen)} tensors compared, {wrong:,} beyond rounding"
    return {
        "name": f"{where} equal the definition of {method.config.method} in fp64 within rounding",
        "passed": wrong == 0 if compared else None,
        "detail": detail if compared else "nothing to compare: no such element is in the sample",
    }


def _defined(method: Fusion | Baseline, info: TensorInfo) -> bool:
    return method.masks.has(info.name) if isinstance(method, Fusion) else info.floating


def _windows(method: Fusion | Baseline, info: TensorInfo) -> list[Piece]:
    """What is looked at of a tensor: where its first and its last slice begin, in whole rows where these count."""
    parts, width = method.pieces(info), _row_width(method, info)
    length = max(_SAMPLE // width, 1) * width if width else _SAMPLE
    return [(start, min(stop, start + length)) for start, stop in parts[:: max(len(parts) - 1, 1)]]


def _row_width(method: Fusion | Baseline, info: TensorInfo) -> int:
    """Elements of a row that has an angle of its own; 0 where a row counts for nothing."""
    rows = isinstance(method, Fusion) and method.vector.row and len(info.shape) >= 2
    return info.numel // info.shape[0] if rows else 0


def _definition(method: Baseline, info: TensorInfo) -> Definition:
    defined = DEFINITIONS.get(type(method))
    if defined is None:
        raise CpiftError(f"verification: there is no definition of {type(method).__name__} to compare with")
    return defined(method, info)


def _slerp(method: Slerp, info: TensorInfo) -> Definition:
    vectors = _vectors_of(method.models, info)
    return _combined(vectors, sequential_slerp(_runs(vectors, info.numel), method.factors, method.config.epsilon))


def _linear(method: Linear, info: TensorInfo) -> Definition:
    return _weighted(_vectors_of(method.models, info), np.array(method.weights) / sum(method.weights))


def _arithmetic(method: TaskArithmetic, info: TensorInfo) -> Definition:
    weights = np.array([1.0 - sum(method.weights), *method.weights])
    return _weighted(_vectors_of(method.models, info), weights)


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
        return _expected([vector[places] for vector in found], folds, places)

    return values


def _expected(vectors: list[np.ndarray], folds: list[Fold], places: np.ndarray) -> _Expected:
    sizes = [(abs(first), abs(second)) for first, second in folds]
    scale, gain = (_folded(of, sizes) for of in ([np.abs(v) for v in vectors], [np.ones_like(v) for v in vectors]))
    return _Expected(_folded(vectors, folds), places, scale, gain)


def _masked(fusion: Fusion, info: TensorInfo) -> Vectors:
    """θ_base, θ1..θN (less θ0 in delta space), 0 in the cores; and the places in no core."""

    def vectors(start: int, stop: int) -> tuple[list[np.ndarray], np.ndarray]:
        sources, core = fusion.sources(info.name, start, stop), fusion.union(info.name, start, stop)
        kept = ~unpack_mask(core, stop - start).numpy()
        found = [source.double().numpy() for source in sources]
        found = [vector - found[0] for vector in found[1:]] if fusion.from_origin else found
        return [vector * kept for vector in found], np.flatnonzero(kept)

    return vectors


def _fused(fusion: Fusion, info: TensorInfo, folds: list[Fold] | None) -> Definition:
    """CPI-FT's fusion; `folds`: of the whole model, None where a tensor or a row has its own."""
    vectors, width = _masked(fusion, info), _row_width(fusion, info)
    if width:
        combined = _combined_by_row(fusion, vectors, width)
    else:
        combined = _combined(vectors, folds or _folds(fusion, _runs(vectors, info.numel)))

    def values(start: int, stop: int) -> _Expected:
        found = combined(start, stop)
        if not fusion.from_origin:
            return found
        origin = _at(fusion.inputs.pretrained, info.name, start, found.places)
        scale = found.scale + (1 + found.gain) * np.abs(origin)  # the engine combines θ, not θ − θ0
        return replace(found, values=found.values + origin, scale=scale)

    return values


def _combined_by_row(fusion: Fusion, vectors: Vectors, width: int) -> Definition:
    """For elements of whole rows."""

    def values(start: int, stop: int) -> _Expected:
        found, places = vectors(start, stop)
        rows = []
        for first in range(0, stop - start, width):
            row = [vector[first : first + width] for vector in found]
            rows.append(_expected(row, _folds(fusion, lambda row=row: iter([row])), places))  # type: ignore[misc]
        fields = ([row.values for row in rows], [row.scale for row in rows], [row.gain for row in rows])
        whole, scale, gain = (np.concatenate(field)[places] for field in fields)
        return _Expected(whole, places, scale, gain)

    return values


def _model_folds(fusion: Fusion) -> list[Fold]:
    """The folds of granularity `model`: a vector is the whole parameter space."""
    infos = [info for info in fusion.inputs.backbone.tensors.values() if fusion.masks.has(info.name)]
    parts = [_runs(_masked(fusion, info), info.numel) for info in infos]
    return _folds(fusion, lambda: (run for part in parts for run in part()))


def _folds(fusion: Fusion, runs: Runs) -> list[Fold]:
    return sequential_slerp(runs, omegas(fusion.config, len(fusion.inputs.tuned)), fusion.config.epsilon)


def _ties(method: Ties, info: TensorInfo) -> Definition:
    def merged(updates: np.ndarray, weights: np.ndarray, start: int, stop: int) -> np.ndarray:
        words = [method.masks.words(task, info.name, start, stop) for task in method.tuned]
        trimmed = updates * np.stack([unpack_mask(mask, stop - start).numpy() for mask in words])
        agrees = np.sign(trimmed) == np.where(trimmed.sum(0) >= 0, 1, -1)
        found: np.ndarray = (trimmed * weights * agrees).sum(0) / np.maximum(agrees.sum(0), 1)
        return found

    return _updated(method, info, merged)


def _dare(method: Dare, info: TensorInfo) -> Definition:
    def merged(updates: np.ndarray, weights: np.ndarray, start: int, stop: int) -> np.ndarray:
        density = method.config.density
        kept = [survives(method.seed, task, info.name, start, stop, density) for task in method.tuned]
        found: np.ndarray = (updates * np.stack(kept) / density * weights).sum(0)
        return found

    return _updated(method, info, merged)


Merged = Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]  # updates [N, P], weights [N, 1], start, stop → [P]


def _updated(method: Baseline, info: TensorInfo, merged: Merged) -> Definition:
    """θ0 and what is made of updates, element by element."""

    def values(start: int, stop: int) -> _Expected:
        origin, *tuned = (model.slice(info.name, start, stop).double().numpy() for model in method.models)
        updates, weights = np.stack([vector - origin for vector in tuned]), np.array(method.weights)[:, None]
        scale = np.max(np.abs([origin, *tuned]), axis=0, initial=0.0) / method.config.density
        return _Expected(origin + merged(updates, weights, start, stop), np.arange(stop - start), scale)

    return values


# Every method but CPI-FT's own by what it is made of.
DEFINITIONS: dict[type[Baseline], Callable[[Any, TensorInfo], Definition]] = {
    Linear: _linear,
    TaskArithmetic: _arithmetic,
    Slerp: _slerp,
    Ties: _ties,
    Dare: _dare,
}


def _at(model: Checkpoint, name: str, start: int, places: np.ndarray) -> np.ndarray:
    """fp64 [P]: the elements of a tensor at places [P], counted from start."""
    import torch

    if len(places) == 0:
        return np.zeros(0)
    return model.slice(name, start, start + int(places[-1]) + 1)[torch.from_numpy(places)].double().numpy()


Fold = tuple[float, float]  # running ← first · running + second · next vector
Runs = Callable[[], Iterator[list[np.ndarray]]]  # one pass over every model's vector, some elements at a time


def _runs(vectors: Vectors, numel: int) -> Runs:
    return lambda: (vectors(start, min(start + _RUN, numel))[0] for start in range(0, numel, _RUN))


def sequential_slerp(runs: Runs, factors: Sequence[float], epsilon: float) -> list[Fold]:
    """The definition, fold after fold over whole vectors, in fp64: the weights of every fold."""
    folds: list[Fold] = []
    for index, omega in enumerate(factors):
        sums = np.zeros(5)
        for found in runs():
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
