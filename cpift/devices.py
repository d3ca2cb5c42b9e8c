"""Which device a process computes on, and whether bf16 is native there.

A GPU only where one is this process's to use: in a task, an actor or a Train worker of Ray those that Ray assigned to
it, elsewhere as many as the config asks for. Ray leaves the other GPUs of a machine visible, so nothing but this module
asks torch whether there are any.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Literal

from cpift.config.inputs import Precision
from cpift.errors import CpiftError, entry

if TYPE_CHECKING:
    import torch

Device = Literal["cpu", "cuda"]
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_assigned: int | None = None  # by Ray; None where this process is no worker of Ray's


def assign_gpus(count: int) -> None:
    """This process is a worker to which Ray assigned so many GPUs. With none, all are hidden from what it imports too:
    saving random states alone would open every GPU that torch sees."""
    import torch

    global _assigned
    _assigned = count
    if count == 0 and not torch.cuda.is_initialized():
        os.environ.update(dict.fromkeys(_VISIBLE, ""))


def compute_device(asked: float) -> Device:
    """What this process computes on. asked: GPUs that the config gives it, which counts outside Ray's workers.

    Raises CpiftError where a GPU is due and torch has none.
    """
    import torch

    if not (asked if _assigned is None else _assigned):
        return "cpu"
    if not torch.cuda.is_available():
        raise CpiftError(
            f"resources.gpus_per_worker {asked:g}: torch {torch.__version__} sees no GPU in this process → install a "
            "torch built for this GPU and its driver, or set resources.gpus_per_worker: 0"
        )
    return "cuda"


def assigned_gpus() -> int | None:
    """GPUs that Ray assigned to this process; None where it is no worker of Ray's."""
    return _assigned


def current_gpu() -> torch.device:
    """The GPU that torch uses in this process where none is named. Raises CpiftError where it sees none."""
    import torch

    if not torch.cuda.is_available():
        remedy = "use `cpu`, or install a torch built for this GPU and its driver"
        raise CpiftError(f"resources.device: is `cuda`, and torch {torch.__version__} sees no GPU here → {remedy}")
    return torch.device("cuda", torch.cuda.current_device())


def own_gpus() -> list[torch.device]:
    """Every GPU of a worker of Ray that has some; of any other process the one that it computes on."""
    import torch

    if not assigned_gpus():
        return [current_gpu()]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def free_on(gpu: torch.device) -> int:
    """Bytes of its memory that nobody holds."""
    import torch

    free: int = torch.cuda.mem_get_info(gpu)[0]
    return free


def all_on(gpu: torch.device) -> int:
    """Bytes of its memory, whoever holds them."""
    import torch

    there: int = torch.cuda.mem_get_info(gpu)[1]
    return there


def visible_gpus() -> int:
    """GPUs of this machine that torch could use."""
    if not _has_driver():
        return 0
    import torch

    return torch.cuda.device_count()


def _has_driver() -> bool:
    """Whether a GPU's driver is installed, which torch would find no GPU without: most plans are made where none is,
    and need not wait for torch."""
    if sys.platform != "linux" or "torch" in sys.modules or Path("/dev/kfd").exists():  # the last is AMD's
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def resolved(precision: Precision, device: Device) -> Precision:
    """What products are computed in: as asked for, and for `auto` bfloat16 where that is native, else float32."""
    return entry(PRECISIONS, precision, "precision")(device)


def native_bf16(device: Device) -> bool:
    """Whether bf16 matrix products run in hardware: bf16 autocast is faster than float32 then, and far slower else."""
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


# `precision` → what a kind of device computes products in
PRECISIONS: dict[str, Callable[[Device], Precision]] = {
    "auto": lambda device: "bfloat16" if native_bf16(device) else "float32",
    "bfloat16": lambda device: "bfloat16",
    "float32": lambda device: "float32",
}

# `gather` → whether FSDP2 gathers weights as bfloat16, on a kind of device that computes products in a precision
GATHERS: dict[str, Callable[[Device, Precision], bool]] = {
    "auto": lambda device, products: (device, products) == ("cuda", "bfloat16"),
    "bfloat16": lambda device, products: True,
    "float32": lambda device, products: False,
}


def device_name(device: Device = "cpu") -> str:
    """For manifests: the GPU's name, or the CPU and its capability."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})"


# For mallopt of glibc's <malloc.h>. M_MMAP_MAX: no block gets pages of its own. M_TRIM_THRESHOLD: what is free at the
# top of the heap stays.
_REUSING = ((-4, 0), (-1, 2**31 - 1))
# As glibc has it, with M_MMAP_THRESHOLD where its own rule ends, which no longer works once a value was set.
_AS_BEFORE = ((-4, 65_536), (-3, 32 << 20), (-1, 64 << 20))
_inside = 0  # how many are inside `reusing_memory`
_counting = Lock()


@contextmanager
def reusing_memory(device: Device = "cpu") -> Iterator[None]:
    """Inside, tensors are made where others were freed: of a model of a few hundred million parameters a fifth of a
    training step on a CPU is new pages otherwise, and half of a merge that makes several tensors for each slice.

    Of glibc alone, and for a CPU: torch itself keeps the memory of a GPU. At the end free memory is given back, and
    large blocks have pages of their own again: in a heap of blocks of any size, one that stays holds all addresses
    below it, and Linux refuses to fork a process of which one mapping is larger than the machine's memory, however
    little of it is in use.
    """
    if device != "cpu":
        yield
        return
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)
        _trim()


def _enter(step: int) -> None:
    global _inside
    with _counting:
        was, _inside = _inside, _inside + step
        if 0 in (was, _inside) and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
            for parameter, value in _REUSING if _inside else _AS_BEFORE:
                mallopt(parameter, value)


def free_memory() -> None:
    """Give back what torch keeps of GPU memory for its next tensors, and the C library of the machine's."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    _trim()


def _trim() -> None:
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
