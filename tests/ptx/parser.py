"""PTX text to a list of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass


class PtxError(Exception):
    """PTX that the interpreter does not know, or a kernel that misbehaves."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: `guard` is (predicate register, wanted value); `text` serves messages."""

    opcode: str
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None
    text: str


@dataclass(frozen=True)
class Program:
    """One kernel: parameter sizes in bytes, register widths in bits (1: predicate), code and labels."""

    name: str
    parameters: tuple[int, ...]
    registers: dict[str, int]
    code: tuple[Instruction, ...]
    labels: dict[str, int]


_DIRECTIVE = re.compile(r"^\s*\.(loc|pragma)\b")
_REGISTERS = re.compile(r"^\s*\.reg\s+\.(pred|b16|b32|b64)\s+%(\w+)<(\d+)>;")
_LABEL = re.compile(r"^\s*([$\w.]+):\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:@(!?)%(\w+)\s+)?([a-z][\w.:]*)(?:\s+(.*?))?\s*;\s*$")
_WIDTHS = {"pred": 1, "b16": 16, "b32": 32, "b64": 64}


def parse(ptx: str) -> Program:
    """The only kernel in `ptx`."""
    head, body = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", ptx, re.S), re.search(r"^\{(.*?)^\}", ptx, re.S | re.M)
    if head is None or body is None:
        raise PtxError("no kernel entry")
    sizes = tuple(int(bits) // 8 for bits in re.findall(r"\.param\s+\.[a-z](\d+)", head.group(2)))
    registers: dict[str, int] = {}
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for raw in body.group(1).splitlines():
        line = raw.split("//")[0].rstrip()
        if not line.strip() or _DIRECTIVE.match(line):
            continue
        if declared := _REGISTERS.match(line):
            width, prefix, count = declared.groups()
            registers |= {f"%{prefix}{i}": _WIDTHS[width] for i in range(int(count))}
        elif label := _LABEL.match(line):
            labels[label.group(1)] = len(code)
        elif match := _INSTRUCTION.match(line):
            negated, guard, opcode, operands = match.groups()
            code.append(
                Instruction(opcode, _split(operands or ""), (f"%{guard}", not negated) if guard else None, line.strip())
            )
        else:
            raise PtxError(f"cannot parse: {line.strip()}")
    if not code or code[-1].opcode not in ("ret", "bra.uni"):
        raise PtxError(f"{head.group(1)} does not end in a return")
    return Program(head.group(1), sizes, registers, tuple(code), labels)


def _split(operands: str) -> tuple[str, ...]:
    """Comma-separated operands; a {vector} is one of them."""
    return tuple(part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands))


def vector(operand: str) -> list[str]:
    """The registers of a vector operand, `{%r1, %r2}`."""
    return [name.strip() for name in operand.strip("{} ").split(",")]
