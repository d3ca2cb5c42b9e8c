"""Every operation of the Triton backend against its reference.

In an ordinary run the launches execute as PTX compiled for each CUDA target; with TRITON_INTERPRET=1 (see
test_interpreted.py) Triton's own interpreter runs the same tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cpift_kernels import apply as apply_module
from cpift_kernels import freeze as freeze_module
from cpift_kernels import gram as gram_module
from cpift_kernels import held as held_module
from cpift_kernels import magnitudes as magnitudes_module
from cpift_kernels import overlap as overlap_module
from cpift_kernels.masks import pack_mask, unpack_mask
from cpift_kernels.selection import select_cores_reference
from cpift_kernels.triton import apply, bracket, freeze, gram, held, magnitudes, offline, overlap, selection
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.interpreted import rounded_as_gpus
from tests.helpers.kernel_cases import same_magnitudes
from tests.ptx.device import interpreted_ptx

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SLOW = pytest.mark.slow
WHOLE = pytest.mark.skipif(not INTERPRETED, reason="takes ten seconds and more to compile")
MODES = (
    [pytest.param("interpreter", id="interpreter")]
    if INTERPRETED
    else ["sm_90", pytest.param("sm_80", marks=SLOW), pytest.param("sm_100", marks=SLOW)]
)
DTYPES = [
    pytest.param((torch.bfloat16, torch.bfloat16), id="bf16"),
    pytest.param((torch.float16, torch.float16), id="fp16", marks=SLOW),
    pytest.param((torch.float32, torch.float32), id="fp32", marks=SLOW),
    pytest.param((torch.bfloat16, torch.float32), id="mixed", marks=SLOW),
]
# What takes seconds a version to compile: widening a dtype is tried in every dtype by quicker kernels.
FEWER = DTYPES if INTERPRETED else [DTYPES[0], DTYPES[3]]
SIZES = [1, 31, 4096, 5003]
INTEGERS = {2: torch.int16, 4: torch.int32}


@pytest.fixture(params=MODES, autouse=True)
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    with rounded_as_gpus() if request.param == "interpreter" else interpreted_ptx(request.param):
        yield


def _models(
    sizes: list[int], dtypes: tuple[torch.dtype, torch.dtype], tasks: int, moved: float = 1.0
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """A model and its fine-tunes, of which a share `moved` of the elements changed."""
    origin = [torch.randn(size).to(dtypes[0]) for size in sizes]
    steps = [[0.02 * torch.randn(size) * (torch.rand(size) < moved) for size in sizes] for _ in range(tasks)]
    return origin, [[(x.float() + s).to(dtypes[1]) for x, s in zip(origin, row, strict=True)] for row in steps]


def _masks(size: int, tasks: int, share: float = 0.3) -> list[Tensor]:
    return [pack_mask(torch.rand(size) < share) for _ in range(tasks)]


def _same_cores(origin: list[Tensor], tuned: list[list[Tensor]], counts: list[int]) -> None:
    got = selection.select_cores(origin, tuned, counts)
    expected = select_cores_reference(origin, tuned, counts)
    for row, wanted in zip(got, expected, strict=True):
        for core, other in zip(row, wanted, strict=True):
            assert (core.count, core.requested, core.threshold) == (other.count, other.requested, other.threshold)
            assert all(torch.equal(a, b) for a, b in zip(core.words, other.words, strict=True))


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample far smaller than the model and slices of one block, as with models of billions of elements."""
    monkeypatch.setattr(bracket, "SAMPLE", 1500)
    monkeypatch.setattr(selection, "SCRATCH_BYTES", 1)


@pytest.mark.usefixtures("small_slices")
class TestSelection:
    @pytest.mark.parametrize("dtypes", FEWER)
    def test_random(self, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        origin, tuned = _models([5003, 1, 0, 8192, 37], dtypes, 2)
        _same_cores(origin, tuned, [133, 6000])

    @pytest.mark.parametrize("dtypes", DTYPES)
    def test_few_moved_and_ties(self, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        origin, tuned = _models([5003, 8192], dtypes, 2, moved=0.05)
        _same_cores(origin, tuned, [133, 6000])

    @pytest.mark.slow
    @pytest.mark.parametrize("counts", [[0, 13195], [1, 4096]])
    @pytest.mark.parametrize("value", [0.0, 2.0**-130, 1.0])
    def test_constant(self, value: float, counts: list[int]) -> None:
        origin = [torch.zeros(5003), torch.zeros(8192)]
        _same_cores(origin, [[torch.full_like(x, value) for x in origin] for _ in range(2)], counts)

    @pytest.mark.slow
    def test_denormals(self) -> None:
        origin = [torch.zeros(9001)]
        tuned = [[torch.randint(0, 50, (9001,), dtype=torch.int32).view(torch.float32)] for _ in range(2)]
        _same_cores(origin, tuned, [90, 8999])

    def test_bracket_that_misses_is_widened(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bracket, "SPREADS", (0.0, 0.5, float("inf")))
        monkeypatch.setattr(selection, "SPREADS", (0.0, 0.5, float("inf")))
        attempts = []
        attempt = selection._attempt
        monkeypatch.setattr(selection, "_attempt", lambda *args: attempts.append(args[3]) or attempt(*args))
        origin, tuned = _models([5003, 8192], (torch.bfloat16, torch.bfloat16), 2)
        _same_cores(origin, tuned, [133, 6000])
        assert max(attempts) > 0

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_nonfinite_is_named(self, bad: float) -> None:
        origin, tuned = _models([5003, 8192], (torch.bfloat16, torch.bfloat16), 2)
        tuned[1][1][8191] = bad
        with pytest.raises(ValueError, match=r"task 1, tensor 1"):
            selection.select_cores(origin, tuned, [133, 6000])


class TestGram:
    @pytest.fixture(autouse=True)
    def short_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Several blocks in few elements: each takes its elements one after another, slow where it is interpreted."""
        for module in (gram_module, gram):
            monkeypatch.setattr(module, "BLOCK", 256)
            monkeypatch.setattr(module, "FEW", 16)

    @pytest.mark.parametrize("dtypes", FEWER)
    @pytest.mark.parametrize("size", [1, 2601])
    def test_tensor(self, size: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        origin, tuned = _models([size], dtypes, 3)
        self._check(origin[0], [x[0] for x in tuned], _masks(size, 1)[0], "tensor")
        self._check(origin[0], [x[0] for x in tuned], None, "tensor")

    @pytest.mark.slow
    @pytest.mark.parametrize(("group", "across", "vectors"), [(2, 1, 5), pytest.param(8, 4, 10, marks=WHOLE)])
    def test_more_vectors_than_one_launch_takes(
        self, group: int, across: int, vectors: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gram, "GROUP", group)
        monkeypatch.setattr(gram, "ACROSS", across)
        origin, tuned = _models([2601], (torch.bfloat16, torch.float32), vectors)
        self._check(origin[0], [x[0] for x in tuned], _masks(2601, 1)[0], "tensor")

    @pytest.mark.parametrize("shape", [(3, 64), pytest.param((5, 33), marks=SLOW), pytest.param((2, 700), marks=SLOW)])
    def test_rows(self, shape: tuple[int, int]) -> None:
        origin = torch.randn(shape).bfloat16()
        tuned = [(origin.float() + 0.01 * torch.randn(shape)).bfloat16() for _ in range(2)]
        self._check(origin, tuned, _masks(origin.numel(), 1)[0], "row")
        self._check(origin, tuned, None, "row")

    @pytest.mark.parametrize("share", [0.93, pytest.param(0.97, marks=SLOW), 1.0])
    def test_blocks_of_which_few_elements_are_left(self, share: float) -> None:
        origin, tuned = _models([2601], (torch.bfloat16, torch.bfloat16), 2)
        self._check(origin[0], [x[0] for x in tuned], _masks(2601, 1, share)[0], "tensor")

    @pytest.mark.slow
    def test_nan_is_nan(self) -> None:
        origin, tuned = _models([600], (torch.bfloat16, torch.bfloat16), 2)
        tuned[1][0][300] = float("nan")
        self._check(origin[0], [x[0] for x in tuned], None, "tensor")

    @staticmethod
    def _check(origin: Tensor, tuned: list[Tensor], excluded: Tensor | None, granularity: str) -> None:
        got = gram.masked_gram(origin, tuned, excluded, granularity=granularity)
        expected = gram_module.masked_gram_reference(origin, tuned, excluded, granularity=granularity)
        assert torch.equal(got.nan_to_num(7.5), expected.nan_to_num(7.5))


class TestApply:
    @pytest.mark.parametrize("dtypes", DTYPES)
    @pytest.mark.parametrize("size", SIZES)
    def test_tensor(self, size: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        self._check((size,), dtypes, 3, 1)

    @pytest.mark.parametrize("shape", [(3, 64), pytest.param((5, 33), marks=SLOW), pytest.param((2, 5000), marks=SLOW)])
    def test_rows(self, shape: tuple[int, int]) -> None:
        self._check(shape, (torch.bfloat16, torch.bfloat16), 2, shape[0])

    @pytest.mark.slow
    @pytest.mark.parametrize("tasks", [1, pytest.param(17, marks=WHOLE)])
    def test_tasks(self, tasks: int) -> None:
        self._check((5003,), (torch.bfloat16, torch.bfloat16), tasks, 1)

    @staticmethod
    def _check(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], tasks: int, rows: int) -> None:
        base, tuned = torch.randn(shape).to(dtypes[1]), [torch.randn(shape).to(dtypes[0]) for _ in range(tasks)]
        masks: list[Tensor | None] = [None, *_masks(base.numel(), tasks, 1.2 / (tasks + 1))]
        coefficients = torch.rand(rows, tasks + 1, dtype=torch.float64) - 0.3
        coefficients[:, -1] = 0.0
        tuned[-1].view(-1)[0] = float("nan")  # left out of the sum by its coefficient, unless its mask holds it
        out = torch.full(shape, float("nan"), dtype=dtypes[0])
        expected = out.clone()
        apply.fused_apply(out, [base, *tuned], coefficients, masks)
        apply_module.fused_apply_reference(expected, [base, *tuned], coefficients, masks)
        held = torch.stack([unpack_mask(words, base.numel()) for words in masks if words is not None]).sum(0)
        bits = INTEGERS[dtypes[0].itemsize]
        donated = (held == 1).view(shape)
        assert torch.equal(out[donated].view(bits), expected[donated].view(bits))
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(7.5).view(bits), expected.nan_to_num(7.5).view(bits))


class TestMagnitudes:
    @pytest.mark.parametrize("dtypes", DTYPES)
    @pytest.mark.parametrize("size", SIZES)
    def test_blocks(self, size: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        origin, tuned = _models([size], dtypes, 1, moved=0.5)
        got = magnitudes.delta_magnitudes(origin[0], tuned[0][0])
        same_magnitudes(got, magnitudes_module.delta_magnitudes_reference(origin[0], tuned[0][0]))


class TestOverlapAndConflicts:
    @pytest.mark.parametrize("size", [0, 1, 33, 70003])
    @pytest.mark.parametrize("tasks", [3, pytest.param(16, marks=SLOW)])
    def test_counts(self, size: int, tasks: int) -> None:
        masks = [[words, words] for words in _masks(size, tasks)]
        got = overlap.overlap_counts_per_tensor(masks)
        assert torch.equal(got, overlap_module.overlap_counts_per_tensor_reference(masks))

    @pytest.mark.parametrize("dtypes", DTYPES)
    @pytest.mark.parametrize("policy", ["magnitude", "last", "mean"])
    @pytest.mark.parametrize("size", SIZES)
    def test_conflicts(self, size: int, policy: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        origin, tuned = _models([size], dtypes, 3, moved=0.5)
        arguments = (policy, origin[0], [x[0] for x in tuned], _masks(size, 3))
        expected = overlap_module.resolve_conflicts_reference(*arguments)
        got = overlap.resolve_conflicts(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def _list_of_tensors() -> list[Tensor]:
    """Both sizes of element among them, one tensor empty, some with whole blocks and some with less than one."""
    sizes = (1, 31, 5003, 4096, 4099, 0)
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16, torch.bfloat16, torch.float32)
    return [torch.randn(size).to(dtype) for size, dtype in zip(sizes, dtypes, strict=True)]


def _unaligned(tensor: Tensor) -> Tensor:
    """The same values, one element off where an allocation begins."""
    return torch.cat([tensor[:1], tensor])[min(1, len(tensor)) :]


class _Operations(TorchDispatchMode):
    """The names of the operations that torch runs within it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


class TestFreeze:
    @pytest.mark.parametrize("dtypes", DTYPES[:3])
    @pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
    @pytest.mark.parametrize("size", SIZES)
    def test_round_trip(self, size: int, share: float, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        (words,), values = _masks(size, 1, share), torch.randn(size).to(dtypes[0])
        saved = freeze.gather_masked(values, words)
        assert torch.equal(saved, freeze_module.gather_masked_reference(values, words))
        zeroed, expected = values.clone(), values.clone()
        freeze.zero_masked_(zeroed, words)
        freeze_module.zero_masked_reference_(expected, words)
        assert torch.equal(zeroed, expected)
        freeze.scatter_masked_(zeroed, words, saved)
        assert torch.equal(zeroed, values)

    def test_restore_in_one_launch(self) -> None:
        (words,), values = _masks(5003, 1), torch.randn(5003)
        starts, saved = freeze.mask_starts(words, 5003), freeze.gather_masked(values, words)
        moved = values + 1.0
        freeze.scatter_masked_(moved, words, saved, starts=starts)
        assert torch.equal(moved, torch.where(unpack_mask(words, 5003), values, values + 1.0))

    @pytest.mark.parametrize("share", [0.0, 0.3, pytest.param(1.0, marks=SLOW)])
    def test_a_list_is_held_as_its_tensors_are(self, share: float) -> None:
        """Saved, zeroed, put back (also elsewhere in memory, off any alignment) and pulled: the reference's bits."""
        values = _list_of_tensors()
        words = [_masks(x.numel(), 1, share)[0] for x in values]
        moved = [[_unaligned(x + 1) if place % 2 else x + 1 for place, x in enumerate(values)] for _ in range(2)]
        results = []
        for make, mine in zip((held.hold_masked, held_module.hold_masked_reference), moved, strict=True):
            one = make(values, words)
            one.restore_(mine)
            restored = [x.clone() for x in mine]
            one.zero_(3, mine[3])
            one.replace(4, values[4] * 2)
            one.pull_(mine, [0.25, 0.25, 0.5, 0.5, 0.5, 0.75])
            results.append((one.count, [*restored, *mine]))
        assert results[0][0] == results[1][0]
        assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))

    def test_a_step_of_a_list_is_a_launch_for_each_size_of_element(self) -> None:
        """It allocates nothing and reads nothing back: what a captured graph needs."""
        values = _list_of_tensors()
        words = [_masks(x.numel(), 1)[0] for x in values]
        one = held.hold_masked(values, words)
        one.pull_(values, [0.5] * len(values))
        with _Operations() as operations:
            steps = [
                offline.record(lambda: one.restore_(values)),
                offline.record(lambda: one.zero_(3, values[3])),
                offline.record(lambda: one.pull_(values, [0.5] * len(values))),
            ]
        assert [len(launches) for launches in steps] == [2, 1, 4]
        views = {"aten::detach", "aten::slice.Tensor", "aten::view", "aten::view.dtype"}
        assert operations.seen <= views | {"aten::lerp_.Scalar"}

    def test_wrong_length_is_refused(self) -> None:
        (words,), values = _masks(5003, 1), torch.randn(5003)
        with pytest.raises(ValueError, match="saved holds"):
            freeze.scatter_masked_(values, words, values)
