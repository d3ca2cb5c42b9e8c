"""How far a model has moved: against the definition, and the same bits for any number of threads."""

from __future__ import annotations

import math

import pytest
import torch
from cpift_kernels import delta_magnitudes
from cpift_kernels.magnitudes import BLOCK

from tests.helpers.kernel_cases import BF16, FP16, FP32, UPDATES, generator, same_magnitudes


def moved(n: int, dtypes: tuple[torch.dtype, torch.dtype], kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    origin = torch.randn(n, generator=generator(n)).to(dtypes[0])
    return origin, (origin.float() + UPDATES[kind](n, generator(1))).to(dtypes[1])


def test_the_definition() -> None:
    origin, tuned = torch.zeros(BLOCK + 2), torch.zeros(BLOCK + 2)
    origin[:2], tuned[0], tuned[BLOCK + 1] = 3.0, 1.0, -4.0
    found = delta_magnitudes(origin, tuned, backend="reference")
    assert found.largest.tolist() == [3.0, 4.0]
    assert found.changed.tolist() == [2, 1]
    assert found.l1.tolist() == [5.0, 4.0]
    assert found.squares.tolist() == [13.0, 16.0]
    assert found.origin_squares.tolist() == [18.0, 0.0]


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP16, FP16), (FP32, FP32), (FP32, BF16)])
@pytest.mark.parametrize("kind", ["random", "unmoved", "denormal", "hot block"])
def test_the_cpu_is_the_reference(kind: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for n in (1, 31, BLOCK, 70 * BLOCK + 5):
        origin, tuned = moved(n, dtypes, kind)
        found = delta_magnitudes(origin, tuned, backend="cpu")
        same_magnitudes(found, delta_magnitudes(origin, tuned, backend="reference"))


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    origin, tuned = moved(200 * BLOCK + 77, (BF16, BF16), "random")
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(delta_magnitudes(origin.view(-1), tuned, backend="cpu"))
    assert torch.equal(found[0].squares, found[1].squares)
    assert torch.equal(found[0].l1, found[1].l1)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad: float, backend: str) -> None:
    origin, tuned = moved(2 * BLOCK, (FP32, FP32), "random")
    tuned[BLOCK + 7] = bad
    found = delta_magnitudes(origin, tuned, backend=backend)
    assert found.largest.isfinite().tolist() == [True, False]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tuned has shape \(3,\), expected \(2,\)"):
        delta_magnitudes(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="pretrained has no elements"):
        delta_magnitudes(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match=r"tuned has dtype torch.int64; convert it"):
        delta_magnitudes(torch.zeros(2), torch.zeros(2, dtype=torch.int64))
