"""How the CPU kernels are compiled, cached and run on threads.

Cache: numba's, in a folder named after everything that decides the machine code (this package's source, numba, the
processor), so a new version or another machine on a shared file system never meets a stale file. Each kernel has
exactly one signature; processes that compile it at the same time replace a file by an equal one, atomically.

Threads: Python threads, kept from call to call, around kernels that release the GIL. Unlike numba's own threading
layers they may be used from several threads, after a fork and beside OpenMP. Work is cut by size, never by thread, and
results come back in order, so they do not depend on the number of threads.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
import torch
from llvmlite import binding
from numba.core import config

_settings: Any = config  # its attributes are set at run time

Item = TypeVar("Item")
Result = TypeVar("Result")


REQUIRED = ("avx2", "fma", "f16c")  # without them LLVM calls library functions that a compiled kernel cannot find


def require_features(machine: str, features: Mapping[str, bool]) -> None:
    """Refuse an x86 processor from before 2013, on which LLVM would abort the process."""
    missing = [name for name in REQUIRED if not features.get(name)]
    if machine.lower() in ("x86_64", "amd64") and missing:
        raise ValueError(f"backend='cpu' needs a processor with {', '.join(missing)}; use backend='reference'")


def cpu_features() -> dict[str, bool]:
    """What the kernels are compiled for: this processor's features, or those that NUMBA_CPU_FEATURES names."""
    if _settings.CPU_FEATURES is None:
        return dict(binding.get_host_cpu_features())
    return {name[1:]: name[0] == "+" for name in _settings.CPU_FEATURES.split(",") if name}


require_features(platform.machine(), cpu_features())


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile an entry point: cached on disk, without the GIL. Called with ints, floats and int64 arrays only."""
    before, _settings.CACHE_DIR = _settings.CACHE_DIR, str(cache_folder())
    try:
        compiled: Callable[..., Any] = numba.njit(function, cache=True, nogil=True, error_model="numpy")
        return compiled
    finally:
        _settings.CACHE_DIR = before


def inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that kernels call; it becomes part of them."""
    compiled: Callable[..., Any] = numba.njit(function, nogil=True, error_model="numpy")
    return compiled


@cache
def cache_folder() -> Path:
    """Where compiled kernels are kept: $NUMBA_CACHE_DIR, the user's cache, or a private temporary folder."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    for base in (_settings.CACHE_DIR, home, tempfile.gettempdir()):
        folder = Path(base).expanduser() / f"cpift-kernels-{_user()}" / _fingerprint()
        if base and _usable(folder):
            return folder
    return Path(tempfile.mkdtemp(prefix="cpift-kernels-"))


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def _usable(folder: Path) -> bool:
    """Writable, and nobody else's: cached code is executed."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        states = [path.stat() for path in (folder, folder.parent)]
        ours = all(state.st_uid == _user() and not state.st_mode & 0o022 for state in states)
        return os.access(folder, os.W_OK) and (os.name != "posix" or ours)
    except OSError:
        return False


def _fingerprint() -> str:
    parts = [numba.__version__, torch.__version__, binding.get_host_cpu_name(), str(binding.get_host_cpu_features())]
    parts += [os.environ.get(name, "") for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_OPT")]
    parts += [source.read_text(encoding="utf-8") for source in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`[work(item) for item in items]` on torch.get_num_threads() threads, the calling one among them.

    The caller takes items like every helper and waits for no helper that has not begun, so a call within a call, or
    more callers than helpers, end too.
    """
    items = list(items)
    helpers = min(torch.get_num_threads(), len(items)) - 1
    if helpers < 1:
        return [work(item) for item in items]
    results: list[Any] = [None] * len(items)
    places = iter(range(len(items)))

    def take() -> None:
        for place in places:
            results[place] = work(items[place])

    pool = _helpers(os.getpid())
    futures = [pool.submit(take) for _ in range(helpers)]
    try:
        take()
    finally:
        begun = [future for future in futures if not future.cancel()]
        wait(begun)
    for future in begun:
        future.result()
    return results


@cache
def _helpers(process: int) -> ThreadPoolExecutor:
    """Of this process: a forked child has none of its parent's threads."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="cpift")
