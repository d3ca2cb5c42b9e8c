"""What the threads of a warp do together: shuffles, reductions and 8x8 matrices of 16-bit values in shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tests.ptx.alu import Array
from tests.ptx.parser import Instruction, PtxError, vector

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

WARP = 32
Active = NDArray[np.int64] | None


def _lanes(machine: Machine, instruction: Instruction, active: Active, mask: str | None) -> Array:
    """The acting threads as [warps, 32]; a warp must act as a whole."""
    who = np.arange(machine.count) if active is None else active
    if len(who) % WARP or np.any(who.reshape(-1, WARP) % WARP != np.arange(WARP)):
        raise PtxError(f"a warp acts in part: {instruction.text}")
    if mask is not None and np.any(machine.read(mask, "b32", active) != 0xFFFFFFFF):
        raise PtxError(f"a partial member mask: {instruction.text}")
    return who.reshape(-1, WARP)


def shuffle(machine: Machine, instruction: Instruction, active: Active) -> None:
    target, source, distance, clamp, mask = instruction.operands
    up = ".up." in instruction.opcode
    if clamp != ("0" if up else "31"):
        raise PtxError(f"a segmented shuffle: {instruction.text}")
    shape = _lanes(machine, instruction, active, mask).shape
    lane = np.arange(WARP)
    if ".idx." in instruction.opcode:  # each lane names the one it reads
        chosen = machine.read(distance, "b32", active).reshape(shape).astype(np.int64) % WARP
    else:
        step = int(distance)
        chosen = np.broadcast_to(np.where(lane >= step, lane - step, lane) if up else lane ^ step, shape)
    values = np.take_along_axis(machine.read(source, "b32", active).reshape(shape), chosen, 1)
    machine.write(target, values.reshape(-1), active)


def reduce(machine: Machine, instruction: Instruction, active: Active) -> None:
    target, source, mask = instruction.operands
    shape = _lanes(machine, instruction, active, mask).shape
    values = machine.read(source, "s32", active).reshape(shape)
    whole = values.sum(1, dtype=np.int32) if ".add." in instruction.opcode else values.max(1)
    machine.write(target, np.repeat(whole, WARP), active)


def matrix(machine: Machine, instruction: Instruction, active: Active) -> None:
    """8x8 matrices of 16-bit values: lane 8m + i addresses row i of matrix m, each lane holds two of each."""
    load, transposed = instruction.opcode.startswith("ld"), ".trans." in instruction.opcode
    registers, where = instruction.operands if load else instruction.operands[::-1]
    names = vector(registers)
    warps = _lanes(machine, instruction, active, None)
    rows = machine.addresses(where, True, active)
    if np.any(rows % np.uint64(16)):
        raise PtxError(f"shared: misaligned matrix row in: {instruction.text}")
    rows = rows.reshape(-1, 4, 8)
    lane = np.arange(WARP)
    for m, name in enumerate(names):
        pairs = []
        for half in range(2):
            row, column = lane // 4, 2 * (lane % 4) + half
            if transposed:
                row, column = column, row
            at = (rows[:, m, row] + (2 * column).astype(np.uint64)).reshape(-1)
            if load:
                pairs.append(machine.shared.load(at, 2).astype(np.uint32) << np.uint32(16 * half))
            else:
                bits = machine.read(name, "b32", active) >> np.uint32(16 * half)
                machine.shared.store(at, bits.astype(np.uint16))
        if load:
            machine.write(name, (pairs[0] | pairs[1]).reshape(warps.size), active)


_MATRIX = ("ldmatrix", "stmatrix")
OPERATIONS: dict[str, Callable[[Machine, Instruction, Active], None]] = {
    "shfl.sync.bfly.b32": shuffle,
    "shfl.sync.idx.b32": shuffle,
    "shfl.sync.up.b32": shuffle,
    "redux.sync.add.s32": reduce,
    "redux.sync.max.s32": reduce,
    **{
        f"{name}.sync.aligned.m8n8.x{count}{trans}.shared.b16": matrix
        for name in _MATRIX
        for count in (1, 2, 4)
        for trans in ("", ".trans")
    },
}
