"""Who works on what: an output folder held by one command, an artifact by the process that makes it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from cpift.errors import ConfigError, CpiftError, Problem

if TYPE_CHECKING:
    pass

_HOLDER = re.compile(rb"(process \d+)?")
_LOOKED_AT = 0.5  # seconds; whoever asks `is_held` has the lock for less


def is_held(root: Path) -> bool:
    """Whether a process holds an output folder, as far as its file system knows. Writes nothing."""
    try:
        import fcntl
    except ImportError:  # Windows: nobody else can open what is locked
        try:
            (root / ".lock").read_bytes()
        except PermissionError:
            return True
        except OSError:
            return False
        return False
    try:
        descriptor = os.open(root / ".lock", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    finally:
        os.close(descriptor)
    return False


def check_lock(root: Path) -> list[Problem]:
    """What keeps the lock of an output folder from being ours: a file of somebody's, or no file at all."""
    path = root / ".lock"
    remedy = "give another folder with --output"
    if not os.path.lexists(path):
        return []
    if not path.is_file():
        return [Problem(str(path), "is no file, and a lock of this name is needed", remedy)]
    with path.open("rb") as file:
        ours = _HOLDER.fullmatch(file.read(100))
    return [] if ours else [Problem(str(path), "is no lock of cpift's: it would be overwritten", remedy)]


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Hold a run's output folder, so that two commands never build the same stage at once."""
    root.mkdir(parents=True, exist_ok=True)
    if problems := check_lock(root):
        raise ConfigError(f"output {root}", problems)
    path = root / ".lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_LOOKED_AT, poll_interval=0.05)
    except Timeout:
        holder = path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
        raise CpiftError(f"{root} is in use by {holder}: wait for it, or give this run another --output") from None
    try:
        with suppress(PermissionError):  # some systems let nobody write to what is locked; it is for the message alone
            path.write_text(f"process {os.getpid()}", encoding="utf-8")
        yield
    finally:
        lock.release()
