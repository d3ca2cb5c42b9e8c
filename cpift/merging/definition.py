"""What a merge has to give, in fp64: what the definitions of methods are made of.

Vectors are folded by SLERP one after another, over whole rows, tensors or models, as the paper has it; nothing is
shared with the code that merges. At most RUN elements of each model are held at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.formats.safetensors import TensorInfo

# Elements that a thread holds in fp64 at once, a multiple of 32: what is made of them stays in the cache, and is
# computed by this thread alone. Threads of libraries would spin between so many small products.
RUN = 1 << 15
_AHEAD = 256  # runs of which the results are held at once
_ANTIPARALLEL = 1e-2


@dataclass(frozen=True)
class Expected:
    """What the definition gives: values [P] in fp64 at places [P], counted from the start of the elements asked for;
    scale [P]: the sum of the magnitudes that went into each, or the largest; gain [P]: Σ|coefficients| of a fold, which
    is large where vectors point nearly apart."""

    values: np.ndarray
    places: np.ndarray
    scale: np.ndarray
    gain: np.ndarray | float = 1.0


Definition = Callable[[int, int], Expected]  # for elements start..stop-1 of one tensor
# For elements start..stop-1: every model's vector [stop - start], and the places [P] that are defined.
Vectors = Callable[[int, int], tuple[list[np.ndarray], np.ndarray]]
Fold = tuple[float, float]  # running ← first · running + second · next vector
# One pass over every model's vector: calls that give some elements of each, in any order and by any thread.
Runs = Callable[[], Iterator[Callable[[], list[np.ndarray]]]]


def in_fp64(model: Checkpoint, name: str, start: int, stop: int) -> np.ndarray:
    """fp64 [stop - start]: elements of a tensor."""
    values: np.ndarray = model.slice(name, start, stop).double().numpy()
    return values


def vectors_of(models: Sequence[Checkpoint], info: TensorInfo) -> Vectors:
    """A tensor of every model, all of whose elements are defined."""
    return lambda start, stop: (
        [in_fp64(model, info.name, start, stop) for model in models],
        np.arange(stop - start),
    )


def moves_of(models: Sequence[Checkpoint], info: TensorInfo) -> Vectors:
    """A tensor of every model but the first, less the first's."""

    def vectors(start: int, stop: int) -> tuple[list[np.ndarray], np.ndarray]:
        origin, *others = (in_fp64(model, info.name, start, stop) for model in models)
        return [vector - origin for vector in others], np.arange(stop - start)

    return vectors


def elements_at(model: Checkpoint, name: str, start: int, places: np.ndarray) -> np.ndarray:
    """fp64 [P]: the elements of a tensor at places [P], counted from start."""
    import torch

    if len(places) == 0:
        return np.zeros(0)
    return model.slice(name, start, start + int(places[-1]) + 1)[torch.from_numpy(places)].double().numpy()


def weighted(vectors: Vectors, weights: np.ndarray) -> Definition:
    """Σ weight · vector."""

    def values(start: int, stop: int) -> Expected:
        values_of_models, places = vectors(start, stop)
        return Expected(
            weights @ np.stack(values_of_models), places, np.max(np.abs(values_of_models), axis=0, initial=0.0)
        )

    return values


def combined(vectors: Vectors, folds: list[Fold]) -> Definition:
    """Vectors folded one after another."""

    def values(start: int, stop: int) -> Expected:
        values_of_models, places = vectors(start, stop)
        return expected([vector[places] for vector in values_of_models], folds, places)

    return values


def from_origin(of_updates: Definition, origin: Checkpoint, name: str) -> Definition:
    """θ0 and what a definition gives of updates."""

    def values(start: int, stop: int) -> Expected:
        moved = of_updates(start, stop)
        values_there = elements_at(origin, name, start, moved.places)
        scale = moved.scale + (1 + moved.gain) * np.abs(values_there)  # a merge combines θ, not θ − θ0
        return replace(moved, values=moved.values + values_there, scale=scale)

    return values


def expected(vectors: list[np.ndarray], folds: list[Fold], places: np.ndarray) -> Expected:
    """What folds give of vectors [P]."""
    sizes = [(abs(first), abs(second)) for first, second in folds]
    scale, gain = (_folded(of, sizes) for of in ([np.abs(v) for v in vectors], [np.ones_like(v) for v in vectors]))
    return Expected(_folded(vectors, folds), places, scale, gain)


def runs_of(vectors: Vectors, numel: int) -> Runs:
    """Passes over all elements of a tensor."""

    def run(start: int) -> list[np.ndarray]:
        return vectors(start, min(start + RUN, numel))[0]

    return lambda: (partial(run, start) for start in range(0, numel, RUN))


def total(runs: Runs, of: Callable[[list[np.ndarray]], np.ndarray], size: tuple[int, ...]) -> np.ndarray:
    """Σ of(run) over a pass, of this size: computed by several threads, added in the order of the runs."""
    import torch

    sums, left = np.zeros(size), runs()
    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="cpift-definition") as pool:
        while some := list(islice(left, _AHEAD)):
            for part in pool.map(lambda run: of(run()), some):
                sums += part
    return sums


def sequential_slerp(runs: Runs, factors: Sequence[float], epsilon: float) -> list[Fold]:
    """The definition, fold after fold over whole vectors, in fp64: the weights of every fold."""
    folds: list[Fold] = []
    for index, omega in enumerate(factors):
        sums = total(runs, partial(_products, folds=tuple(folds), next_one=index + 1), (3,))
        folds.append(_weights(sums, omega, epsilon))
    return folds


def _products(run: list[np.ndarray], folds: Sequence[Fold], next_one: int) -> np.ndarray:
    """[3]: aa, ad, dd of what the folds give, a, and of the way to the next vector, d = b − a."""
    a = _folded(run[:next_one], folds)
    d = run[next_one] - a
    return np.array([_dot(a, a), _dot(a, d), _dot(d, d)])


def _dot(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.einsum("i,i->", one, other))


def _folded(vectors: list[np.ndarray], folds: Sequence[Fold]) -> np.ndarray:
    running = vectors[0]
    for vector, (first, second) in zip(vectors[1:], folds, strict=True):
        running = first * running + second * vector
    return running


def _weights(sums: np.ndarray, omega: float, epsilon: float) -> Fold:
    """The weights of SLERP(a, b, ω), of LERP where the angle is degenerate; sums: aa, ad, dd of d = b − a,
    of which those of b follow: little is lost where the two are close, and nothing where b = 0."""
    aa, ad, dd = sums.tolist()
    ab, bb = aa + ad, aa + 2 * ad + dd
    angle = math.atan2(math.sqrt(max(aa * dd - ad * ad, 0.0)), ab)
    if min(aa, bb) <= 0 or angle <= epsilon or math.pi - angle < max(epsilon, _ANTIPARALLEL):
        return 1 - omega, omega
    return math.sin((1 - omega) * angle) / math.sin(angle), math.sin(omega * angle) / math.sin(angle)
