"""Merges make their tensors where others were freed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpift.config.inputs import ScratchModel
from cpift.config.run import ModelConfig
from cpift.models.sources import materialise

# In a process of its own: what the C library is told holds for good.
_MERGED = """
import resource, sys
import cpift, cpift.merging.engine as engine, cpift.merging.selected.ties

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

inner, seen = engine.fill_shard, []

def counted(*arguments):
    before = faults()
    record = inner(*arguments)
    seen.append(faults() - before)
    return record

engine.fill_shard = counted
base, one, two, out = sys.argv[1:]
cpift.merge(base, {"one": one, "two": two}, out=out, method="ties", density=0.5)
print(sum(seen))
"""


@pytest.mark.slow
def test_a_merge_takes_few_new_pages(tmp_path: Path) -> None:
    """TIES makes some ten tensors for each slice: with pages of its own each, 17 million parameters took 144,000."""
    scratch = ScratchModel(hidden_size=1024, intermediate_size=4096, layers=1, heads=4)
    materialise(ModelConfig(scratch=scratch, dtype="bfloat16"), tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for name in ("one", "two"):
        shutil.copytree(tmp_path / "base", tmp_path / name)
        moved = {key: (x + 0.02 * torch.randn(x.shape)).bfloat16() for key, x in weights.items()}
        save_file(moved, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    folders = [str(tmp_path / name) for name in ("base", "one", "two", "merged")]
    done = subprocess.run([sys.executable, "-c", _MERGED, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40_000, done.stdout
