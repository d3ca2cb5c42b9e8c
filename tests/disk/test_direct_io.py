"""Files written past the page cache hold the same bytes, whatever their size and whatever the file system allows."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.writing import WriteBehind, plan_shards, write_shard
from cpift.disk import direct_io
from cpift.disk.files import file_sha256
from cpift.formats.safetensors import FileWriter, TensorInfo, dtype_name

BLOCK = direct_io._BLOCK


@pytest.fixture(params=["direct", "not opened", "refused"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is here; one without direct writing; one that opens the file so and then refuses to write."""
    if request.param == "not opened":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    if request.param == "refused":
        monkeypatch.setattr(direct_io.os, "pwrite", _refuse_first(os.pwrite))
        monkeypatch.setattr(direct_io, "_SYNC_BYTES", BLOCK)


def _refuse_first(pwrite: Callable[[int, memoryview, int], int]) -> Callable[[int, memoryview, int], int]:
    refused: list[int] = []

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        if len(data) == BLOCK and not refused:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "no direct writing")
        return int(pwrite(descriptor, data, offset))

    return write


@pytest.mark.usefixtures("file_system")
@pytest.mark.parametrize("size", [0, 1, 4095, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
def test_bytes_arrive(size: int, tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    stream = direct_io.DirectStream(tmp_path / "file", descriptor)
    for part in np.split(data, [size // 7, size // 2]):
        stream.write(part.data)
    assert stream.position == size
    stream.finish()
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == data.tobytes()


@pytest.mark.usefixtures("file_system")
def test_a_shard_is_hashed_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.randn(3, 700_001), "b": torch.randn(5).bfloat16(), "c": torch.zeros(0)}
    infos = [TensorInfo(name, tuple(t.shape), dtype_name(t.dtype), Path()) for name, t in tensors.items()]
    (shard,) = plan_shards(infos, 1 << 30)

    def fill(file: FileWriter) -> dict[str, int]:
        for name, tensor in tensors.items():
            for start in range(0, tensor.numel(), 1 << 20):
                values = tensor.view(-1)[start : start + (1 << 20)]
                out = writing.buffer(values.numel(), values.dtype)
                writing.write(file, name, start, out.copy_(values))
        writing.drain()
        return {}

    with WriteBehind(4 << 20, 8) as writing:
        write_shard(shard, tmp_path, "these tensors", fill)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: pytest.fail("the file was read to hash it"))
        known = file_sha256(tmp_path / shard.name)
    os.utime(tmp_path / shard.name)  # now it has to be read
    assert file_sha256(tmp_path / shard.name) == known
    found = Checkpoint(tmp_path)
    assert all(torch.equal(found.tensor(name), tensor) for name, tensor in tensors.items())


def test_a_file_in_order_takes_nothing_else(tmp_path: Path) -> None:
    infos = [TensorInfo(name, (4,), "F32", Path()) for name in "ab"]
    file = FileWriter(tmp_path / "file", infos, in_order=True)
    with pytest.raises(ValueError, match="not in order"):
        file.write("b", 0, torch.ones(4))
    file.close()
    assert file.sha256 is None
