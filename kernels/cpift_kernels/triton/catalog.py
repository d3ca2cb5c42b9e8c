"""Every kernel of this package as it is launched on a large tensor: what the gates and the compile report go through.

`bytes_moved` is what the hot launch moves per parameter, `bytes_needed` the least that its inputs and outputs allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..flat import PAD
from ..gram import BLOCK as GRAM_BLOCK
from ..magnitudes import BLOCK as MAGNITUDES_BLOCK
from . import apply, flat, freeze, gram, held, magnitudes, overlap, selection
from .bracket import NOTHING, Bracket, cut_tables
from .common import elements
from .offline import Launch, record

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZE = 1 << 16  # elements of the stand-in tensors: whole blocks of every kernel
CORE = 0.05  # share of core elements that the data-dependent kernels are priced at


@dataclass(frozen=True)
class Entry:
    """One kernel at one dtype and number of tasks, with the launch that covers whole blocks.

    elements: parameters that one program covers, `tile` of them at a time. reached: tensors that it may find by
    address, in a table.
    """

    name: str
    dtype: str
    tasks: int
    launch: Launch
    elements: int
    tile: int
    bytes_moved: float
    bytes_needed: float
    reached: tuple[Tensor, ...]


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
    models = [elements(model) for model in x.tuned[: selection.GROUP]]
    tables = cut_tables([[Bracket(NOTHING, NOTHING)]] * len(models))
    return selection.launch_mark(elements(x.origin), models, x.masks[: len(models)], tables, 0)


def _collect(x: _Inputs) -> object:
    before = torch.zeros(SIZE // selection.BLOCK, dtype=torch.int64)
    model = elements(x.tuned[0])
    return selection.launch_collect(elements(x.origin), model, x.masks[0], x.masks[0], before, 1, 0)


def _collect_all(x: _Inputs) -> object:
    models = [elements(model) for model in x.tuned[: selection.GROUP]]
    upper, lower = torch.zeros(2, len(models), SIZE // 32, dtype=torch.int32)
    ranks = torch.zeros(len(models), SIZE // selection.BLOCK, dtype=torch.int64)
    places = torch.zeros(SIZE // PAD, dtype=torch.int32)
    return flat.collect_all(elements(x.origin), models, upper, lower, ranks, places, 1)


def _sum_blocks(x: _Inputs) -> None:
    pairs, blocks = (len(x.tuned) + 1) * (len(x.tuned) + 2) // 2, SIZE // GRAM_BLOCK
    partial, sums = torch.zeros(blocks, pairs, dtype=torch.float64), torch.zeros(1, pairs, dtype=torch.float64)
    flat.sum_blocks(partial, torch.tensor([[0], [blocks]], dtype=torch.int32), sums, blocks)


def _apply(x: _Inputs) -> None:
    coefficients = torch.zeros(1, len(x.tuned) + 1, dtype=torch.float64)
    apply.fused_apply(x.origin, [x.origin, *x.tuned], coefficients, [None, *x.masks])


def _move(x: _Inputs, restore: bool) -> None:
    starts = torch.zeros(SIZE // freeze.BLOCK + 1, dtype=torch.int64)
    freeze._move(x.origin, x.masks[0], starts, x.tuned[0], restore=restore)


def _hold(x: _Inputs) -> None:
    ones = np.ones(SIZE // freeze.BLOCK, np.int32)
    values = elements(x.origin)
    moves = held.Moves.make([0], [ones], held.INTEGERS[values.element_size()], x.origin.device)
    addresses, masks, sizes = (torch.tensor([n]) for n in (values.data_ptr(), x.masks[0].data_ptr(), SIZE))
    moves.move(addresses, masks, sizes, moves.saved, restore=True)


def _zero_blocks(x: _Inputs) -> None:
    blocks = torch.arange(SIZE // freeze.BLOCK, dtype=torch.int32)
    held.zero_blocks(x.origin, x.masks[0], blocks)


_ACTIONS: dict[str, Callable[[_Inputs], object]] = {
    "mark": _mark,
    "collect": _collect,
    "collect_all": _collect_all,
    "overlap": lambda x: overlap._intersections(x.masks),
    "conflict": lambda x: overlap.resolve_conflicts("magnitude", x.origin, x.tuned, x.masks),
    "gram": lambda x: gram.masked_gram(x.origin, x.tuned, x.masks[0]),
    "sum_blocks": _sum_blocks,
    "apply": _apply,
    "zero": lambda x: freeze.zero_masked_(x.origin, x.masks[0]),
    "gather": lambda x: _move(x, restore=False),
    "scatter": lambda x: _move(x, restore=True),
    "zero_blocks": _zero_blocks,
    "hold": _hold,
    "magnitudes": lambda x: magnitudes.delta_magnitudes(x.origin, x.tuned[0]),
    "count": lambda x: freeze.mask_starts(x.masks[0], SIZE),
}
KERNELS = tuple(_ACTIONS)
ANY_DTYPE = ("overlap", "sum_blocks", "count")  # they see masks, or sums, alone


def launches(name: str, dtype: str, tasks: int) -> list[Launch]:
    """Every launch that kernel `name`, one of `KERNELS`, takes over a tensor of whole blocks."""
    return _launches(name, _Inputs.make(DTYPES[dtype], tasks))


def _launches(name: str, inputs: _Inputs) -> list[Launch]:
    return record(lambda: _ACTIONS[name](inputs))


def entry(name: str, dtype: str, tasks: int) -> Entry:
    """The first, hot launch of kernel `name`."""
    inputs = _Inputs.make(DTYPES[dtype], tasks)
    launch = _launches(name, inputs)[0]
    moved, needed = _traffic(name, DTYPES[dtype].itemsize, tasks)
    reached = (inputs.origin, *inputs.masks)
    covered = SIZE // launch.programs
    tile = launch.arguments.get("TILE", covered)
    return Entry(name, dtype, tasks, launch, covered, tile, moved, needed, reached)


def _traffic(name: str, item: int, tasks: int) -> tuple[float, float]:
    """Bytes per parameter: moved and needed.

    Where only core elements matter (each core by chance), what moves is the 32-byte sectors that hold one.
    """
    sector = 32 // item
    touched = 1 - (1 - CORE) ** sector
    alone = (1 - CORE) ** tasks + tasks * CORE * (1 - CORE) ** (tasks - 1)
    contested = 1 - alone**sector
    models, mask = item * (tasks + 1), 1 / 8
    again = item * (-(-tasks // selection.GROUP) - 1)  # the origin, read once a group
    plan, pairs = gram.plan(tasks), (tasks + 1) * (tasks + 2) // 2
    gram_reads = sum(1 + len(left) + len(right or ()) for left, right in plan)
    table = {
        "mark": (models + again + 2 * tasks * mask, models + tasks * mask),
        "collect": (2 * mask, 2 * mask),
        "collect_all": (2 * tasks * mask + 8 * tasks / selection.BLOCK, 2 * tasks * mask),
        "overlap": (tasks * mask, tasks * mask),
        "conflict": (2 * tasks * mask + contested * models, 2 * tasks * mask + (1 - alone) * models),
        "gram": (
            item * gram_reads + 2 * len(plan),
            models + mask,
        ),  # a mask's sector again for each of its words, cached
        # A sum's sector again for each of its four, cached.
        "sum_blocks": (32 * pairs / GRAM_BLOCK, 8 * pairs / GRAM_BLOCK),
        "apply": (models + item + tasks * mask, models + item + tasks * mask),
        "zero": (mask + 2 * item * touched, mask + item * CORE),
        "gather": (mask + item * (touched + CORE), mask + 2 * item * CORE),
        "scatter": (mask + item * (2 * touched + CORE), mask + 2 * item * CORE),
        "zero_blocks": (mask + 4 / freeze.BLOCK + 2 * item * touched, mask + item * CORE),
        "hold": (mask + 40 / freeze.BLOCK + item * (2 * touched + CORE), mask + 2 * item * CORE),
        "magnitudes": (2 * item + 32 / MAGNITUDES_BLOCK, 2 * item + 32 / MAGNITUDES_BLOCK),
        "count": (mask, mask),
    }
    return table[name]
