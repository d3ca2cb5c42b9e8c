"""What the whitelisted opcodes without memory or control flow compute, on arrays with one element a thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
TYPES: dict[str, type] = {
    **{f"u{w}": np.dtype(f"u{w // 8}").type for w in (8, 16, 32, 64)},
    **{f"s{w}": np.dtype(f"i{w // 8}").type for w in (8, 16, 32, 64)},
    **{f"b{w}": np.dtype(f"u{w // 8}").type for w in (8, 16, 32, 64)},
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "pred": np.bool_,
}


@dataclass(frozen=True)
class Operation:
    """Operand types, result type, and the function between them."""

    result: str
    operands: tuple[str, ...]
    compute: Callable[..., Array]


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a·b + c rounded once: exact product in fp64, sum rounded to odd there, then to nearest in fp32."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), np.asarray(c).astype(np.float64)
    total, error = _two_sum(product, addend)
    bits = np.ascontiguousarray(total).view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    return np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64).astype(np.float32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a·b + c in fp64 with the product's rounding error added back: at most the last bit off."""
    scaled = a * 134217729.0, b * 134217729.0
    high = scaled[0] - (scaled[0] - a), scaled[1] - (scaled[1] - b)
    low = a - high[0], b - high[1]
    product = a * b
    error = ((high[0] * high[1] - product) + high[0] * low[1] + low[0] * high[1]) + low[0] * low[1]
    total, rest = _two_sum(product, c)
    return np.where(np.isfinite(total + error), total + (rest + error), a * b + c)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def _shift(function: Callable[[Array, Array], Array], bits: int, signed: bool) -> Callable[[Array, Array], Array]:
    """PTX shifts clamp at the width; numpy's are undefined beyond it."""

    def compute(value: Array, amount: Array) -> Array:
        kind = value.dtype.type
        shifted = function(value, np.minimum(amount, bits - 1).astype(kind))
        return shifted if signed else np.where(amount < bits, shifted, kind(0))

    return compute


_BYTE_COUNTS = np.array([bin(byte).count("1") for byte in range(256)], np.uint32)


def _popcount(value: Array) -> Array:
    counts: Array = _BYTE_COUNTS[np.ascontiguousarray(value).view(np.uint8)].reshape(-1, 4).sum(1, dtype=np.uint32)
    return counts


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four bytes picked from the eight of {b, a}; sign replication is refused."""
    if np.any(selector & 0x8888):
        raise NotImplementedError("prmt with sign replication")
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    picked = np.zeros_like(a)
    for i in range(4):
        source = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(7)
        picked |= (((both >> (source * np.uint64(8))) & np.uint64(0xFF)) << np.uint64(8 * i)).astype(np.uint32)
    return picked


def _extract(signed: bool) -> Callable[[Array, Array, Array], Array]:
    def compute(value: Array, position: Array, length: Array) -> Array:
        wide = value.astype(np.int64 if signed else np.uint64)
        kind = wide.dtype.type
        up = kind(64) - position.astype(kind) - length.astype(kind)
        return (wide << up >> (kind(64) - length.astype(kind))).astype(value.dtype)

    return compute


def _pairwise(function: Callable[..., Array]) -> Callable[..., Array]:
    """A function on fp32 applied to both halves of 64-bit operands."""

    def compute(*operands: Array) -> Array:
        halves = [np.ascontiguousarray(x).view(np.float32).reshape(-1, 2) for x in np.broadcast_arrays(*operands)]
        return function(*(h.reshape(-1) for h in halves)).view(np.uint64)

    return compute


def _pack_halves(high: Array, low: Array) -> Array:
    bits = [x.astype(np.float16).view(np.uint16).astype(np.uint32) for x in (high, low)]
    return bits[1] | (bits[0] << np.uint32(16))


def _as(kind: str) -> Callable[[Array], Array]:
    return lambda value: value.astype(TYPES[kind])


def _wide(kind: type) -> Callable[..., Array]:
    def compute(a: Array, b: Array, c: Array | None = None) -> Array:
        product: Array = a.astype(kind) * b.astype(kind)
        return product if c is None else product + c

    return compute


def _high(kind: type, wide: type) -> Callable[[Array, Array], Array]:
    return lambda a, b: (a.astype(wide) * b.astype(wide) >> wide(32)).astype(kind)


def _comparisons() -> dict[str, Operation]:
    tests = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    table = {}
    for name, test in tests.items():
        for kind in ("s16", "s32", "s64", "u16", "u32", "u64", "f32", "f64"):
            # An ordered float comparison with NaN is false; numpy's `!=` is true, PTX's `ne` is false.
            ordered = _ordered(test) if kind[0] == "f" and name == "ne" else test
            table[f"setp.{name}.{kind}"] = Operation("pred", (kind, kind), ordered)
            if kind[0] == "f":
                table[f"setp.{name}u.{kind}"] = Operation("pred", (kind, kind), _unordered(test))
        if name in ("eq", "ne"):
            for kind in ("b16", "b32", "b64"):
                table[f"setp.{name}.{kind}"] = Operation("pred", (kind, kind), test)
    for kind in ("f32", "f64"):
        table[f"setp.nan.{kind}"] = Operation("pred", (kind, kind), lambda a, b: np.isnan(a) | np.isnan(b))
        table[f"setp.num.{kind}"] = Operation("pred", (kind, kind), lambda a, b: ~(np.isnan(a) | np.isnan(b)))
    return table


def _ordered(test: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: test(a, b) & ~(np.isnan(a) | np.isnan(b))


def _unordered(test: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: test(a, b) | np.isnan(a) | np.isnan(b)


def _integers() -> dict[str, Operation]:
    table = {}
    for kind in ("s16", "s32", "s64", "u16", "u32", "u64"):
        bits = int(kind[1:])
        for name, function in (
            ("add", np.add),
            ("sub", np.subtract),
            ("mul.lo", np.multiply),
            ("max", np.maximum),
            ("min", np.minimum),
        ):
            table[f"{name}.{kind}"] = Operation(kind, (kind, kind), function)
        table[f"mad.lo.{kind}"] = Operation(kind, (kind,) * 3, lambda a, b, c: a * b + c)
        table[f"shr.{kind}"] = Operation(kind, (kind, "u32"), _shift(np.right_shift, bits, kind[0] == "s"))
        if kind[0] == "s":
            table[f"neg.{kind}"] = Operation(kind, (kind,), np.negative)
    table["rem.s32"] = Operation("s32", ("s32", "s32"), lambda a, b: np.fmod(a, b))  # with the sign of a
    table["div.s32"] = Operation("s32", ("s32", "s32"), lambda a, b: (a.astype(np.int64) / b).astype(np.int32))
    for kind, wide in (("s32", "s64"), ("u32", "u64")):
        table[f"mul.hi.{kind}"] = Operation(kind, (kind, kind), _high(TYPES[kind], TYPES[wide]))
        table[f"mul.wide.{kind}"] = Operation(wide, (kind, kind), _wide(TYPES[wide]))
        table[f"mad.wide.{kind}"] = Operation(wide, (kind, kind, wide), _wide(TYPES[wide]))
    for kind in ("b16", "b32", "b64", "pred"):
        for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
            table[f"{name}.{kind}"] = Operation(kind, (kind, kind), function)
        table[f"not.{kind}"] = Operation(kind, (kind,), np.invert)
        if kind != "pred":
            table[f"shl.{kind}"] = Operation(kind, (kind, "u32"), _shift(np.left_shift, int(kind[1:]), False))
    table["popc.b32"] = Operation("u32", ("b32",), _popcount)
    table["prmt.b32"] = Operation("b32", ("b32", "b32", "b32"), _permute)
    table["bfe.u32"] = Operation("u32", ("u32", "u32", "u32"), _extract(False))
    table["bfe.s32"] = Operation("s32", ("s32", "u32", "u32"), _extract(True))
    return table


def _floats() -> dict[str, Operation]:
    table = {}
    for kind in ("f32", "f64"):
        for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
            table[f"{name}.{kind}"] = Operation(kind, (kind, kind), function)
        table[f"abs.{kind}"] = Operation(kind, (kind,), np.abs)
        table[f"neg.{kind}"] = Operation(kind, (kind,), np.negative)
    table["fma.rn.f32"] = Operation("f32", ("f32",) * 3, fma32)
    table["fma.rn.f64"] = Operation("f64", ("f64",) * 3, fma64)
    table["div.full.f32"] = Operation("f32", ("f32", "f32"), np.divide)
    for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        table[f"{name}.f32x2"] = Operation("b64", ("b64", "b64"), _pairwise(function))
    table["fma.rn.f32x2"] = Operation("b64", ("b64",) * 3, _pairwise(fma32))
    # Blackwell's mixed precision: an fp16 minuend, widened exactly.
    table["sub.rn.f32.f16"] = Operation("f32", ("f16", "f32"), lambda a, c: a.astype(np.float32) - c)
    return table


def _conversions() -> dict[str, Operation]:
    table = {}
    pairs = [
        "u32.u16",
        "s32.s16",
        "u64.u32",
        "s64.s32",
        "u16.u32",
        "u16.u64",
        "u32.u64",
        "s16.s8",
        "s32.s8",
        "u32.u8",
        "s64.s16",
        "u64.u16",
        "s32.s64",
    ]
    pairs += ["f32.f16", "f64.f16", "f64.f32", "rn.f16.f32", "rn.f32.f64"]
    for pair in pairs:
        to, source = pair.split(".")[-2:]
        table[f"cvt.{pair}"] = Operation(to, (source,), _as(to))
    table["cvt.rn.f16x2.f32"] = Operation("b32", ("f32", "f32"), _pack_halves)
    return table


def _selections() -> dict[str, Operation]:
    kinds = ("b16", "b32", "b64", "f32", "f64")
    return {
        f"selp.{kind}": Operation(kind, (kind, kind, "pred"), lambda a, b, chosen: np.where(chosen, a, b))
        for kind in kinds
    }


OPERATIONS = {**_integers(), **_floats(), **_comparisons(), **_conversions(), **_selections()}
