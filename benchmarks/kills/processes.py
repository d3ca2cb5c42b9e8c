"""Linux processes and memory, for the experiments that kill: what /proc says."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def descendants(root: int) -> list[int]:
    """Process ids below `root`, oldest first."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                parents[int(folder.name)] = int(fields[1])
    pids, level = [], [root]
    while level:
        level = [pid for pid, parent in parents.items() if parent in level]
        pids += level
    return sorted(pids)


def command_line(pid: int) -> str:
    """Empty for a process that is gone, or dead and not yet waited for."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def kill_tree(root: int) -> None:
    """SIGKILL to a process and all below it, whatever their process groups."""
    for pid in [root, *descendants(root)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def used_and_total() -> tuple[int, int]:
    """Bytes of this machine's memory, as Ray's memory monitor counts them: total − available."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    total, available = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    return total - available, total
