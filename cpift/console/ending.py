"""How a command ends before its time: by Ctrl-C, SIGTERM or SIGHUP in order and within ten seconds.

A signal raises KeyboardInterrupt in the main thread, once; what is under way leaves its `with` blocks, Ray's processes
of this machine are ended, and a message says what is kept. Ray is not shut down by its own means then: threads that
still wait for it would crash. Whatever blocks is waited for a few seconds only; a second signal ends it at once.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from cpift.console.terminal import say
from cpift.console.view import View

_SECONDS = 8.0  # for what is under way to leave, before the process ends all the same
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_received: int | None = None
_raised = False


def stopping() -> bool:
    """Whether a signal has told this command to end."""
    return _received is not None


@contextlib.contextmanager
def ended_in_order() -> Iterator[None]:
    """For a whole command: after a signal the process ends here, with 128 and its number.

    A program that calls a command within its own process has its handlers back after it.
    """
    with _restored():
        listen()
        try:
            yield
        except BaseException as error:
            if _received is not None:  # whatever came of it: our KeyboardInterrupt, or something that failed
                _end(_received)
            if isinstance(error, SystemExit) and error.code == signal.SIGTERM:  # by Ray's handler, while it starts
                _end(signal.SIGTERM)
            raise


def leave_threads(code: int) -> None:
    """End the process where threads wait for what will not come (a Ray that was lost): it would wait for them."""
    if any(thread is not threading.main_thread() and not thread.daemon for thread in threading.enumerate()):
        with contextlib.suppress(BaseException):
            _kill_descendants()
        os._exit(code)


def listen() -> None:
    """Handle the signals from now on.

    Only the main thread can, and what a parent told us to ignore (nohup) stays ignored.
    """
    global _listening
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    if not _pipe:
        _pipe.extend(os.pipe())
        os.set_blocking(_pipe[1], False)
        threading.Thread(target=_watch, args=(_pipe[0],), name="cpift-signals", daemon=True).start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_left_to_the_parent)
    signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    _listening = True


_pipe: list[int] = []
_listening = False


def _left_to_the_parent() -> None:
    """In a forked child (a pool of processes): its signals are its own. It would write them into its parent's pipe, and
    who ended the child by SIGTERM would end the parent."""
    global _listening
    if _listening:
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            if signal.getsignal(number) is _on_signal:
                signal.signal(number, signal.SIG_DFL)
        _listening = False
    _pipe.clear()


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Around what sets handlers of its own (Ray): a command listens again after it, others get theirs back."""
    if _listening:
        try:
            yield
        finally:
            listen()
    else:
        with _restored():
            yield


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """The handlers that were there are there again, and so is the descriptor that hears of signals."""
    global _listening
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    listening, pipe = _listening, signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(pipe)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # set by other means than Python's
                signal.signal(number, handler)
        signal.set_wakeup_fd(pipe)
        _listening = listening


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _received, _raised
    _received = number if _received is None else _received
    if not _raised:
        _raised = True
        raise KeyboardInterrupt


def _watch(heard: int) -> None:
    """Python runs handlers between its own steps alone; this thread hears a signal while the main one is in C code."""
    global _received
    first = _received = _next_signal(heard)  # also where a handler of somebody else's (Ray's) runs
    late = threading.Timer(_SECONDS, _end, (first,))
    late.daemon = True
    late.start()
    _next_signal(heard)  # told twice
    _end(first)


def _next_signal(heard: int) -> int:
    while (number := os.read(heard, 1)[0]) not in _SIGNALS:
        continue
    return number


_ending = threading.Lock()


def _end(number: int) -> None:
    """Say what is kept, end the processes that this one has started, and end it."""
    _ending.acquire()  # whoever comes second waits for the end
    with contextlib.suppress(BaseException):  # what shows progress may wait for the main thread, and is not waited for
        leaving = threading.Thread(target=View.leave, daemon=True)
        leaving.start()
        leaving.join(1.0)
    with contextlib.suppress(BaseException):
        say(_message(number), "red", err=True)
    with contextlib.suppress(BaseException):
        _kill_descendants()
    os._exit(128 + number)


def _message(number: int) -> str:
    how = f"cpift: stopped by {signal.Signals(number).name}"
    if View.running:
        how += f" during {', '.join(View.running)}"
    if View.finished or View.running:
        done = f"kept: {', '.join(View.finished)}" if View.finished else "nothing was finished in this call"
        how += f"; {done}; the same command goes on, fine-tunes from their last checkpoint"
        how += f": {' '.join(['cpift', *map(shlex.quote, sys.argv[1:])])}" if sys.argv[1:] else ""
    return how


def _kill_descendants() -> None:
    import psutil  # type: ignore[import-untyped]  # it has no stubs

    descendants: list[Any] = psutil.Process().children(recursive=True)
    for process in descendants:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(descendants, timeout=1)
