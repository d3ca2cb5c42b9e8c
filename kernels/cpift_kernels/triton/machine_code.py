"""Read what the compiler made of a kernel: registers, spills, shared memory and the width of every memory access.

NVIDIA: the machine code itself, through the tools of Triton's own wheel (a system toolkit may be too old for its
PTX). AMD: the assembly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SASS = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
_AMD_ACCESS = re.compile(r"^\s+(?:global|buffer)_(load|store)_(\w+)", re.M)
_AMD_BITS = {
    "dwordx4": 128,
    "dwordx3": 96,
    "dwordx2": 64,
    "dword": 32,
    "ushort": 16,
    "short": 16,
    "ubyte": 8,
    "byte": 8,
}


@dataclass(frozen=True)
class MachineCode:
    """Resources of one compiled kernel.

    registers: per thread (vector registers on AMD); spilled: stack bytes, or spilled vector registers on AMD;
    scalar_spilled: scalar registers that AMD moved to vector lanes; shared: bytes a block; loads, stores: static
    count of global accesses by width in bits; instructions: static count.
    """

    registers: int
    spilled: int
    scalar_spilled: int
    shared: int
    loads: Counter[int]
    stores: Counter[int]
    instructions: int


def read_machine_code(compiled: Any, target: GPUTarget) -> MachineCode:
    """The resources of what `compile_launch` returned for `target`."""
    if target.backend == "hip":
        return _read_amd(compiled.asm["amdgcn"])
    return _read_nvidia(compiled.asm["cubin"])


def _read_nvidia(cubin: bytes) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", file)
        opcodes = [opcode.split(".") for opcode in _SASS.findall(_tool("nvdisasm", "-c", file))]
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    local = sum(opcode[0] in ("STL", "LDL") for opcode in opcodes)
    return MachineCode(
        registers=found["REG"],
        spilled=found["STACK"] or local,
        scalar_spilled=0,
        shared=found["SHARED"],
        loads=Counter(_sass_bits(opcode) for opcode in opcodes if opcode[0] == "LDG"),
        stores=Counter(_sass_bits(opcode) for opcode in opcodes if opcode[0] == "STG"),
        instructions=sum(opcode[0] != "NOP" for opcode in opcodes),
    )


def _tool(name: str, *arguments: object) -> str:
    command = [str(_TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout


def _sass_bits(opcode: list[str]) -> int:
    widths = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return next((widths[part] for part in opcode[1:] if part in widths), 32)


def _read_amd(assembly: str) -> MachineCode:
    found = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.M)}
    accesses = _AMD_ACCESS.findall(assembly)
    return MachineCode(
        registers=found["vgpr_count"],
        spilled=found["vgpr_spill_count"] + found["private_segment_fixed_size"],
        scalar_spilled=found["sgpr_spill_count"],
        shared=found["group_segment_fixed_size"],
        loads=Counter(_amd_bits(name) for kind, name in accesses if kind == "load"),
        stores=Counter(_amd_bits(name) for kind, name in accesses if kind == "store"),
        instructions=len(re.findall(r"^\s+(?:[vs]|ds|global|buffer)_\w+", assembly, re.M)),
    )


def _amd_bits(name: str) -> int:
    return _AMD_BITS[name.removesuffix("_hi").removesuffix("_d16")]
