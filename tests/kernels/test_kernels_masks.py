"""Packed masks against numpy, and the choice of a backend."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from cpift_kernels import count_mask, pack_mask, resolve, union_mask, unpack_mask


@pytest.mark.parametrize("numel", [0, 1, 7, 31, 32, 33, 64, 1009])
def test_packing_is_little_endian_with_clear_padding(numel: int) -> None:
    mask = torch.from_numpy(np.random.default_rng(numel).random(numel) < 0.5)
    words = pack_mask(mask)
    expected = np.packbits(mask.numpy(), bitorder="little")
    assert words.dtype == torch.int32
    assert words.numel() == (numel + 31) // 32
    assert words.numpy().tobytes() == expected.tobytes().ljust(4 * words.numel(), b"\0")
    assert torch.equal(unpack_mask(words, numel), mask)
    assert count_mask(words) == int(mask.sum())


def test_a_mask_of_any_shape_is_packed_row_major() -> None:
    mask = torch.rand(5, 3, 7) < 0.5
    assert torch.equal(unpack_mask(pack_mask(mask.transpose(0, 2)), 105), mask.transpose(0, 2).reshape(-1))


def test_union_is_or_and_leaves_its_inputs_alone() -> None:
    masks = [torch.rand(100) < 0.2 for _ in range(3)]
    words = [pack_mask(mask) for mask in masks]
    before = [w.clone() for w in words]
    assert torch.equal(unpack_mask(union_mask(words), 100), masks[0] | masks[1] | masks[2])
    assert all(torch.equal(w, b) for w, b in zip(words, before, strict=True))


def test_wrong_words_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="pack_mask"):
        unpack_mask(torch.zeros(1, dtype=torch.int64), 10)
    with pytest.raises(ValueError, match="expected 2"):
        unpack_mask(torch.zeros(1, dtype=torch.int32), 33)


def test_auto_follows_the_device_and_nothing_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(3)
    assert resolve("auto", x) == "cpu"
    assert resolve("reference", x.to("meta")) == "reference"
    with pytest.raises(ValueError, match="CUDA or ROCm tensors, got cpu"):
        resolve("triton", x)
    with pytest.raises(ValueError, match=r"got meta; move them with \.cpu\(\)"):
        resolve("auto", x.to("meta"))
    with pytest.raises(ValueError, match="several devices"):
        resolve("auto", x, x.to("meta"))
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        resolve("cuda", x)  # type: ignore[arg-type]


def test_the_import_brings_none_of_torch_numba_and_triton() -> None:
    code = "import sys, cpift_kernels; print(set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "cpift_kernels" in out
    assert not any(name in out for name in ("'torch'", "'numba", "'triton", "'llvmlite"))
