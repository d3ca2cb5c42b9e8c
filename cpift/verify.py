"""What a merge wrote, read back from the disk and compared with its inputs, by code that did not write it.

The cores are compared with their donors bit for bit, all of them. Elsewhere the definition is evaluated: sequential
SLERP in fp64, whole vectors, for a sample of tensors; a sample of their elements is compared.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpift_kernels import count_mask, gather_masked, union_mask, unpack_mask

from cpift.checkpoints import Checkpoint
from cpift.errors import StageError
from cpift.fusion import Fusion, omegas
from cpift.merging import Progress
from cpift.safetensors_files import TensorInfo
from cpift.streaming import pieces, sweep

_TENSORS = 4  # tensors whose SLERP is evaluated anew
_LARGEST = 1 << 25  # elements of a tensor that is not too large for that
_RUN = 1 << 20  # elements that are held in fp64 at once, a multiple of 32
_SAMPLE = 1 << 13  # elements of the first and the last slice that are compared
# Half a unit in the last place of the output's dtype; the fp32 sum may add as much again at a rounding boundary.
_EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
_ANTIPARALLEL = 1e-2


def verify(fusion: Fusion, folder: Path, progress: Progress = lambda elements, name: None) -> list[dict[str, Any]]:
    """Check the fused checkpoint in `folder`; returns what was checked, as `name`, `passed` and `detail`.

    Raises StageError that lists every check that failed.
    """
    written = Checkpoint(folder)
    checks = [_accounted(fusion, written), _cores(fusion, written, progress), _outside(fusion, written)]
    if fusion.config.granularity == "tensor":
        checks.append(_combined(fusion, written))
    failed = [f"  - {check['name']}: {check['detail']}" for check in checks if not check["passed"]]
    if failed:
        raise StageError("the fused model is not what it has to be; it is not kept\n" + "\n".join(failed))
    return checks


def _accounted(fusion: Fusion, written: Checkpoint) -> dict[str, Any]:
    wanted = {name: (info.shape, info.dtype) for name, info in fusion.inputs.backbone.tensors.items()}
    found = {name: (info.shape, info.dtype) for name, info in written.tensors.items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    return {
        "name": "every tensor of the backbone is in the fused model, with its shape and dtype, and no other",
        "passed": not wrong,
        "detail": f"{len(wanted)} tensors" + (f", wrong: {', '.join(wrong[:5])}" if wrong else ""),
    }


def _cores(fusion: Fusion, written: Checkpoint, progress: Progress) -> dict[str, Any]:
    """Compare every core element that has one donor with that donor, bit for bit."""
    compared = differing = 0
    for info in written.tensors.values():
        for start, stop in sweep([*fusion.models, written], info, pieces(info.numel)):
            progress(stop - start, info.name)
            if fusion.masks.has(info.name):
                more, wrong = _slice_cores(fusion, written, info, start, stop)
                compared, differing = compared + more, differing + wrong
    return {
        "name": "every core element of the fused model equals its donor bit for bit",
        "passed": differing == 0,
        "detail": f"{compared:,} elements compared, {differing:,} differ",
    }


def _slice_cores(fusion: Fusion, written: Checkpoint, info: TensorInfo, start: int, stop: int) -> tuple[int, int]:
    operands = fusion.operands(info.name, start, stop)
    if count_mask(operands.core) == 0:
        return 0, 0
    out, compared, differing = written.slice(info.name, start, stop), 0, 0
    owned = [mask for mask in operands.masks if mask is not None]
    for source, mask in zip(operands.sources, operands.masks, strict=True):
        if mask is None:
            continue
        others = [other for other in owned if other is not mask]
        sole = mask & ~union_mask(others) if others else mask
        got, donor = gather_masked(out, sole), gather_masked(source, sole).to(out.dtype)
        compared += donor.numel()
        differing += int((got.view(torch.uint8) != donor.view(torch.uint8)).sum())
    return compared, differing


def _outside(fusion: Fusion, written: Checkpoint) -> dict[str, Any]:
    """Tensors outside the parameter space equal θ_base bit for bit."""
    names = [name for name in written.names if not fusion.masks.has(name)]
    wrong = [name for name in names if not _same_bits(fusion.inputs.backbone, written, name)]
    return {
        "name": "every tensor outside the parameter space equals the backbone bit for bit",
        "passed": not wrong,
        "detail": f"{len(names)} tensors compared, {len(wrong)} differ",
    }


def _same_bits(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    return all(
        torch.equal(one.slice(name, *piece).view(torch.uint8), other.slice(name, *piece).view(torch.uint8))
        for piece in pieces(one.tensors[name].numel)
    )


def _combined(fusion: Fusion, written: Checkpoint) -> dict[str, Any]:
    """Elements in no core against sequential SLERP in fp64, for a sample of tensors."""
    fit = [info for info in written.tensors.values() if fusion.masks.has(info.name) and 0 < info.numel <= _LARGEST]
    chosen = sorted(fit, key=lambda info: hashlib.sha256(info.name.encode()).digest())[:_TENSORS]
    compared = wrong = 0
    for info in chosen:
        folds = sequential_slerp(fusion, info)
        for start, stop in pieces(info.numel)[:: max(len(pieces(info.numel)) - 1, 1)]:  # the first and the last
            vectors, places = _vectors(fusion, info, start, min(stop, start + _SAMPLE))
            expected, got = _folded(vectors, folds), _at(written, info.name, start, places)
            scale = np.max([np.abs(vector) for vector in vectors], axis=0, initial=0.0)
            if fusion.config.space == "delta":
                expected = expected + _at(fusion.inputs.pretrained, info.name, start, places)
            allowed = 2 * _EPSILON[info.dtype] * np.abs(expected) + 2.0**-20 * scale
            compared += len(places)
            wrong += int((np.abs(got - expected) > allowed).sum())
    return {
        "name": "sampled elements in no core equal sequential SLERP in fp64 within rounding",
        "passed": wrong == 0,
        "detail": f"{compared:,} elements of {len(chosen)} tensors compared, {wrong:,} beyond rounding",
    }


def _at(model: Checkpoint, name: str, start: int, places: np.ndarray) -> np.ndarray:
    """fp64 [P]: the elements of a tensor at places [P], counted from start."""
    if len(places) == 0:
        return np.zeros(0)
    return model.slice(name, start, start + int(places[-1]) + 1)[torch.from_numpy(places)].double().numpy()


Fold = tuple[float, float]  # running ← first · running + second · next vector


def sequential_slerp(fusion: Fusion, info: TensorInfo) -> list[Fold]:
    """The definition, fold after fold over the whole non-core vector, in fp64: the weights of every fold."""
    folds: list[Fold] = []
    for index, omega in enumerate(omegas(fusion.config, len(fusion.inputs.tuned))):
        sums = np.zeros(5)
        for start in range(0, info.numel, _RUN):
            vectors, _ = _vectors(fusion, info, start, min(start + _RUN, info.numel))
            a, b = _folded(vectors[: index + 1], folds), vectors[index + 1]
            d = b - a
            sums += (a @ a, b @ b, d @ d, a @ d, a @ b)
        folds.append(_weights(sums, omega, fusion.config.epsilon))
    return folds


def _vectors(fusion: Fusion, info: TensorInfo, start: int, stop: int) -> tuple[list[np.ndarray], np.ndarray]:
    """θ_base, θ1..θN (less θ0 in delta space) in fp64 at the non-core places of start..stop-1, and these places."""
    operands = fusion.operands(info.name, start, stop)
    places = np.flatnonzero(~unpack_mask(operands.core, stop - start).numpy())
    vectors = [source.double().numpy()[places] for source in operands.sources]
    return ([vector - vectors[0] for vector in vectors[1:]] if fusion.config.space == "delta" else vectors), places


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
