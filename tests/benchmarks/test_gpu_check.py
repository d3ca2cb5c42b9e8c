"""What is asked of a GPU, asked of kernels compiled for one and executed on the CPU: tiny sizes, the same steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cpift_kernels
import pytest
import torch
from cpift_kernels import Placement, placement_of
from cpift_kernels.triton import freeze

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.bits import OPERATIONS, Inputs, WrongError, same
from benchmarks.gpu.card import Card, Sizes, absent
from tests.helpers.as_gpu import as_gpu
from tests.helpers.placements import Lazy, queued_launches

TINY = Sizes(
    small=(1, 4099),
    large=1 << 13,
    far=9000,
    timed=1 << 12,
    copied=1 << 10,
    lanes=(3, 1503),
    model=[4099, 64],
    tasks=(2,),
    repeats=1,
)


class StandIn(Card):
    """Tensors of the CPU; a graph's replay is the action again."""

    device = "cpu"

    def wait(self) -> None:
        pass

    def elsewhere(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def place(self) -> Placement:
        return placement_of(torch.device("cpu"))

    def pinned(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.uint8)

    def _once(self, action: Any) -> float:
        action()
        return 1e-3

    def captured(self, action: Any) -> Any:
        return action

    @contextmanager
    def waits(self) -> Iterator[list[object]]:
        yield []


def asked(steps: list[str], folder: Path) -> tuple[int, list[dict[str, Any]]]:
    with as_gpu():
        status = gpu.check(StandIn(), TINY, steps, folder)
    return status, [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_step_gives_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [*gpu.STEPS]
    with patch.dict(OPERATIONS, {"overlap_counts": OPERATIONS["overlap_counts"]}, clear=True):
        status, rows = asked(steps, tmp_path)
    assert status == 0
    assert [row["cases"] for row in rows if "cases" in row] == [12, 12]  # three dtypes, two alignments, two sizes
    assert [*dict.fromkeys(row["step"] for row in rows)] == steps
    assert all(row["environment"]["versions"]["triton"] for row in rows)
    kernels = {row["operation"]: row for row in rows if row["step"] == "kernels"}
    assert all(kernels[name]["share_of_copy"] > 0 for name in kernels if name != "copy")
    calls = {row["operation"]: row for row in rows if row["step"] == "calls"}
    assert (calls["restore"]["launches"], calls["pull"]["launches"], calls["zero"]["launches"]) == (1, 2, 2)
    assert calls["restore"]["torch_operations"] == 0
    assert calls["select_cores, flat"]["launches"] < calls["select_cores"]["launches"]
    assert [calls[f"{name}, flat"]["launches"] for name in ("masked_gram", "fused_apply")] == [2, 1]
    lanes = {row["operation"]: row for row in rows if row["step"] == "lanes' rates"}
    assert lanes["slices: all together"]["host_waits_a_slice"] > 0
    assert lanes["slices: copies in alone"]["gb_per_second"] > 0
    ways = ["fused_apply of slices", "stream_cores", "stream_cores, one buffer a model"]
    assert [row["operation"] for row in rows if row["step"] == "lanes"] == ways
    assert "of a copy" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_has_the_bits_of_its_reference(operation: str) -> None:
    with as_gpu():
        OPERATIONS[operation](Inputs(torch.bfloat16, [2049, 1, 4099], "cpu", offset=1))


def test_a_wrong_bit_ends_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(values: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return torch.zeros(cpift_kernels.count_mask(words), dtype=values.dtype)

    with patch.object(freeze, "gather_masked", wrong):
        status, rows = asked(["beyond 32 bits", "kernels"], tmp_path)
    assert status == 1
    assert [(row["step"], row["correct"]) for row in rows] == [("beyond 32 bits", False)]
    assert rows[0]["error"] == "saved: 4 of 4 elements differ, the first at 0"
    assert "WRONG: saved: 4 of 4" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "without",
    [None, ("compute", "in"), ("host", "out")],
    ids=str,
)
def test_a_lane_that_does_not_wait_has_wrong_bits(without: Any, tmp_path: Path) -> None:
    """Of a card that does as late as it may what it is asked for."""

    class Queued(StandIn):
        def place(self) -> Placement:
            return Lazy((), without)

    with as_gpu(), queued_launches():
        status = gpu.check(Queued(), TINY, ["lanes"], tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert status == (0 if without is None else 1), rows
    assert without is None or "fused_apply of slices" not in [row.get("operation") for row in rows]


def test_a_machine_without_a_gpu_is_told_so_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with patch.object(torch.cuda, "is_available", lambda: False):
        assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_where_torch_could_use_a_gpu_its_absence_is_named() -> None:
    with patch.object(torch.cuda, "is_available", lambda: False), patch.object(torch.version, "cuda", "12.8"):
        assert "sees none" in (absent() or "")


def test_a_difference_is_counted() -> None:
    with pytest.raises(WrongError, match="mask: 1 of 3 elements differ, the first at 2"):
        same("mask", torch.tensor([0.0, 1.0, -0.0]), torch.tensor([0.0, 1.0, 0.0]))


def test_a_smaller_card_is_asked_less() -> None:
    assert Sizes.fitting(80 * 2**30) == Sizes()
    half = Sizes.fitting(40 * 2**30)
    assert (half.timed, half.large, half.far) == (1 << 29, 1 << 26, Sizes().far)
    assert len(half.model) == 16 * 9 + 3
