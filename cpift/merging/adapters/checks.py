"""A merged adapter, read back from the disk and compared with the definition of its merge."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.lora import LoraCheckpoint
from cpift.checkpoints.lora_extraction import ModuleError
from cpift.checkpoints.slices import Piece
from cpift.formats.safetensors import TensorInfo
from cpift.merging.adapters.inputs import stored
from cpift.merging.base import MergeMethod
from cpift.merging.checks import Check, compared
from cpift.merging.definition import elements_at

_TENSORS = 8  # that are evaluated anew
_SAMPLE = 1 << 13  # elements of the first and the last slice that are compared
_ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-22}  # of values in a dtype
_OF_UPDATE = 1e-5  # of float32 factors and their product


def verify_adapter(method: MergeMethod, folder: Path, errors: Mapping[str, ModuleError]) -> list[Check]:
    """Whether θ0 and the adapter in `folder` are the merge of `method`, whose models are read in float32: a sample of
    elements beside the definition in fp64, apart by no more than what the rank lost of the tensor, and rounding.

    errors: by tensor, of those that have factors.
    """
    written = LoraCheckpoint(folder, method.pretrained)
    held = [written.tensors[name] for name in {*written.adapted, *written.replaced}]
    chosen = sorted(filter(method.compares, held), key=lambda info: hashlib.sha256(info.name.encode()).digest())
    places = [(info, piece) for info in chosen[:_TENSORS] for piece in _windows(method, info)]
    wrong = {info.name for info, piece in places if not _is_merge(method, written, info, piece, errors.get(info.name))}
    count = sum(stop - start for _, (start, stop) in places)
    what = f"{count:,} elements of {len(chosen[:_TENSORS])} tensors, apart by what the rank lost and by rounding"
    return [compared("θ0 with the adapter is the merge by its definition in fp64", count, sorted(wrong), what)]


def _windows(method: MergeMethod, info: TensorInfo) -> list[Piece]:
    """The first elements of the first and of the last slice, in whole rows where these count."""
    parts, width = method.pieces(info), method.row_width(method.config, info)
    length = max(_SAMPLE // width, 1) * width if width else _SAMPLE
    return [(start, min(stop, start + length)) for start, stop in parts[:: max(len(parts) - 1, 1)]]


def _is_merge(
    method: MergeMethod, written: Checkpoint, info: TensorInfo, piece: Piece, error: ModuleError | None
) -> bool:
    start, stop = piece
    with method.named(f"the definition of tensor {info.name}, elements {start} to {stop - 1}"):
        expected = method.at(info.name).definition(info)(start, stop)
    apart = elements_at(written, info.name, start, expected.places) - expected.values
    kind = "F32" if error is not None else stored(method.pretrained).tensors[info.name].kind
    allowed = _ROUNDING[kind] * (np.linalg.norm(expected.values) + np.linalg.norm(expected.scale))
    allowed += 0.0 if error is None else error.lost + _OF_UPDATE * error.change
    return bool(np.linalg.norm(apart) <= allowed)  # NaN is not
