"""Run a parsed kernel: all threads of a batch of blocks at once, the lowest program counter first.

Registers are arrays with one element a thread. While every thread stands at the same instruction it runs on whole
arrays; after a divergent branch on the index set of the threads that stand lowest, so that they meet again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx import warp
from tests.ptx.alu import OPERATIONS, TYPES, Array
from tests.ptx.memory import Dense, Memory
from tests.ptx.parser import Instruction, Program, PtxError, vector

_RAW = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_ACCESS = re.compile(r"^(ld|st)\.(global|shared|shared::cta)(?:\.v([24]))?\.(b8|b16|b32|b64)$")
_ADDRESS = re.compile(r"^\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]$")
_IMMEDIATE = re.compile(r"^(-?\d+|0x[0-9a-fA-F]+)U?$")
_LIMIT = 10_000_000


class Machine:
    """One kernel over a contiguous run of blocks.

    counts: executed instructions by opcode, summed over threads (a predicated-off one counts: it was issued).
    traffic: bytes of the 32-byte sectors of global memory that the accesses touched, each access counted by itself.
    """

    def __init__(
        self, program: Program, blocks: range, threads: int, parameters: tuple[int, ...], shared: int, memory: Memory
    ) -> None:
        if len(parameters) > len(program.parameters):
            raise PtxError(f"{program.name} has {len(program.parameters)} parameters, got {len(parameters)} values")
        if threads % warp.WARP:
            raise PtxError(f"{threads} threads are not whole warps")
        self.program, self.memory, self.threads = program, memory, threads
        self.count = len(blocks) * threads
        self.registers: dict[str, Array] = {
            name: np.zeros(self.count, _RAW[width]) for name, width in program.registers.items()
        }
        self.registers["%tid.x"] = np.tile(np.arange(threads, dtype=np.uint32), len(blocks))
        self.registers["%ctaid.x"] = np.repeat(np.arange(blocks.start, blocks.stop, dtype=np.uint32), threads)
        self.parameters = {f"{program.name}_param_{i}": value for i, value in enumerate(parameters)}
        self.shared = Memory("shared", window=1 << 30, first=1 << 30)
        # One buffer a block, so that a block cannot reach into another's shared memory.
        bases = [self.shared.map(Dense(np.zeros(-(-shared // 16) * 16, np.uint8))) for _ in blocks]
        self.shared_base = np.repeat(np.array(bases, np.uint64), threads)
        self.position = np.zeros(self.count, np.int64)
        self.waiting = np.zeros(self.count, bool)
        self.counts: Counter[str] = Counter()
        self.traffic = 0

    def run(self) -> None:
        """Until every thread has returned."""
        end, steps = len(self.program.code), 0
        while True:
            ready = np.where(self.waiting, end, self.position)
            at = int(ready.min())
            if at == end:
                if self.waiting.any():
                    raise PtxError("threads wait at a barrier that the rest of their block never reaches")
                return
            active = None if int(ready.max()) == at else np.flatnonzero(ready == at)
            # Straight-line code with every thread present needs no look at the counters.
            at = self._straight(at) if active is None else self._step(at, active)
            steps += 1
            if steps > _LIMIT:
                raise PtxError("the kernel does not end")

    def _straight(self, at: int) -> int:
        """Run from `at` with all threads until one of them branches away or waits."""
        code = self.program.code
        while at < len(code) and not code[at].opcode.startswith(("bra", "ret")):
            self._execute(code[at], None)
            at += 1
        self.position[:] = at
        if at < len(code):
            self._step(at, None)
        return at

    def _step(self, at: int, active: NDArray[np.int64] | None) -> int:
        """One instruction for the threads in `active` (None: all)."""
        instruction = self.program.code[at]
        who = np.arange(self.count) if active is None else active
        if instruction.opcode in ("bra", "bra.uni"):
            taken = self._guarded(instruction, who)
            self._tally(instruction, len(who))
            self.position[who] = at + 1
            self.position[taken] = self._target(instruction)
        elif instruction.opcode == "ret":
            self._tally(instruction, len(who))
            self.position[self._guarded(instruction, who)] = len(self.program.code)
        elif instruction.opcode == "bar.sync":
            self._arrive(instruction, who, at)
        else:
            self._execute(instruction, active)
            self.position[who] = at + 1
        return at

    def _target(self, instruction: Instruction) -> int:
        label = instruction.operands[0]
        if label not in self.program.labels:
            raise PtxError(f"unknown label in: {instruction.text}")
        return self.program.labels[label]

    def _guarded(self, instruction: Instruction, who: NDArray[np.int64]) -> NDArray[np.int64]:
        if instruction.guard is None:
            return who
        name, wanted = instruction.guard
        chosen: NDArray[np.int64] = who[self.registers[name][who] == wanted]
        return chosen

    def _arrive(self, instruction: Instruction, who: NDArray[np.int64], at: int) -> None:
        """A barrier reached by part of the threads: a block goes on once all its threads are there."""
        if instruction.operands != ("0",) or instruction.guard:
            raise PtxError(f"unsupported barrier: {instruction.text}")
        self._tally(instruction, len(who))
        self.waiting[who] = True
        self.position[who] = at
        complete = self.waiting.reshape(-1, self.threads).all(1)
        released = self.waiting & np.repeat(complete, self.threads)
        if len(np.unique(self.position[released])) > 1:
            raise PtxError("threads of one block wait at different barriers")
        self.position[released] += 1
        self.waiting[released] = False

    def _tally(self, instruction: Instruction, amount: int) -> None:
        self.counts[instruction.opcode] += amount

    def _execute(self, instruction: Instruction, active: NDArray[np.int64] | None) -> None:
        """Anything but control flow; with a guard, for the threads that pass it."""
        self._tally(instruction, self.count if active is None else len(active))
        if instruction.opcode == "bar.sync":
            if instruction.operands != ("0",) or instruction.guard:
                raise PtxError(f"unsupported barrier: {instruction.text}")
            return
        if instruction.guard is not None:
            active = self._guarded(instruction, np.arange(self.count) if active is None else active)
            if not len(active):
                return
        with np.errstate(all="ignore"):
            self._handler(instruction)(instruction, active)

    def _handler(self, instruction: Instruction) -> Callable[[Instruction, Any], None]:
        opcode = instruction.opcode
        if opcode in OPERATIONS:
            return self._compute
        if _ACCESS.match(opcode):
            return self._access
        special = {
            "mov.u16": self._move, "mov.b16": self._move, "mov.u32": self._move, "mov.b32": self._move,
            "mov.u64": self._move, "mov.b64": self._move, "mov.pred": self._move,
            "ld.param.b32": self._parameter, "ld.param.b64": self._parameter, "ld.param.s32": self._parameter,
        }  # fmt: skip
        if opcode in warp.OPERATIONS:
            return lambda instruction, active: warp.OPERATIONS[opcode](self, instruction, active)
        if opcode not in special:
            raise PtxError(f"unknown opcode: {instruction.text}")
        return special[opcode]

    def read(self, operand: str, kind: str, active: NDArray[np.int64] | None) -> Array:
        """An operand as `kind`: a register's low bits, or an immediate."""
        wanted = TYPES[kind]
        if operand not in self.registers:
            return np.full(self.count if active is None else len(active), self._immediate(operand, kind))
        raw = self.registers[operand]
        raw = raw if active is None else raw[active]
        if raw.dtype == wanted:
            return raw
        bits = np.dtype(wanted).itemsize
        if raw.dtype == np.bool_ or raw.itemsize < bits:
            raise PtxError(f"{operand} is narrower than {kind}")
        return raw.astype(f"u{bits}").view(wanted)

    def _immediate(self, operand: str, kind: str) -> Any:
        wanted = np.dtype(TYPES[kind])
        if operand.startswith(("0f", "0d")):
            bits = np.array(int(operand[2:], 16), np.uint32 if operand[1] == "f" else np.uint64)
            if bits.itemsize != wanted.itemsize:
                raise PtxError(f"immediate {operand} does not fit {kind}")
            return bits.view(wanted)
        match = _IMMEDIATE.match(operand)
        if match is None or wanted.kind == "f":
            raise PtxError(f"unknown operand {operand} of type {kind}")
        value = int(match.group(1), 0)
        if wanted.kind == "b":
            return bool(value)
        return np.array(value % (1 << 8 * wanted.itemsize), f"u{wanted.itemsize}").view(wanted)

    def write(self, operand: str, value: Array, active: NDArray[np.int64] | None) -> None:
        """To a register at least as wide; a signed value is sign-extended, any other zero-extended."""
        if operand == "_":  # PTX's bit bucket
            return
        register = self.registers.get(operand)
        if register is None or operand in ("%tid.x", "%ctaid.x"):
            raise PtxError(f"cannot write to {operand}")
        if register.dtype == np.bool_ or value.dtype == np.bool_:
            if register.dtype != value.dtype:
                raise PtxError(f"{operand}: predicate and value mixed")
            raw = value
        elif value.dtype.kind == "i":
            raw = value.astype(f"i{register.itemsize}").view(register.dtype)
        else:
            raw = np.ascontiguousarray(value).view(f"u{value.itemsize}").astype(register.dtype)
        if value.itemsize > register.itemsize:
            raise PtxError(f"{operand} is too narrow for {value.dtype}")
        if active is None:
            register[:] = raw
        else:
            register[active] = raw

    def _compute(self, instruction: Instruction, active: NDArray[np.int64] | None) -> None:
        operation = OPERATIONS[instruction.opcode]
        target, *sources = instruction.operands
        if len(sources) != len(operation.operands):
            raise PtxError(f"{len(operation.operands)} sources expected: {instruction.text}")
        values = [self.read(s, kind, active) for s, kind in zip(sources, operation.operands, strict=True)]
        result = operation.compute(*values)
        if result.dtype != TYPES[operation.result]:
            raise PtxError(f"{instruction.opcode} gave {result.dtype}")
        self.write(target, result, active)

    def _move(self, instruction: Instruction, active: NDArray[np.int64] | None) -> None:
        """Copy, or pack and unpack a vector of equal parts, the first lowest."""
        kind = "pred" if instruction.opcode == "mov.pred" else "b" + instruction.opcode[5:]
        target, source = instruction.operands
        if source == "global_smem":
            return self.write(target, self._shared_offset(active), active)
        if target.startswith("{"):
            parts = vector(target)
            part = f"b{int(kind[1:]) // len(parts)}"
            values = self.read(source, kind, active)
            for i, name in enumerate(parts):
                self.write(name, (values >> values.dtype.type(i * int(part[1:]))).astype(TYPES[part]), active)
            return None
        if source.startswith("{"):
            parts = vector(source)
            part, wide = f"b{int(kind[1:]) // len(parts)}", TYPES[kind]
            packed = sum(
                self.read(name, part, active).astype(wide) << wide(i * int(part[1:])) for i, name in enumerate(parts)
            )
            return self.write(target, packed, active)
        return self.write(target, self.read(source, kind, active), active)

    def _shared_offset(self, active: NDArray[np.int64] | None) -> Array:
        return np.zeros(self.count if active is None else len(active), np.uint32)

    def _parameter(self, instruction: Instruction, active: NDArray[np.int64] | None) -> None:
        target, source = instruction.operands
        name = source.strip("[] ")
        if name not in self.parameters:
            raise PtxError(f"no value for the parameter in: {instruction.text}")
        kind = TYPES[instruction.opcode.split(".")[-1]]
        width = 8 * np.dtype(kind).itemsize
        value: Array = np.array(self.parameters[name] % (1 << width), f"u{width // 8}").view(kind)
        self.write(target, np.full(self.count if active is None else len(active), value), active)

    def addresses(self, operand: str, shared: bool, active: NDArray[np.int64] | None) -> Array:
        match = _ADDRESS.match(operand)
        if match is None:
            raise PtxError(f"unknown address {operand}")
        base, offset = match.group(1), int(match.group(2) or 0)
        if not shared:
            return self.read(base, "u64", active) + np.uint64(offset % (1 << 64))
        local = self._shared_offset(active) if base == "global_smem" else self.read(base, "u32", active)
        window = self.shared_base if active is None else self.shared_base[active]
        return window + (local + np.uint32(offset % (1 << 32))).astype(np.uint64)

    def _access(self, instruction: Instruction, active: NDArray[np.int64] | None) -> None:
        """Loads and stores; a vector must be aligned as a whole."""
        match = _ACCESS.match(instruction.opcode)
        assert match is not None
        direction, space, lanes, kind = match.groups()
        shared, width = space != "global", int(kind[1:]) // 8
        memory = self.shared if shared else self.memory
        registers, where = instruction.operands if direction == "ld" else instruction.operands[::-1]
        names = vector(registers) if registers.startswith("{") else [registers]
        if len(names) != int(lanes or 1):
            raise PtxError(f"{lanes or 1} registers expected: {instruction.text}")
        addresses = self.addresses(where, shared, active)
        if not shared:
            self.traffic += 32 * len(np.unique(addresses // np.uint64(32)))
        try:
            if np.any(addresses % np.uint64(width * len(names))):
                raise PtxError(f"{memory.name}: misaligned access of {width * len(names)} bytes")
            for i, name in enumerate(names):
                at = addresses + np.uint64(i * width)
                if direction == "ld":
                    self.write(name, memory.load(at, width), active)
                else:
                    memory.store(at, self.read(name, kind, active))
        except PtxError as error:
            raise PtxError(f"{error} in: {instruction.text}") from None
