"""A stand-in for `common.launch`: compile the launch for a GPU target and interpret its PTX over CPU tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from cpift_kernels.triton import common
from cpift_kernels.triton.held import HeldOnGpu
from cpift_kernels.triton.offline import TARGETS, Launch, compile_launch, describe
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.ptx.machine import Machine
from tests.ptx.memory import Buffer, Dense, Memory
from tests.ptx.parser import Program, parse

THREADS_AT_ONCE = 1 << 14
_reachable: dict[int, NDArray[np.uint8]] = {}


@cache
def _parsed(ptx: str) -> Program:
    return parse(ptx)


@dataclass
class Execution:
    """What a launch cost: instructions by opcode summed over threads, and bytes of touched 32-byte sectors."""

    counts: Counter[str]
    traffic: int


def run_launch(launch: Launch, target: str, buffers: dict[int, Buffer] | None = None) -> Execution:
    """Execute one launch. A tensor argument is mapped with its whole storage; `buffers` replaces the storage that
    starts at a data pointer.
    """
    compiled = compile_launch(launch, TARGETS[target])
    return run_ptx(compiled.asm["ptx"], compiled.metadata.shared, launch, buffers)


def run_ptx(ptx: str, shared: int, launch: Launch, buffers: dict[int, Buffer] | None = None) -> Execution:
    """`run_launch` of a given text."""
    program, memory = _parsed(ptx), Memory("global")
    for start, data in _reachable.items():
        memory.map(Dense(data), at=start)
    bases: dict[int, int] = {}
    values = tuple(_value(argument, memory, bases, buffers or {}) for argument in _passed(launch))
    batch = max(THREADS_AT_ONCE // launch.threads, 1)
    done = Execution(Counter(), 0)
    for start in range(0, launch.programs, batch):
        blocks = range(start, min(start + batch, launch.programs))
        machine = Machine(program, blocks, launch.threads, values, shared, memory)
        machine.run()
        done.counts += machine.counts
        done.traffic += machine.traffic
    return done


def _passed(launch: Launch) -> Iterator[Tensor | int]:
    """The arguments that reach the kernel: tuples flat, constants and values that Triton specialises away left out."""
    for parameter, argument in zip(launch.kernel.params, launch.arguments.values(), strict=True):
        if not parameter.is_constexpr:
            for item in argument if isinstance(argument, tuple) else (argument,):
                one = isinstance(item, int) and item == 1 and not parameter.do_not_specialize
                if item is not None and not one:
                    yield item


def _value(argument: Tensor | int, memory: Memory, bases: dict[int, int], buffers: dict[int, Buffer]) -> int:
    if isinstance(argument, int):
        return argument
    storage = argument.untyped_storage()
    start = storage.data_ptr()
    if start not in bases:
        bases[start] = memory.map(buffers.get(start) or Dense(_bytes_of(argument)))
    return bases[start] + argument.data_ptr() - start


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """The whole storage."""
    with _disable_current_modes():  # of no account to a test that watches torch's operations
        data: NDArray[np.uint8] = torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    return data


@contextmanager
def reachable(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Within it kernels may also reach these tensors by the addresses that they have in this process."""
    added = {tensor.untyped_storage().data_ptr(): _bytes_of(tensor) for tensor in tensors if tensor.numel()}
    with patch.dict(_reachable, added):
        yield


@contextmanager
def interpreted_ptx(target: str) -> Iterator[None]:
    """Within it every launch of the package runs here, as compiled for `target`."""

    def launch(*args: Any, **options: Any) -> None:
        described = describe(*args, **options)
        if described.programs:
            run_launch(described, target)

    move = HeldOnGpu._move

    def reaching(held: HeldOnGpu, values: Sequence[Tensor], *args: Any, **options: Any) -> None:
        with reachable([*values, *held._words]):
            move(held, values, *args, **options)

    with patch.object(common, "launch", launch), patch.object(HeldOnGpu, "_move", reaching):
        yield
