"""A mapped file that is cut short while it is read: an error with its name, and what was finished is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpift_kernels import lost_pages, watch_pages
from safetensors.torch import save_file

import cpift.merging.engine
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.loading import load_config
from cpift.console.view import quiet
from cpift.disk.guarded import guarded_reads
from cpift.disk.mapped import MappedFile
from cpift.errors import ChangedInput
from cpift.method.masks import RegionMasks
from cpift.pipeline.engine import NoEngine
from cpift.pipeline.pipeline import Pipeline
from tests.helpers.checkpoints import random_tensors, save_checkpoint
from tests.helpers.files import flip, replace

CODE = """
import hashlib, mmap, os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, torch
from cpift_kernels import pack_mask
from safetensors import safe_open
from safetensors.torch import save_file
from cpift.errors import ChangedInput
from cpift.disk.guarded import guarded_reads

READS = {
    "torch": lambda x, o: x.sum(),
    "torch, wide": lambda x, o: x.view(torch.float32).exp(),
    "numpy": lambda x, o: x.numpy().max(),
    "a hash": lambda x, o: hashlib.sha256(x.numpy().data).hexdigest(),
    "a numba kernel": lambda x, o: pack_mask(x.bool()),
    "safetensors": lambda x, o: o.get_tensor("x").sum(),
    "another thread": lambda x, o: ThreadPoolExecutor(1).submit(x.sum).result(),
    "an error in between": lambda x, o: [][int(x.sum())],
}

def prepared(name):
    path = Path(sys.argv[1]) / f"{name}.safetensors"
    save_file({"x": torch.ones(64 * 4096, dtype=torch.uint8)}, path)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return path, torch.frombuffer(mapped, dtype=torch.uint8, count=64 * 4096), safe_open(path, "pt")

for name, read in READS.items():
    path, values, opened = prepared(name)
    try:
        with guarded_reads(name, [path]):
            os.truncate(path, 4096)
            read(values, opened)
    except ChangedInput as error:
        print(" ".join(str(error).split()))
sys.stdout.flush()
path, values, opened = prepared("bare")
os.truncate(path, 4096)
values.sum()
"""


@pytest.mark.slow
def test_whoever_reads_gets_an_error_and_without_a_guard_the_signal_means_what_it_meant(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=False, timeout=200
    )
    said = done.stdout.splitlines()
    assert len(said) == 8, done.stderr
    for line in said:
        name = line.split(" is not kept")[0]
        assert f"{name}.safetensors: was written to" in line
    assert done.returncode == -signal.SIGBUS


def test_guards_nest_and_end(tmp_path: Path) -> None:
    before = lost_pages()
    with watch_pages(), watch_pages():
        pass
    with guarded_reads("a"), guarded_reads("b", [tmp_path / "new"][:0]):
        pass
    assert lost_pages() == before
    with pytest.raises(ZeroDivisionError), guarded_reads("a"):
        raise ZeroDivisionError


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 4096), flip, lambda path: os.utime(path, ns=(0, 0))])
def test_a_slice_of_a_file_that_changed_is_refused(change: object, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m", random_tensors(0) | {"big": torch.ones(4096)})
    model = Checkpoint(folder)
    assert model.tensor("big").sum() == 4096
    change(folder / "model.safetensors")  # type: ignore[operator]
    with pytest.raises(ChangedInput, match=r"model.safetensors: was written to or cut short"):
        model.slice("big", 0, 10)
    with pytest.raises(ChangedInput, match=r"model.safetensors: was replaced or written to"):
        model.require_unchanged()


def test_a_file_replaced_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m", random_tensors(0))
    model = Checkpoint(folder)
    replace(folder / "model.safetensors")
    with pytest.raises(ChangedInput, match="is another file than the one whose header was read"):
        model.tensor("bias")


def test_a_mask_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4096, dtype=torch.int32)}, tmp_path / "a.safetensors")
    (tmp_path / "regions.json").write_text(json.dumps({}))
    masks = RegionMasks(tmp_path, ["a"])
    os.truncate(tmp_path / "a.safetensors", 4096)
    with pytest.raises(ChangedInput, match=r"a.safetensors: was written to or cut short"):
        masks.words("a", "x", 0, 4096 * 32)


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_a_merge_whose_input_is_cut_short_goes_on_once_it_is_back(
    late: bool,
    merge: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """late: the file is cut after the check of its size, so that the fault itself is what is noticed."""
    victim = merge.parent / "models" / "one" / "model.safetensors"
    kept, times = victim.read_bytes(), victim.stat()
    run = Pipeline(load_config(merge), NoEngine(), quiet())
    run.group()
    view, written = MappedFile.view, cpift.merging.engine.write_shard

    def cut(self: MappedFile, start: int, dtype: torch.dtype, count: int) -> torch.Tensor:
        if late:
            values = view(self, start, dtype, count)
        if len(shards) == 2 and self._path == victim:
            os.truncate(victim, 4096)
        return values if late else view(self, start, dtype, count)

    shards: list[str] = []

    def counted(shard: object, *args: object) -> object:
        result = written(shard, *args)  # type: ignore[arg-type]
        shards.append(str(shard))
        return result

    monkeypatch.setattr(MappedFile, "view", cut)
    monkeypatch.setattr(cpift.merging.engine, "write_shard", counted)
    with pytest.raises(ChangedInput, match=r"model.safetensors: was"):
        run.fuse()
    (work,) = (run.root / ".work").glob("fuse-*/shards")
    assert len(list(work.glob("model-*.safetensors"))) == 2, "what was finished is kept"
    monkeypatch.undo()
    victim.write_bytes(kept)
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    before = {path.name: path.stat().st_ino for path in work.glob("model-*.safetensors")}
    fused = Pipeline(load_config(merge), NoEngine(), quiet()).fuse()
    assert {name: (fused.path / name).stat().st_ino for name in before} == before
    assert all(bool(torch.isfinite(x).all()) for x in map(Checkpoint(fused.path).tensor, Checkpoint(fused.path).names))
