"""Gates on the compiled kernels, without a GPU: spills, registers, access widths, instructions, bytes a parameter."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from functools import cache

import pytest
import torch
from _pytest.mark import ParameterSet
from cpift_kernels import FlatLayout
from cpift_kernels.triton import catalog, flat, offline
from cpift_kernels.triton.machine_code import MachineCode, read_machine_code

from tests.ptx.device import reachable, run_launch

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

SLOW = pytest.mark.slow
TASKS = 4
NVIDIA, OTHERS = ("sm_90", "sm_80", "sm_100"), ("sm_80", "sm_100", "gfx942")


def _cells(targets: Sequence[str], names: Collection[str] = catalog.KERNELS) -> list[ParameterSet]:
    """(kernel, dtype, target): every dtype for sm_90, for each other target bf16, to which most kernels are tuned. (A
    version takes a second or more to compile. `benchmarks.kernels.compile_report` compiles all.)"""
    return [
        pytest.param(name, dtype, target, marks=() if (dtype, target) == ("bf16", "sm_90") else SLOW)
        for target in targets
        for name in catalog.KERNELS
        for dtype in catalog.DTYPES
        if name in names
        if dtype == "bf16" or (target == "sm_90" and name not in catalog.ANY_DTYPE)
    ]


# Registers a thread at four tasks: 128 leave 16 warps on a multiprocessor.
REGISTERS = {
    "mark": 128, "collect": 40, "collect_all": 40, "sum_blocks": 48,
    "overlap": 40, "conflict": 96, "gram": 160, "apply": 112, "zero": 32, "gather": 56,
    "scatter": 40, "zero_blocks": 32, "hold": 40, "magnitudes": 80,
    "count": 24,
}  # fmt: skip
FP16 = {"mark": 160}  # which may hold all 255, see `common.all_registers`
# PTX instructions a parameter at four tasks: what was measured, and a tenth more.
INSTRUCTIONS = {
    "mark": 81, "collect": 8, "collect_all": 11.5, "sum_blocks": 1.9,
    "overlap": 2.2, "conflict": 75, "gram": 74, "apply": 99, "zero": 15, "gather": 33,
    "scatter": 32, "zero_blocks": 16, "hold": 34, "magnitudes": 42,
    "count": 6,
}  # fmt: skip
# 128-bit accesses of model tensors or mask words in the code, as tensors read and written; a fused apply reads the
# masked sources in its contested branch again.
WIDE = {
    "mark": (TASKS + 1, 0), "overlap": (TASKS, 0), "conflict": (TASKS + 1, 0),
    "apply": (2 * TASKS + 1, 1), "zero": (1, 1), "gather": (1, 0), "scatter": (1, 1), "zero_blocks": (1, 1),
    "hold": (1, 1), "magnitudes": (2, 0),
}  # fmt: skip
# Loads of 16 to 64 bits that belong there: cut points, coefficients, block starts, and saved values one by one.
SCALARS = {"mark": 4 * TASKS, "apply": TASKS + 1, "gather": 1, "scatter": 9, "zero_blocks": 1, "hold": 22}


@cache
def _machine_code(name: str, dtype: str, target: str, tasks: int = TASKS) -> MachineCode:
    launch = catalog.entry(name, dtype, tasks).launch
    return read_machine_code(offline.compile_launch(launch, offline.TARGETS[target]), offline.TARGETS[target])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "target"), _cells(("sm_90", *OTHERS)))
def test_no_spills_and_few_registers(name: str, dtype: str, target: str) -> None:
    code = _machine_code(name, dtype, target)
    assert code.spilled == 0
    assert code.registers <= (FP16 if dtype == "fp16" else REGISTERS).get(name, REGISTERS[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tasks", "target"), [("mark", 2, "sm_90"), ("mark", 5, "sm_80"), ("apply", 3, "sm_80")]
)
def test_no_spills_where_ptxas_would_stop_early(name: str, tasks: int, target: str) -> None:
    assert _machine_code(name, "fp16", target, tasks).spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "target"), [("mark", "fp32", "sm_80"), ("gram", "fp32", "sm_80"), ("apply", "bf16", "gfx942")]
)
def test_no_spills_at_sixteen_tasks(name: str, dtype: str, target: str) -> None:
    for launch in catalog.launches(name, dtype, 16):
        compiled = offline.compile_launch(launch, offline.TARGETS[target])
        assert read_machine_code(compiled, offline.TARGETS[target]).spilled == 0


@pytest.mark.parametrize(("name", "dtype", "target"), _cells(("sm_90", *OTHERS), WIDE))
def test_tensors_move_128_bits_at_a_time(name: str, dtype: str, target: str) -> None:
    code, entry = _machine_code(name, dtype, target), catalog.entry(name, dtype, TASKS)
    item = 1 / 8 if name == "overlap" else catalog.DTYPES[dtype].itemsize
    accesses = entry.tile / entry.launch.threads * item / 16
    loads, stores = WIDE[name]
    assert code.loads[128] >= loads * accesses
    assert code.stores[128] == stores * accesses
    assert sum(code.loads[bits] for bits in (16, 32, 64)) <= SCALARS.get(name, 0)


@pytest.mark.parametrize(("name", "dtype", "target"), _cells(NVIDIA))
def test_instructions_and_bytes_a_parameter(name: str, dtype: str, target: str) -> None:
    """Counted while the compiled PTX runs; masks are empty, so kernels that skip unmasked parts move less."""
    entry = catalog.entry(name, dtype, TASKS)
    with reachable(entry.reached):
        done = run_launch(entry.launch, target)
    parameters = entry.launch.programs * entry.elements
    assert sum(done.counts.values()) / parameters <= INSTRUCTIONS[name]
    assert done.traffic / parameters <= 1.03 * entry.bytes_moved
    if name in ("mark", "overlap", "apply", "magnitudes"):
        assert done.traffic / parameters >= 0.99 * entry.bytes_moved
        assert entry.bytes_moved <= 1.06 * entry.bytes_needed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", catalog.DTYPES)
def test_coefficients_of_each_tensor_cost_one_load(dtype: str) -> None:
    """Of a fused apply over tensors in one buffer: no spills, and accesses as wide as those of one tensor."""
    layout, target, alone = (
        FlatLayout([catalog.SIZE, 7]),
        offline.TARGETS["sm_90"],
        _machine_code("apply", dtype, "sm_90"),
    )
    out, *sources = [torch.zeros(layout.total, dtype=catalog.DTYPES[dtype]) for _ in range(TASKS + 2)]
    masks = [torch.zeros(layout.total // 32, dtype=torch.int32) for _ in range(TASKS)]
    scales = torch.zeros(2, TASKS + 1)
    (launch,) = offline.record(lambda: flat.flat_apply(out, sources, scales, [None, *masks], layout))
    code = read_machine_code(offline.compile_launch(launch, target), target)
    assert (code.spilled, code.loads[128], code.stores[128]) == (0, alone.loads[128], alone.stores[128])
    assert sum(code.loads[bits] for bits in (16, 32, 64)) <= SCALARS["apply"] + 1


def test_widths_are_lost_without_alignment() -> None:
    """The width gate sees what it is for: a tensor off its 16-byte boundary."""
    values, words = torch.zeros(4097)[1:], torch.zeros(128, dtype=torch.int32)
    from cpift_kernels.triton import freeze

    launch = offline.record(lambda: freeze.zero_masked_(values, words))[0]
    code = read_machine_code(offline.compile_launch(launch, offline.TARGETS["sm_90"]), offline.TARGETS["sm_90"])
    assert code.loads[128] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "target"), [("bf16", "sm_90"), ("fp32", "gfx942")])
@pytest.mark.parametrize("name", ["mark", "gram", "apply"])
def test_tails_and_rows_compile(name: str, dtype: str, target: str) -> None:
    """The launches that the catalogue's whole tensors do not make: bounds masks, and rows that share mask bytes."""
    for launch in catalog.launches(name, dtype, 2):
        for changed in ({"TAIL": True}, {"TAIL": True, "ALIGNED": False}):
            arguments = launch.arguments | {key: value for key, value in changed.items() if key in launch.arguments}
            varied = offline.Launch(launch.kernel, 1, launch.threads, arguments, launch.registers)
            compiled = offline.compile_launch(varied, offline.TARGETS[target])
            assert read_machine_code(compiled, offline.TARGETS[target]).spilled == 0
