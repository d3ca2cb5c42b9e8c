"""Every kernel of this package as it is launched on a large tensor: what the gates and the compile report go through.

`bytes_moved` is what the hot launch moves per parameter, `bytes_needed` the least that its inputs and outputs allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import apply, freeze, gram, overlap, selection
from .bracket import NOTHING, Bracket
from .common import elements
from .offline import Launch, record

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZE = 1 << 16  # elements of the stand-in tensors: whole blocks of every kernel
CORE = 0.1  # share of core elements that the data-dependent kernels are priced at


@dataclass(frozen=True)
class Entry:
    """One kernel at one dtype and number of tasks, with the launch that covers whole blocks.

    elements: parameters that one program covers; vectorised: whether it streams model tensors or masks, so that all
    wide accesses must be 128 bits.
    """

    name: str
    dtype: str
    tasks: int
    launch: Launch
    elements: int
    bytes_moved: float
    bytes_needed: float
    vectorised: bool = True


@dataclass(frozen=True)
class _Inputs:
    origin: Tensor
    tuned: list[Tensor]
    masks: list[Tensor]

    @staticmethod
    def make(dtype: torch.dtype, tasks: int) -> _Inputs:
        words = [torch.zeros(SIZE // 32, dtype=torch.int32) for _ in range(tasks)]
        return _Inputs(torch.zeros(SIZE, dtype=dtype), [torch.zeros(SIZE, dtype=dtype) for _ in range(tasks)], words)


def _mark(x: _Inputs) -> object:
    tasks = len(x.tuned)
    brackets = [[Bracket(NOTHING, NOTHING)]] * tasks
    return selection.launch_mark(elements(x.origin), [elements(t) for t in x.tuned], x.masks, brackets, 0)


def _collect(x: _Inputs) -> object:
    before = torch.zeros(SIZE // selection.BLOCK, dtype=torch.int64)
    model = elements(x.tuned[0])
    return selection.launch_collect(elements(x.origin), model, x.masks[0], x.masks[0], before, 1, 0)


def _apply(x: _Inputs) -> None:
    coefficients = torch.zeros(1, len(x.tuned) + 1, dtype=torch.float64)
    apply.fused_apply(x.origin, [x.origin, *x.tuned], coefficients, [None, *x.masks])


def _move(x: _Inputs, restore: bool) -> None:
    starts = torch.zeros(SIZE // freeze.BLOCK + 1, dtype=torch.int64)
    freeze._move(x.origin, x.masks[0], starts, x.tuned[0], restore=restore)


_ACTIONS: dict[str, Callable[[_Inputs], object]] = {
    "mark": _mark,
    "collect": _collect,
    "overlap": lambda x: overlap._intersections(x.masks),
    "conflict": lambda x: overlap.resolve_conflicts("magnitude", x.origin, x.tuned, x.masks),
    "gram": lambda x: gram.masked_gram(x.origin, x.tuned, x.masks[0]),
    "apply": _apply,
    "zero": lambda x: freeze.zero_masked_(x.origin, x.masks[0]),
    "gather": lambda x: _move(x, restore=False),
    "scatter": lambda x: _move(x, restore=True),
    "count": lambda x: freeze.block_starts(x.masks[0], SIZE),
}
KERNELS = tuple(_ACTIONS)
ANY_DTYPE = ("overlap", "count")  # they see masks alone


def entry(name: str, dtype: str, tasks: int) -> Entry:
    """The hot launch of kernel `name`, one of `KERNELS`."""
    launches = record(lambda: _ACTIONS[name](_Inputs.make(DTYPES[dtype], tasks)))
    launch = launches[0]
    moved, needed = _traffic(name, DTYPES[dtype].itemsize, tasks)
    covered = SIZE // launch.programs
    return Entry(name, dtype, tasks, launch, covered, moved, needed, name not in ("collect", "count"))


def _traffic(name: str, item: int, tasks: int) -> tuple[float, float]:
    """Bytes per parameter: moved and needed. Touched groups are 16 bytes with at least one core element."""
    touched = 1 - (1 - CORE) ** (16 // item)
    shared = 1 - (1 - CORE) ** 8  # a mask byte with a core element
    models, mask, groups = item * (tasks + 1), 1 / 8, max(1, -(-tasks // gram.GROUP))
    gram_reads = groups * (groups + 1) // 2 + tasks * groups  # origins per launch, vectors per pair of groups
    exact = {
        "mark": (models + 2 * tasks * mask, models + tasks * mask),
        "collect": (2 * mask, 2 * mask),
        "overlap": (tasks * mask, tasks * mask),
        "conflict": (2 * tasks * mask + shared * models, 2 * tasks * mask),
        "gram": (item * gram_reads + mask, models + mask),
        "apply": (models + item + tasks * mask, models + item + tasks * mask),
        "zero": (mask + 2 * item * touched, mask + item * CORE),
        "gather": (mask + item * (touched + CORE), mask + 2 * item * CORE),
        "scatter": (mask + item * (2 * touched + CORE), mask + 2 * item * CORE),
        "count": (mask, mask),
    }
    return exact[name]
