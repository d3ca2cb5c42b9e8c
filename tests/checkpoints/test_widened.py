"""Models read in float32: the same values, and updates of adapters that are not rounded to θ0's dtype."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from cpift.checkpoints.adapters import in_float32, shortened
from cpift.checkpoints.adapters.widened import WidenedCheckpoint
from cpift.checkpoints.checkpoint import Checkpoint
from tests.helpers.checkpoints import save_checkpoint


def test_every_value_is_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"a": torch.randn(5, 7).bfloat16(), "b": torch.randn(3).half(), "c": torch.randn(2), "n": torch.arange(3)}
    plain = Checkpoint(save_checkpoint(tmp_path / "model", tensors))
    wide = pickle.loads(pickle.dumps(in_float32(plain, plain)))  # as another process has it
    assert isinstance(wide, WidenedCheckpoint)
    assert {name: info.dtype for name, info in wide.tensors.items()} == {
        **dict.fromkeys("abc", torch.float32),
        "n": torch.int64,
    }
    for name, values in tensors.items():
        assert torch.equal(wide.tensor(name), values.to(wide.tensors[name].dtype)), name
    starts = np.array([0, 30])
    assert torch.equal(wide.gather("a", starts, 4), plain.gather("a", starts, 4))


@pytest.mark.parametrize(("rows", "inner", "columns"), [(7, 3, 5), (4, 9, 6), (1, 1, 1)])
def test_a_product_is_shortened_by_its_factors(rows: int, inner: int, columns: int) -> None:
    torch.manual_seed(1)
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    singular = torch.linalg.svdvals((left @ right).double())
    for rank in (1, 2, 20):
        one, other, (change, lost) = shortened(left, right, rank)
        assert (one.shape, other.shape) == ((rows, rank), (rank, columns))
        assert change == pytest.approx(float(singular.norm()), rel=1e-6)
        assert lost == pytest.approx(float(singular[rank:].norm()), abs=1e-6)
        assert float((left @ right - one @ other).norm()) == pytest.approx(lost, abs=1e-5)
