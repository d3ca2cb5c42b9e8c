"""Mapped files that are cut short while they are read: a flag instead of the end of the process (Linux, 64 bit).

A page of a mapped file that lies beyond the file's end cannot be read: the system sends SIGBUS, whose default is to end
the process. Within `watch_pages` a handler puts a page of zeros there and counts; who reads asks for the count
afterwards and takes nothing of what came. The handler is compiled: it may run in any thread, also one that holds no
Python state. Outside of it the signal means what it meant before.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

_SUPPORTED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") and sys.maxsize > 1 << 32
_ADDRESS_IN_SIGINFO = 2  # si_addr, in words of 8 bytes
_MAP_FIXED, _SA_SIGINFO = 0x10, 4
_DEEP, _COUNT = 0, 1
_state = np.zeros(2, np.int64)  # how many are watching; pages that could not be read
_lock = threading.Lock()
_before: list[Any] = []


class _Action(ctypes.Structure):
    """`struct sigaction` of glibc and musl."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def lost_pages() -> int:
    """Pages of mapped files that could not be read, in this process so far."""
    return int(_state[_COUNT])


@contextmanager
def watch_pages() -> Iterator[None]:
    """Within it a page that cannot be read is zeros, and `lost_pages` rises; on other systems than Linux nothing is."""
    if not _SUPPORTED:
        yield
        return
    with _lock:
        if _state[_DEEP] == 0:
            _before.append(_exchange(_Action(handler=_handler().address, flags=_SA_SIGINFO)))
        _state[_DEEP] += 1
    try:
        yield
    finally:
        with _lock:
            _state[_DEEP] -= 1
            if _state[_DEEP] == 0:
                _exchange(_before.pop())


def _exchange(action: _Action) -> _Action:
    before = _Action()
    library = ctypes.CDLL(None, use_errno=True)
    if library.sigaction(int(signal.SIGBUS), ctypes.byref(action), ctypes.byref(before)) != 0:
        raise OSError(ctypes.get_errno(), "sigaction")
    return before


@lru_cache(1)
def _handler() -> Any:
    """void (int signal, siginfo_t *info, void *context)"""
    from numba import cfunc, types
    from numba.core import cgutils
    from numba.extending import intrinsic
    from numba.np.numpy_support import carray

    library, word = ctypes.CDLL(None), ctypes.c_ssize_t
    put_page, reset = library.mmap, library.signal
    put_page.restype, put_page.argtypes = word, [word, word, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, word]
    reset.restype, reset.argtypes = word, [ctypes.c_int32, word]
    state_at, page = _state.ctypes.data, mmap.PAGESIZE
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED

    @intrinsic
    def pointer(context: Any, address: Any) -> Any:
        return types.voidptr(address), lambda _, builder, __, arguments: builder.inttoptr(
            arguments[0], cgutils.voidptr_t
        )

    @cfunc(types.void(types.int32, types.CPointer(types.int64), types.voidptr))
    def handle(number: Any, info: Any, context: Any) -> None:
        state = carray(pointer(state_at), 2, np.int64)  # type: ignore[call-arg]  # numba's, within compiled code
        address = carray(info, 3)[_ADDRESS_IN_SIGINFO]
        state[_COUNT] += 1
        if put_page(address - address % page, page, protection, flags, -1, 0) == -1:
            reset(number, 0)  # the default: what cannot be read ends the process after all

    return handle
