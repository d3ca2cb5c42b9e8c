"""The compilation cache: where it lies, and that processes starting together share it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cpift_kernels.cpu import compiled

USE = """
import torch
from cpift_kernels import gather_masked, pack_mask
mask = torch.arange(1000) % 3 == 0
print(int(gather_masked(torch.arange(1000.0), pack_mask(mask)).sum()))
from cpift_kernels.cpu import freeze
print(*freeze._count.stats.cache_hits.values(), freeze._count.stats.cache_path)
"""


def start(cache: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "NUMBA_CACHE_DIR": ""}
    return subprocess.Popen([sys.executable, "-c", USE], env=env, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
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


def test_calls_within_calls_and_from_many_threads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)

    def inner(x: int) -> int:
        return sum(compiled.in_threads(lambda y: x * y, range(8)))

    with ThreadPoolExecutor(8) as callers:
        found = list(callers.map(lambda x: compiled.in_threads(inner, range(x, x + 9)), range(20)))
    assert found == [[28 * y for y in range(x, x + 9)] for x in range(20)]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    run = "import os; compiled.in_threads(work, range(50)); pid = os.fork()\n"
    run += "found = compiled.in_threads(work, range(50))\nif pid == 0: os._exit(found != list(range(50)))\n"
    run += "print(os.waitpid(pid, 0)[1])"
    start = "import torch; torch.set_num_threads(4); from cpift_kernels.cpu import compiled; work = lambda x: x\n"
    done = subprocess.run([sys.executable, "-c", start + run], capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n", done.stderr


def test_an_old_processor_is_refused_with_the_remedy() -> None:
    compiled.require_features("aarch64", {})
    compiled.require_features("x86_64", {"avx2": True, "fma": True, "f16c": True})
    with pytest.raises(ValueError, match="needs a processor with f16c; use backend='reference'"):
        compiled.require_features("x86_64", {"avx2": True, "fma": True})


AVX2_ONLY = """
import torch
from cpift_kernels import *
from cpift_kernels.cpu import freeze, gram
assert not freeze.COMPRESSES and gram._REGISTER == 8
g = torch.Generator().manual_seed(0)
for dtype in (torch.bfloat16, torch.float32):
    base = torch.randn(100_003, generator=g).to(dtype)
    tuned = [(base + 0.1 * torch.randn(100_003, generator=g)).to(dtype) for _ in range(3)]
    words = []
    for backend in ("cpu", "reference"):
        cores = select_cores([base], [[x] for x in tuned], [1000, 30_000], backend=backend)
        words.append([core.words[0] for task in cores for core in task])
        grams = masked_gram(base, tuned, words[0][0], backend=backend)
        out = torch.empty_like(base)
        fused_apply(out, [base, *tuned], torch.full((1, 4), 0.25, dtype=torch.float64), [None, *words[0][:3]],
                    backend=backend)
        saved = gather_masked(base, words[0][1], backend=backend)
        back = torch.zeros_like(base)
        scatter_masked_(back, words[0][1], saved, backend=backend)
        held = hold_masked([base, base[:77]], [words[0][1], words[0][1][:3] & 8191], backend=backend)
        held.restore_([back, back[:77]])
        words[-1] += [out, grams, saved, back]
    assert all(torch.equal(found, expected) for found, expected in zip(*words, strict=True))
print("same")
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="features of x86 processors")
def test_a_processor_without_avx512_gets_the_same_bits(tmp_path: Path) -> None:
    features = "+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "NUMBA_CACHE_DIR": "", "NUMBA_CPU_NAME": "haswell"}
    done = subprocess.run(
        [sys.executable, "-c", AVX2_ONLY],
        env=env | {"NUMBA_CPU_FEATURES": features},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "same\n", done.stderr
