"""The compilation cache: where it lies, and that processes starting together share it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cpift_kernels.cpu import compiled

USE = """
import torch
from cpift_kernels import gather_masked, pack_mask
mask = torch.arange(1000) % 3 == 0
print(int(gather_masked(torch.arange(1000.0), pack_mask(mask)).sum()))
from cpift_kernels.cpu import freeze
print(*freeze._count.stats.cache_hits.values(), freeze._count.stats.cache_path)
"""


def start(cache: Path) -> subprocess.Popen:
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "NUMBA_CACHE_DIR": ""}
    return subprocess.Popen([sys.executable, "-c", USE], env=env, stdout=subprocess.PIPE, text=True)


def test_processes_that_start_together_compile_and_later_ones_load(tmp_path: Path) -> None:
    expected = sum(range(0, 1000, 3))
    together = [start(tmp_path) for _ in range(2)]
    for process in together:
        assert process.communicate()[0].splitlines()[0] == str(expected)
    total, hits = start(tmp_path).communicate()[0].splitlines()
    assert total == str(expected)
    assert hits.startswith("1 ")
    assert str(tmp_path) in hits


def test_an_unusable_home_leads_to_a_private_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(compiled._settings, "CACHE_DIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    folder = compiled.cache_folder.__wrapped__()
    assert folder.is_relative_to(tmp_path / "tmp")
    assert folder.parent.stat().st_mode & 0o022 == 0


def test_results_come_in_order_and_errors_come_through() -> None:
    assert compiled.in_threads(lambda x: x * x, range(50)) == [x * x for x in range(50)]
    with pytest.raises(ZeroDivisionError):
        compiled.in_threads(lambda x: 1 // x, [1, 0])


def test_an_old_processor_is_refused_with_the_remedy() -> None:
    compiled.require_features("aarch64", {})
    compiled.require_features("x86_64", {"avx2": True, "fma": True, "f16c": True})
    with pytest.raises(ValueError, match="needs a processor with f16c; use backend='reference'"):
        compiled.require_features("x86_64", {"avx2": True, "fma": True})
