"""Reading and writing 32 elements whose storage type is fixed, or told by a number at run time.

A number names a storage type as `segments.storage_kind` does: 0 bf16, 1 fp16, 2 fp32. Code compiled for a fixed type is
faster; the marker MIXED in its place compiles code that looks at the number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from .emit import BF16, FP16, FP32
from .vector import load, load_one, load_some, store, store_some, width

MIXED = np.uint8(0)
WHOLE = 0xFFFFFFFF  # all 32 elements


@njit
def load_kind(kind, address, first):  # type: ignore[no-untyped-def]
    """`load` of elements first..first+31 where the storage type is a number: 0 bf16, 1 fp16, 2 fp32."""
    if kind == 0:
        return load(BF16, address + 2 * first)
    if kind == 1:
        return load(FP16, address + 2 * first)
    return load(FP32, address + 4 * first)


@njit
def load_some_kind(kind, address, first, bits):  # type: ignore[no-untyped-def]
    """`load_some` where the storage type is a number."""
    if kind == 0:
        return load_some(BF16, address + 2 * first, bits)
    if kind == 1:
        return load_some(FP16, address + 2 * first, bits)
    return load_some(FP32, address + 4 * first, bits)


@njit
def load_one_kind(kind, address, index):  # type: ignore[no-untyped-def]
    """`load_one` of element `index` where the storage type is a number."""
    if kind == 0:
        return load_one(BF16, address + 2 * index)
    if kind == 1:
        return load_one(FP16, address + 2 * index)
    return load_one(FP32, address + 4 * index)


@njit
def store_kind(kind, address, first, values):  # type: ignore[no-untyped-def]
    """`store` from element `first` on where the storage type is a number."""
    if kind == 0:
        store(BF16, address + 2 * first, values)
    elif kind == 1:
        store(FP16, address + 2 * first, values)
    else:
        store(FP32, address + 4 * first, values)


@njit
def store_some_kind(kind, address, first, values, bits):  # type: ignore[no-untyped-def]
    """`store_some` from element `first` on where the storage type is a number."""
    if kind == 0:
        store_some(BF16, address + 2 * first, values, bits)
    elif kind == 1:
        store_some(FP16, address + 2 * first, values, bits)
    else:
        store_some(FP32, address + 4 * first, values, bits)


def read(storage: Any, kind: Any, address: int, first: int, bits: Any) -> Any:
    """32 elements from `first` on, 0 where a bit is clear; storage MIXED looks at the number `kind`."""


def write(storage: Any, kind: Any, address: int, first: int, values: Any, bits: Any) -> None:
    """Write the elements whose bit is set; storage MIXED looks at the number `kind`."""


@overload(read, inline="always")
def _read(storage, kind, address, first, bits):  # type: ignore[no-untyped-def]
    if storage == types.uint8:

        def mixed(storage, kind, address, first, bits):  # type: ignore[no-untyped-def]
            if bits == WHOLE:
                return load_kind(kind, address, first)
            return load_some_kind(kind, address, first, bits)

        return mixed

    def fixed(storage, kind, address, first, bits):  # type: ignore[no-untyped-def]
        if bits == WHOLE:
            return load(storage, address + width(storage) * first)
        return load_some(storage, address + width(storage) * first, bits)

    return fixed


@overload(write, inline="always")
def _write(storage, kind, address, first, values, bits):  # type: ignore[no-untyped-def]
    if storage == types.uint8:

        def mixed(storage, kind, address, first, values, bits):  # type: ignore[no-untyped-def]
            if bits == WHOLE:
                store_kind(kind, address, first, values)
            else:
                store_some_kind(kind, address, first, values, bits)

        return mixed

    def fixed(storage, kind, address, first, values, bits):  # type: ignore[no-untyped-def]
        if bits == WHOLE:
            store(storage, address + width(storage) * first, values)
        else:
            store_some(storage, address + width(storage) * first, values, bits)

    return fixed
