"""Which implementation runs an operation.

`auto` follows the tensors: Triton for CUDA and ROCm tensors, the numba kernels for CPU tensors. A backend that cannot
run on the given tensors is an error; nothing falls back in silence.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor


Backend = Literal["auto", "triton", "cpu", "reference"]
Resolved = Literal["triton", "cpu", "reference"]
Operation = TypeVar("Operation", bound=Callable[..., Any])


def resolve(backend: Backend, *tensors: Tensor) -> Resolved:
    """The backend that runs on `tensors`, all of which must share one device.

    Raises ValueError, with the remedy, for an unknown backend, tensors on several devices, or a backend
    that cannot run where the tensors are.
    """
    device = _common_device(tensors)
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else "cpu"
    if backend == "triton":
        return _triton(device)
    if backend == "cpu":
        return _cpu(device)
    if backend == "reference":
        return "reference"
    raise ValueError(f"backend={backend!r} is unknown; use 'auto', 'triton', 'cpu' or 'reference'")


def implementation(resolved: Resolved, reference: Operation) -> Operation:
    """What a backend runs for an operation, given its reference `<module>.<name>_reference`: that reference, or
    `<name>` of `<backend>/<module>.py`, imported now. Raises ValueError for a backend that has none."""
    if resolved == "reference":
        return reference
    name = reference.__name__.replace("_reference", "")
    place = f"{__package__}.{resolved}.{reference.__module__.rpartition('.')[2]}"
    try:
        operation: Operation = getattr(import_module(place), name)
    except ModuleNotFoundError as error:
        if error.name != place:
            raise
        raise ValueError(f"backend={resolved!r} has no {name}; use backend='cpu' or backend='reference'") from None
    return operation


def _common_device(tensors: tuple[Tensor, ...]) -> torch.device:
    import torch

    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        names = ", ".join(sorted(str(device) for device in devices))
        raise ValueError(f"tensors lie on several devices ({names}); move them to one with .to(device)")
    return devices.pop() if devices else torch.device("cpu")


def _triton(device: torch.device) -> Resolved:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' needs CUDA or ROCm tensors, got {device}; move them there, use "
            "backend='auto', or set TRITON_INTERPRET=1 before the import to interpret the kernels on the CPU"
        )
    if find_spec("triton") is None:
        raise ValueError("backend='triton' needs the package triton (pip install triton); or use backend='reference'")
    return "triton"


def _cpu(device: torch.device) -> Resolved:
    if device.type != "cpu":
        raise ValueError(
            f"backend='cpu' needs CPU tensors, got {device}; move them with .cpu(), or use backend='auto' on CUDA and "
            "ROCm and backend='reference' on other devices"
        )
    if find_spec("numba") is None:
        raise ValueError("backend='cpu' needs the package numba (pip install numba); or use backend='reference'")
    return "cpu"
