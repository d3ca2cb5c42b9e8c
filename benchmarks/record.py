"""The rows of benchmarks/results/*.jsonl: one measurement a line, with everything needed to read it later.

Every row holds `benchmark`, the measurement's own fields, and under `environment` the commit (with `+` if the working
tree had changes), the versions, the device and the time. Rows are only ever appended.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "numba", "numpy", "ray", "transformers")


def append(name: str, rows: Iterable[Mapping[str, Any]], folder: Path = RESULTS) -> Path:
    """Append rows to `<folder>/<name>.jsonl`, each with the benchmark's name and the environment."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    lines = [json.dumps({"benchmark": name, **row, "environment": environment()}) + "\n" for row in rows]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)
    return path


@cache
def environment() -> dict[str, Any]:
    """Commit, versions, device and the time of the first measurement of this process."""
    return {
        "commit": commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: release for name in PACKAGES if (release := _version(name))},
        "device": device(),
    }


def commit() -> str:
    """The short hash of HEAD, `+` after it if tracked files other than results differ; `unknown` outside a checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
        return head + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device() -> dict[str, Any]:
    """The processor, the cores this process may use, the memory, and the GPU if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    described: dict[str, Any] = {"cpu": _cpu_name(), "cores": cores, "threads": torch.get_num_threads()}
    described["simd"] = torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        described["gpu"] = {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    return described


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    run = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    return run.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
