"""The PTX interpreter itself: it computes what PTX says, and refuses what it does not know or what goes wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from cpift_kernels import freeze as freeze_module
from cpift_kernels.masks import pack_mask, unpack_mask
from cpift_kernels.triton import freeze, offline

from tests.ptx.alu import OPERATIONS, fma32
from tests.ptx.device import run_launch, run_ptx
from tests.ptx.machine import Machine
from tests.ptx.memory import Dense, Memory, Sparse
from tests.ptx.parser import PtxError, parse

TARGET = "sm_90"


def _zero_launch(size: int = 4096) -> tuple[offline.Launch, torch.Tensor, torch.Tensor]:
    """A launch of `zero_kernel`, its values and its mask."""
    values, words = torch.randn(size).bfloat16(), pack_mask(torch.rand(size) < 0.3)
    return offline.record(lambda: freeze.zero_masked_(values, words))[0], values, words


def _text(launch: offline.Launch) -> tuple[str, int]:
    compiled = offline.compile_launch(launch, offline.TARGETS[TARGET])
    return compiled.asm["ptx"], compiled.metadata.shared


def _run(code: str, parameters: tuple[int, ...] = (), memory: Memory | None = None, threads: int = 32) -> Machine:
    declarations = ".reg .pred %p<9>;\n.reg .b16 %rs<9>;\n.reg .b32 %r<9>;\n.reg .b64 %rd<9>;"
    listed = ", ".join(f".param .u64 k_param_{i}" for i in range(len(parameters)))
    program = parse(f".visible .entry k({listed})\n{{\n{declarations}\n{code}\nret;\n}}\n")
    machine = Machine(program, range(2), threads, parameters, 256, memory or Memory("global"))
    machine.run()
    return machine


class TestPlantedFaults:
    def test_sound_kernel_passes(self) -> None:
        launch, values, words = _zero_launch()
        expected = values.clone()
        freeze_module.zero_masked_reference_(expected, words)
        run_launch(launch, TARGET)
        assert torch.equal(values, expected)

    def test_out_of_bounds_store_is_caught(self) -> None:
        launch, *_ = _zero_launch()
        text, shared = _text(launch)
        planted = re.sub(r"(st\.global\.v4\.b32 \[ %rd\d+ \+ )0", r"\g<1>8192", text)
        assert planted != text
        with pytest.raises(PtxError, match="out of bounds"):
            run_ptx(planted, shared, launch)

    def test_one_program_too_many_is_caught(self) -> None:
        launch, *_ = _zero_launch()
        with pytest.raises(PtxError, match="out of bounds"):
            run_launch(replace(launch, programs=launch.programs + 1), TARGET)

    def test_wrong_mask_gives_wrong_values(self) -> None:
        launch, values, words = _zero_launch()
        expected = values.clone()
        freeze_module.zero_masked_reference_(expected, words)
        text, shared = _text(launch)
        planted = re.sub(r"(and\.b32\s+%r\d+, %r\d+, )64;", r"\g<1>32;", text)
        assert planted != text
        run_ptx(planted, shared, launch)
        assert not torch.equal(values, expected)

    def test_misaligned_access_is_caught(self) -> None:
        launch, *_ = _zero_launch()
        text, shared = _text(launch)
        planted = re.sub(r"(ld\.global\.v4\.b32 \{[^}]*\}, \[ %rd\d+ \+ )0", r"\g<1>8", text)
        assert planted != text
        with pytest.raises(PtxError, match="misaligned"):
            run_ptx(planted, shared, launch)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("add.sat.s32 %r0, %r1, %r2;", "unknown opcode"),
        ("atom.global.add.u32 %r0, [%rd0], 1;", "unknown opcode"),
        ("ld.global.nc.b32 %r0, [%rd0];", "unknown opcode"),
        ("mov.u32 %r0, %laneid;", "unknown operand"),
        ("shfl.sync.bfly.b32 %r0, %r1, 1, 7199, -1;", "segmented"),
        ("mov.u32 %r0, %tid.x;\nsetp.lt.u32 %p0, %r0, 5;\n@%p0 shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1;", "in part"),
        ("ld.shared.b32 %r0, [global_smem+256];", "out of bounds"),
        ("mov.u32 %r0, %tid.x;\nsetp.lt.u32 %p0, %r0, 5;\n@%p0 bra $L;\nbar.sync 0;\n$L:", "never reaches"),
        ("add.s32 %rd0, %r1, 1", "cannot parse"),
        ("nonsense", "cannot parse"),
    ],
)
def test_refusals(code: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        _run(code, memory=Memory("global"))


def test_divergence_meets_again() -> None:
    code = """
    mov.u32 %r0, %tid.x;
    and.b32 %r1, %r0, 3;
    mov.u32 %r2, 0;
    $LOOP:
    add.s32 %r2, %r2, %r0;
    add.s32 %r1, %r1, -1;
    setp.gt.s32 %p0, %r1, 0;
    @%p0 bra $LOOP;
    redux.sync.add.s32 %r3, %r2, -1;
    """
    machine = _run(code, threads=64)
    thread = np.arange(64)
    expected = thread * np.maximum(thread % 4, 1)
    assert machine.registers["%r2"].tolist() == np.tile(expected, 2).tolist()
    assert machine.registers["%r3"].tolist() == np.tile(expected.reshape(2, 32).sum(1).repeat(32), 2).tolist()


def test_shared_memory_belongs_to_a_block() -> None:
    code = """
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    shl.b32 %r2, %r0, 2;
    st.shared.b32 [%r2], %r1;
    bar.sync 0;
    ld.shared.b32 %r3, [global_smem+12];
    """
    machine = _run(code)
    assert machine.registers["%r3"].tolist() == [0] * 32 + [1] * 32


def test_fma_rounds_once() -> None:
    random = np.random.default_rng(0)
    a, b, c = (
        random.standard_normal(500).astype(np.float32) * np.float32(2.0) ** random.integers(-20, 20, 500) for _ in "abc"
    )
    c[:250] = -(a * b)[:250]  # cancellation, where two roundings differ most
    for x, y, z, got in zip(a, b, c, fma32(a, b, c.astype(np.float32)), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(np.float32(z)))
        around = [np.nextafter(got, np.float32(-np.inf)), got, np.nextafter(got, np.float32(np.inf))]
        assert min(around, key=lambda v: abs(Fraction(float(v)) - exact)) == got


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("prmt.b32", (0x03020100, 0x07060504, 0x5410), 0x05040100),
        ("bfe.u32", (0xABCD1234, 8, 8), 0x12),
        ("popc.b32", (0xF0F00001,), 9),
        ("shr.s32", (0x80000000, 40), 0xFFFFFFFF),
        ("shl.b32", (1, 32), 0),
        ("mul.hi.s32", (0xFFFFFFFE, 3), 0xFFFFFFFF),
        ("mul.hi.u32", (0xFFFFFFFE, 3), 2),
    ],
)
def test_integer_operations(opcode: str, operands: tuple[int, ...], expected: int) -> None:
    operation = OPERATIONS[opcode]
    kinds = [np.int32 if kind == "s32" else np.uint32 for kind in operation.operands]
    values = [np.array([v], np.uint32).view(k) for v, k in zip(operands, kinds, strict=True)]
    assert int(operation.compute(*values).view(np.uint32)[0]) == expected


def test_unordered_comparisons() -> None:
    a, b = np.array([1.0, np.nan], np.float32), np.array([1.0, 1.0], np.float32)
    assert OPERATIONS["setp.ne.f32"].compute(a, b).tolist() == [False, False]
    assert OPERATIONS["setp.neu.f32"].compute(a, b).tolist() == [False, True]
    assert OPERATIONS["setp.leu.f32"].compute(a, b).tolist() == [True, True]


@pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
def test_offsets_beyond_two_to_the_31(target: str) -> None:
    """The last blocks of a tensor of 3·2³⁰ elements: only the pages they touch exist."""
    numel, tail = 3 * 2**30 + 1000, 1000
    launch, _, _ = _zero_launch()
    words = pack_mask(torch.rand(tail) < 0.3)
    last = replace(
        launch, programs=1, arguments=launch.arguments | {"numel": numel, "base": numel - tail, "TAIL": True}
    )
    mapped, mask = Sparse(2 * numel), Sparse(-(-numel // 32) * 4)
    before = torch.randn(tail).bfloat16()
    offsets = np.arange(2 * (numel - tail), 2 * numel, 2, dtype=np.uint64)
    mapped.store(offsets, before.view(torch.int16).numpy().view(np.uint16))
    places = np.arange(4 * ((numel - tail) // 32), mask.size, dtype=np.uint64)
    mask.store(places, words.view(torch.uint8).numpy()[: len(places)])
    starts = {
        launch.arguments[name].untyped_storage().data_ptr(): buffer
        for name, buffer in (("values", mapped), ("mask", mask))
    }
    run_launch(last, target, starts)
    after = torch.from_numpy(mapped.load(offsets, 2).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(after, torch.where(unpack_mask(words, tail), 0.0, before))
    assert len(mapped.pages) <= 2


def test_dense_and_sparse_agree() -> None:
    dense, sparse = Dense(np.zeros(1 << 18, np.uint8)), Sparse(1 << 18)
    offsets = np.arange(0, 1 << 18, 1 << 14, dtype=np.uint64)
    for buffer in (dense, sparse):
        buffer.store(offsets, np.arange(len(offsets), dtype=np.uint32))
    assert np.array_equal(dense.load(offsets, 4), sparse.load(offsets, 4))
