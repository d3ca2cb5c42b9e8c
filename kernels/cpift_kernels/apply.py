"""Fused apply: transplant the core elements and combine the rest, in one pass.

    out[j] = x_m[j]                     if exactly mask m holds j (bit for bit when the dtypes agree)
    out[j] = (Σ x_m[j]) / count         if several masks hold j: fp32 sum in source order, fp32 division
    out[j] = Σ_m c[row(j), m]·x_m[j]    elsewhere: fp32 fused multiply-adds in source order, fp32 coefficients

rounded to the dtype of `out` to nearest even; a NaN stays a NaN. Every backend gives the same bits, of NaN apart. A
coefficient that is 0 leaves its source out of the sum, NaN and Inf included. The combination is what N-way
SLERP comes to (`slerp`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .checks import MAX_SOURCES, check_same_shape, check_values, check_words
from .dispatch import Backend, implementation, resolve
from .masks import unpack_mask
from .rounding import fma

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CHUNK = 1 << 20


def fused_apply_reference(
    out: Tensor, sources: Sequence[Tensor], coefficients: Tensor, masks: Sequence[Tensor | None]
) -> None:
    """`fused_apply` in plain torch."""
    members = [None if words is None else unpack_mask(words, out.numel()) for words in masks]
    width = out.numel() // coefficients.shape[0] if coefficients.shape[0] else 0
    for row, scale in enumerate(coefficients.float().tolist()):
        for start in range(row * width, (row + 1) * width, _CHUNK):
            part = slice(start, min(start + _CHUNK, (row + 1) * width))
            values = [source.reshape(-1)[part] for source in sources]
            bits = [None if member is None else member[part] for member in members]
            out.view(-1)[part] = _fuse(out.dtype, values, scale, bits)


def _fuse(dtype: torch.dtype, values: list[Tensor], scale: list[float], bits: list[Tensor | None]) -> Tensor:
    import torch

    combined = torch.zeros_like(values[0], dtype=torch.float32)
    total = torch.zeros_like(values[0], dtype=torch.float32)
    holders = torch.zeros_like(values[0], dtype=torch.float32)
    for value, weight, bit in zip(values, scale, bits, strict=True):
        if weight != 0.0:
            combined = fma(value.float(), combined.new_tensor(weight), combined)
        if bit is not None:
            total += torch.where(bit, value.float(), 0.0)
            holders += bit
    fused = torch.where(holders > 0, total / holders, combined).to(dtype)
    for value, bit in zip(values, bits, strict=True):
        if bit is not None:  # a single donor is copied, so that its bits survive, NaN payloads and −0.0 included
            fused = torch.where(bit & (holders == 1), value.to(dtype), fused)
    return fused


def fused_apply(
    out: Tensor,
    sources: Sequence[Tensor],
    coefficients: Tensor,
    masks: Sequence[Tensor | None],
    *,
    backend: Backend = "auto",
) -> None:
    """Write the fused tensor to `out`.

    out: bf16, fp16 or fp32, may not share memory with a source; sources: 1 to 18 tensors of its shape;
    coefficients: fp64 [R, M] on the CPU, R = 1 or out.shape[0] (row granularity); masks: per source its
    packed core mask, or None.
    """
    _check(out, sources, coefficients, masks)
    resolved = resolve(backend, out, *sources, *(words for words in masks if words is not None))
    implementation(resolved, fused_apply_reference)(out, sources, coefficients, masks)


def _check(out: Tensor, sources: Sequence[Tensor], coefficients: Tensor, masks: Sequence[Tensor | None]) -> None:
    import torch

    check_values("out", out)
    if not 1 <= len(sources) <= MAX_SOURCES or len(masks) != len(sources):
        raise ValueError(f"{len(sources)} sources and {len(masks)} masks; pass 1 to {MAX_SOURCES} of each")
    for m, (source, words) in enumerate(zip(sources, masks, strict=True)):
        check_values(f"sources[{m}]", source)
        check_same_shape(f"sources[{m}]", source, out)
        if words is not None:
            check_words(f"masks[{m}]", words, out.numel())
        if source.untyped_storage().data_ptr() == out.untyped_storage().data_ptr() and out.numel():
            raise ValueError(f"out shares memory with sources[{m}]; give it its own tensor")
    rows = {1, out.shape[0] if out.dim() >= 2 else 1}
    if coefficients.dtype != torch.float64 or coefficients.dim() != 2 or coefficients.device.type != "cpu":
        raise ValueError(f"coefficients is {coefficients.dtype} {tuple(coefficients.shape)}; pass CPU float64 [R, M]")
    if coefficients.shape[0] not in rows or coefficients.shape[1] != len(sources):
        shape = tuple(coefficients.shape)
        raise ValueError(f"coefficients has shape {shape}; expected [R, {len(sources)}] with R in {sorted(rows)}")
