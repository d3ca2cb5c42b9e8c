"""What a disk gives back other than it was written is met before a file has its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.writing import ShardRecord, WriteBehind, plan_shards, write_shard
from cpift.disk import direct_io
from cpift.errors import StageError
from cpift.formats.safetensors import FileWriter, TensorInfo

BLOCK = direct_io._BLOCK
NUMEL = 9 * BLOCK // 4 + 77  # more blocks than may wait to be compared, and a part of one


def write(folder: Path) -> None:
    values = torch.arange(NUMEL, dtype=torch.float32)
    (shard,) = plan_shards([TensorInfo("w", (NUMEL,), "F32", Path())], 1 << 30)

    def fill(file: FileWriter) -> ShardRecord:
        for start in range(0, NUMEL, 1 << 20):
            part = values[start : start + (1 << 20)]
            writing.write(file, "w", start, writing.buffer(len(part), part.dtype).copy_(part))
        writing.drain()
        return {"tensors": []}

    with WriteBehind(4 << 20, 2) as writing:
        write_shard(shard, folder, "these", fill, read_back=True)
    assert torch.equal(Checkpoint(folder).tensor("w"), values)


@pytest.fixture(params=["direct", "not opened"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "not opened":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    return str(request.param)


@pytest.mark.usefixtures("file_system")
def test_a_sound_disk_gives_back_what_was_written(tmp_path: Path) -> None:
    write(tmp_path)


@pytest.mark.usefixtures("file_system")
@pytest.mark.parametrize("place", [0, 3 * BLOCK + 12345, 9 * BLOCK + 100])  # in the first block, one within, the last
def test_a_bit_that_the_disk_lost_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    whole = os.pwrite

    def losing(descriptor: int, data: Any, offset: int) -> int:
        raw = bytearray(data)
        if offset <= place < offset + len(raw):
            raw[place - offset] ^= 16
        done = whole(descriptor, data, offset)  # as memory has it
        if raw != data:
            with (next(tmp_path.glob(".*.partial"))).open("r+b") as file:
                file.seek(place)
                file.write(raw[place - offset : place - offset + 1])
        return done

    monkeypatch.setattr(direct_io.os, "pwrite", losing)
    with pytest.raises(StageError, match=r"model\.safetensors could not be written: bytes \d+ to \d+ are read back as"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == [], "neither a file that is not what it should be nor half of one"
