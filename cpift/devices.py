"""Which device a process computes on, and whether bf16 is native there."""

from __future__ import annotations

import torch

from cpift.config_inputs import Precision


def resolved(precision: Precision, device_type: str | None = None) -> Precision:
    """What products are computed in: as asked for, and for `auto` bfloat16 where that is native, else float32."""
    if precision != "auto":
        return precision
    return "bfloat16" if native_bf16(device_type or ("cuda" if torch.cuda.is_available() else "cpu")) else "float32"


def native_bf16(device_type: str) -> bool:
    """Whether bf16 matrix products run in hardware: bf16 autocast is faster than float32 then, and far slower else."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def device_name() -> str:
    """For manifests: the GPU's name, or the CPU and its capability."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})"
