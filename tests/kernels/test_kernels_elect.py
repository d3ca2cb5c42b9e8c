"""The election of signs: one pass and its reference give the same bits."""

from __future__ import annotations

import pytest
import torch
from cpift_kernels import elect_signs

SETTINGS = [([0.5] * 5, [1.0] * 5, 1.0), ([0.3, -0.3, 0.7, 1.1, -2.0], [0.2, 0.5, 0.9, 0.1, 0.33], 0.7)]


def updates_of(tasks: int, numel: int) -> torch.Tensor:
    """With zeros of both signs, values that cancel out, NaN and Inf."""
    generator = torch.Generator().manual_seed(100 * tasks + numel)
    found = torch.randn(tasks, numel, generator=generator) * 0.01
    found[torch.rand(tasks, numel, generator=generator) < 0.3] = 0.0
    found[torch.rand(tasks, numel, generator=generator) < 0.1] = -0.0
    if numel > 6:
        found[0, 3], found[-1, 4] = float("nan"), float("inf")
        found[:, 5] = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])[:tasks]
        found[:, 6] = torch.tensor([1.0, 2.0**-30, -1.0 - 2.0**-23, 0.0, 2.0**-40])[:tasks]
    return found


@pytest.mark.parametrize("normalize", [None, True, False])
@pytest.mark.parametrize(("weights", "densities", "scale"), SETTINGS)
@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_the_bits_are_the_references(
    tasks: int, weights: list[float], densities: list[float], scale: float, normalize: bool | None
) -> None:
    for numel in (0, 1, 7, 1024, 1025, 70_001):
        updates, settings = updates_of(tasks, numel), (weights[:tasks], densities[:tasks], normalize, scale)
        found, wanted = elect_signs(updates, *settings), elect_signs(updates, *settings, backend="reference")
        assert torch.equal(found.view(torch.int32), wanted.view(torch.int32)), numel
        strided = torch.stack([updates, updates], 2)[:, :, 0]
        assert torch.equal(elect_signs(strided, *settings).view(torch.int32), wanted.view(torch.int32))


def test_by_hand() -> None:
    updates = torch.tensor([[1.0, 2.0, 0.0, -4.0], [3.0, -1.0, 0.0, -2.0], [-1.0, 5.0, 0.0, 5.0]])
    ones = [1.0] * 3
    assert elect_signs(updates, ones, ones).tolist() == [2.0, 3.5, 0.0, -3.0]
    assert elect_signs(updates, [1.0, 3.0, 1.0], ones, True).tolist() == [2.5, 3.5, 0.0, -2.5]
    assert elect_signs(updates, [1.0, 3.0, 1.0], ones, False, 0.5).tolist() == [5.0, 3.5, 0.0, -5.0]
    assert elect_signs(updates, ones, [0.5] * 3).tolist() == [4.0, 7.0, 0.0, -6.0]


def test_what_does_not_fit_is_refused() -> None:
    updates, ones = torch.ones(2, 3), [1.0, 1.0]
    with pytest.raises(ValueError, match=r"updates are torch.float64 \[2, 3\]; pass float32"):
        elect_signs(updates.double(), ones, ones)
    with pytest.raises(ValueError, match=r"updates are torch.float32 \[3\]"):
        elect_signs(updates[0], ones, ones)
    with pytest.raises(ValueError, match="1 weights and 2 densities for 2 updates"):
        elect_signs(updates, [1.0], ones)
    with pytest.raises(ValueError, match="backend='triton' needs CUDA or ROCm tensors"):
        elect_signs(updates, ones, ones, backend="triton")
