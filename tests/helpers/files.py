"""Ways for a file to change."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def replace(path: Path) -> None:
    """By another file of the same size and time, through a rename."""
    before, other = path.stat(), path.with_name("other")
    shutil.copy(path, other)
    flip(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


def forge(path: Path) -> None:
    """In place, and its time set back."""
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
