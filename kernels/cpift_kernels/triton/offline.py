"""Compile a kernel exactly as a launch would, on a machine without its GPU.

`record` runs a launcher with the launches themselves held back; `compile_launch` compiles one of them for a target,
with the types and alignments that Triton would specialise on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import common

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_POINTERS = {
    torch.int16: "*i16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One held-back launch, its arguments by the kernel's own names."""

    kernel: Any
    programs: int
    threads: int
    arguments: dict[str, Any]
    registers: int | None = None


def record(action: Callable[[], object]) -> list[Launch]:
    """The launches that `action` makes; none of them runs, so what they would have written stays as it was."""
    launches: list[Launch] = []
    with patch.object(common, "launch", lambda *args, **options: launches.append(describe(*args, **options))):
        action()
    return launches


def describe(
    kernel: Any, programs: int, device: torch.device, *args: Any, threads: int, registers: int | None = None,
    **options: Any,
) -> Launch:  # fmt: skip
    """The `Launch` that `common.launch` would make of the same arguments."""
    del device
    arguments = dict(zip(kernel.arg_names, args, strict=False)) | options
    return Launch(kernel, programs, threads, {name: arguments[name] for name in kernel.arg_names}, registers)


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """The compiled kernel of `launch` for `target`."""
    signature: dict[str, Any] = {}
    values: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, (parameter, argument) in enumerate(zip(launch.kernel.params, launch.arguments.values(), strict=True)):
        if parameter.is_constexpr:
            signature[parameter.name], values[(i,)] = "constexpr", argument
        elif parameter.do_not_specialize:
            signature[parameter.name] = _type(argument)
        else:
            signature[parameter.name] = _specialise(argument, (i,), values, aligned)
            if parameter.do_not_specialize_on_alignment:
                aligned.pop((i,), None)
    source = ASTSource(launch.kernel, signature, constexprs=values, attrs=aligned)
    options = {"num_warps": launch.threads // target.warp_size, **common.FUSED}
    if launch.registers and target.backend == "cuda":
        options["maxnreg"] = launch.registers
    return triton.compile(source, target=target, options=options)


def _specialise(argument: Any, path: tuple[int, ...], values: dict[Any, Any], aligned: dict[Any, Any]) -> Any:
    """Triton's type of a run-time argument; notes constants and alignment the way its launcher does."""
    if isinstance(argument, tuple):
        return tuple(_specialise(item, (*path, i), values, aligned) for i, item in enumerate(argument))
    if argument is None or (isinstance(argument, int) and argument == 1):
        values[path] = argument
        return "constexpr"
    if (argument.data_ptr() if isinstance(argument, Tensor) else argument) % 16 == 0:
        aligned[path] = [["tt.divisibility", 16]]
    return _type(argument)


def _type(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return _POINTERS[argument.dtype]
    return "i32" if -(2**31) <= argument < 2**31 else "i64"
