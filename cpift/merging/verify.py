"""What a merge wrote, read back from the disk and compared with its inputs, by code that did not write it.

For a sample of elements the method's definition is evaluated in fp64; what else a method has to hold, it says itself
(`MergeMethod.checks`): CPI-FT's cores are compared with their donors, all of them. At last transformers is asked
whether it takes the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.finite import is_finite
from cpift.checkpoints.layout import known_loading_faults
from cpift.checkpoints.slices import Piece, pieces, sweep
from cpift.disk.files import file_sha256
from cpift.formats.safetensors import TensorInfo, read_header
from cpift.merging.base import MergeMethod
from cpift.merging.checks import Check, CheckedFile, OnElements, Tally, compared
from cpift.merging.definition import elements_at
from cpift.pretrained.tokens import FILE, found_in
from cpift.text.units import show_size

if TYPE_CHECKING:
    import torch

_TENSORS = 4  # tensors that are evaluated anew
_SAMPLE = 1 << 13  # elements of the first and the last slice that are compared, a multiple of 32
# Half a unit in the last place of the output's dtype; the fp32 sum may add as much again at a rounding boundary.
_EPSILON = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
_LEAST = {"F16": 2.0**-24}  # the step between its smallest values; of the other dtypes no weight is so small


def verify(
    method: MergeMethod,
    like: Checkpoint,
    folder: Path,
    progress: OnElements = lambda elements, name: None,
    checked: Mapping[str, CheckedFile] = MappingProxyType({}),
) -> list[Check]:
    """Check the checkpoint in `folder`, which `method` made with the layout of `like`.

    checked: files whose slices were looked at while they were merged (`engine.merge`). Where they are still what was
    written, and their headers have every tensor where it was written, only the definition's sample is read of them;
    of all others every element."""
    written = Checkpoint(folder)
    lost, tallies = _as_written(written, checked)
    for info in written.tensors.values():
        fits = info.name in like.tensors and info.shape == like.tensors[info.name].shape
        if not fits or not info.numel:
            continue  # `_accounted` names what does not fit
        if info.name in tallies:
            progress(info.numel, info.name)
        else:
            tallies[info.name] = _read(method, written, info, progress)
    back = _read_back(written, checked, lost) if checked else []
    found = {info.name: tallies.get(info.name, Tally()) for info in written.tensors.values()}
    definition = check_definition(method, written)
    return [_accounted(like, written), *back, *method.checks(written, found), definition, _finite(written, found)]


def verify_values(method: MergeMethod, like: Checkpoint, merged: Checkpoint) -> list[Check]:
    """What is looked at of a merged model whether or not it is on the disk: not every core beside its donor."""
    found = {name: Tally(finite=is_finite(merged, name)) for name, info in merged.tensors.items() if info.floating}
    return [_accounted(like, merged), check_definition(method, merged), _finite(merged, found)]


def _as_written(written: Checkpoint, checked: Mapping[str, CheckedFile]) -> tuple[list[str], dict[str, Tally]]:
    """Names of files that are not what was written, and what is known of the tensors of those that are.

    A file whose identity changed since it was written (another name is no change) is hashed anew."""
    lost: list[str] = []
    tallies: dict[str, Tally] = {}
    for file in written.files:
        known = checked.get(file.name)
        if known is None:
            continue
        if {info.name: info.start for info in read_header(file) if info.numel} != known.starts:
            lost.append(f"{file.name} (its header)")
        elif file_sha256(file) != known.sha256:
            lost.append(file.name)
        else:
            tallies |= known.tallies
    return lost, tallies


def _read_back(written: Checkpoint, checked: Mapping[str, CheckedFile], lost: Sequence[str]) -> list[Check]:
    gone = sorted(checked.keys() - {file.name for file in written.files})
    name = "every file of the fused model is on the disk as it was written"
    return [compared(name, len(checked), [*lost, *gone], f"{len(checked)} of {len(written.files)} files compared")]


def _read(method: MergeMethod, written: Checkpoint, info: TensorInfo, progress: OnElements) -> Tally:
    """What a tensor shows, all of it read."""
    total, beside = Tally(), method.at(info.name).compared_with(info)
    for start, stop in sweep([*beside, written], info, pieces(info.numel)):
        total += method.tally(info, start, written.slice(info.name, start, stop))
        progress(stop - start, info.name)
    return total


def check_definition(method: MergeMethod, written: Checkpoint) -> Check:
    """Sampled elements of sampled tensors against the method's definition."""
    fit = [info for info in written.tensors.values() if method.compares(info)]
    chosen = sorted(fit, key=lambda info: hashlib.sha256(info.name.encode()).digest())[:_TENSORS]
    count = wrong = 0
    for info in chosen:
        with method.named(f"the definition of tensor {info.name}"):
            definition = method.at(info.name).definition(info)
        for start, stop in _windows(method, info):
            with method.named(f"the definition of tensor {info.name}, elements {start} to {stop - 1}"):
                expected = definition(start, stop)
            allowed = (
                2 * _EPSILON[info.kind] * np.abs(expected.values)
                + _LEAST.get(info.kind, 0.0)
                + 2.0**-20 * expected.scale
            )
            got = elements_at(written, info.name, start, expected.places)
            count += len(expected.places)
            wrong += int((~(np.abs(got - expected.values) <= allowed)).sum())  # NaN is wrong too
    name = f"{method.compared_where} equal the definition of {method.config.method_name} in fp64 within rounding"
    what = f"{count:,} elements of {len(chosen)} tensors compared, {wrong:,} beyond rounding"
    return compared(name, count, wrong, what if count else "no such element is in the sample")


def _windows(method: MergeMethod, info: TensorInfo) -> list[Piece]:
    """What is looked at of a tensor: where its first and its last slice begin, in whole rows where these count."""
    parts, width = method.pieces(info), method.row_width(method.config, info)
    length = max(_SAMPLE // width, 1) * width if width else _SAMPLE
    return [(start, min(stop, start + length)) for start, stop in parts[:: max(len(parts) - 1, 1)]]


def _finite(written: Checkpoint, tallies: Mapping[str, Tally]) -> Check:
    floating = [info.name for info in written.tensors.values() if info.floating and info.numel]
    bad = [name for name in floating if not tallies[name].finite]
    return compared("every element of the fused model is finite", len(floating), bad, f"{len(floating)} tensors")


def _accounted(like: Checkpoint, written: Checkpoint) -> Check:
    wanted = {name: (info.shape, info.dtype) for name, info in like.tensors.items()}
    layout = {name: (info.shape, info.dtype) for name, info in written.tensors.items()}
    wrong = sorted(name for name in wanted.keys() | layout.keys() if wanted.get(name) != layout.get(name))
    name = "every tensor of the inputs is in the fused model, with shape and dtype, and no other"
    return compared(name, len(wanted), wrong, f"{len(wanted)} tensors")


def check_tokens(folder: Path, tokens: Mapping[str, int]) -> Check:
    """Whether the tokenizer that was written has these tokens, each with its number."""
    found = found_in(folder / FILE)
    wrong = sorted(token for token in found.keys() | tokens.keys() if found.get(token) != tokens.get(token))
    name = "every token of the fused model's tokenizer has the row that was made for it"
    return compared(name, len(tokens), wrong, f"{len(tokens):,} tokens")


def check_loads(folder: Path, memory: int) -> Check:
    """Whether transformers takes the model: every parameter of the class that config.json names is there with its
    shape, as its own loading has it, and the logits are finite where the model fits into so many bytes."""
    name, written = "transformers takes every tensor of the fused model", Checkpoint(folder)
    wrong = known_loading_faults(written)
    if not wrong and written.nbytes <= memory:
        try:
            logits = _logits(folder)
        except Exception as error:  # the model's own code: whatever it says, the merge is not to be lost
            wrong = [f"{type(error).__name__}: {error}"]
        else:
            detail, passed = f"loaded, {logits.numel():,} logits", bool(logits.isfinite().all())
            return {"name": f"{name}, and its logits are finite", "passed": passed, "detail": detail}
    why = f"; not loaded, for it is larger than the memory budget ({show_size(memory)})"
    count = len(written.tensors)
    return compared(name, count, wrong, f"{count} tensors by name and shape", "" if wrong else why)


def _logits(folder: Path) -> torch.Tensor:
    import torch

    from cpift.models.sources import load_model

    with torch.inference_mode():
        model = load_model(folder)
        rows = model.get_input_embeddings().num_embeddings
        tokens = torch.arange(1, 9)[None] % int(rows)  # type: ignore[arg-type]  # torch: any attribute is a Tensor or a Module
        logits: torch.Tensor = model(tokens, use_cache=False).logits  # some classes build no cache of every config
    return logits
