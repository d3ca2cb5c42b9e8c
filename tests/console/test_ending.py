"""How commands end: by signals in order, leaving no process, and with one message where a disk is full."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil  # type: ignore[import-untyped]
import pytest

from cpift.cluster import session as distributed_session
from cpift.cluster.session import alive_nodes, first_ready, ray_session, require_ray
from cpift.config.run import ResourcesConfig
from cpift.disk.files import write_text
from cpift.errors import CpiftError, StageError, explain_os_error, naming

# A command in the middle of a stage, with a process of its own; `how` is what the main thread is busy with.
COMMAND = """
import subprocess, sys, threading, time
from cpift.console.ending import ended_in_order
from cpift.console.view import quiet
how = sys.argv[1]
with ended_in_order():
    with quiet().stage("model"):
        pass
    with quiet().stage("probes"):
        child = subprocess.Popen(["sleep", "100"])
        threading.Thread(target=time.sleep, args=(100,)).start()  # as those that wait for Ray
        print(child.pid, flush=True)
        if how == "python":
            while True:
                time.sleep(0.05)
        if how == "swallowed":
            try:
                time.sleep(100)
            finally:
                raise RuntimeError("of what was interrupted")
        if how == "exits":
            try:
                time.sleep(100)
            except KeyboardInterrupt:
                sys.exit(15)
"""


def _listens() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def started(how: str, **options: object) -> tuple[subprocess.Popen[str], psutil.Process]:
    command = [sys.executable, "-c", COMMAND, how]
    defaults = {"preexec_fn": _listens} | options  # whatever this process was told to ignore (a shell's background job)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **defaults)  # type: ignore[call-overload]
    assert process.stdout is not None
    return process, psutil.Process(int(process.stdout.readline()))


@pytest.mark.parametrize(
    ("name", "how"),
    [("SIGINT", "python"), ("SIGTERM", "python"), ("SIGHUP", "python"), ("SIGINT", "swallowed"), ("SIGTERM", "exits")],
)
def test_a_signal_ends_a_command_in_order(name: str, how: str) -> None:
    process, child = started(how)
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name)
    assert f"cpift: stopped by {name} during probes; kept: model; the same command goes on" in said
    assert "Traceback" not in said
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_what_a_parent_says_is_ignored_stays_ignored() -> None:
    process, _ = started("python", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


FORKS = """
import os, signal, time
from cpift.console.ending import ended_in_order
def forked(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child
def waits():
    os.write(written, b"x")
    time.sleep(60)
def command():  # within a forked process it hears its own signals
    with ended_in_order():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
read, written = os.pipe()
before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
with ended_in_order():
    for work in (waits, waits, command):  # a pool of processes ends them like this
        child = forked(work)
        if work is waits:
            os.read(read, 1)
            os.kill(child, signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    time.sleep(0.5)
print((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before, signal.set_wakeup_fd(-1))
"""


def test_signals_of_forked_processes_do_not_end_the_command_and_handlers_are_given_back() -> None:
    run = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60, preexec_fn=_listens)
    assert (run.returncode, run.stdout) == (0, "-15\n-15\n143\nTrue -1\n")


# ---- full disks ------------------------------------------------------------------------------------------------------


class Wrapped(RuntimeError):
    """As Ray wraps what a worker raised."""

    cause = OSError(errno.ENOSPC, "No space left on device", "/data/x")


def caused() -> Exception:
    error = ValueError("while saving")
    error.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded", "/data/x")
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/nowhere/x"), ["/nowhere/x: No space", "free", "goes on"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["No space left on device", "goes on"]),
        (
            OSError(errno.ENOSPC, "No space left on device", "/read/x", None, "/written/x"),
            ["/written/x: No space", "free"],
        ),
        (OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"), ["goes on"]),
        (RuntimeError("[enforce fail at inline_container.cc:868] . No space left on device"), ["inline_container"]),
        (
            RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'),
            ["StorageFull"],
        ),
        (Wrapped("task failed"), ["/data/x: No space left on device"]),
        (caused(), ["/data/x: Disk quota exceeded"]),
        (OSError(errno.EFBIG, "File too large"), ["File too large"]),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), ["/root/x: Permission denied", "permissions"]),
    ],
)
def test_a_full_disk_is_told_whoever_met_it(error: Exception, said: list[str]) -> None:
    message = explain_os_error(error)
    assert message is not None
    assert all(part in message for part in said), message


@pytest.mark.parametrize("error", [ValueError("no"), OSError(errno.ENOENT, "No such file", "x"), KeyError("space")])
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    assert explain_os_error(error) is None


def test_what_is_written_is_named_with_what_it_needs_and_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_text(tmp_path / "scores.json", "x" * 5000)
    message = explain_os_error(caught.value)
    assert message is not None
    assert message.startswith(f"{tmp_path / 'scores.json'}: No space left on device (")
    assert "needed, " in message
    assert " free) → free some room" in message
    with pytest.raises(OSError, match="No space") as caught, naming(tmp_path / "y", 7_000_000):
        full(0)
    assert "7" in str(explain_os_error(caught.value)).split("needed")[0]


# ---- a Ray that is lost ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dead", "nodes"), [([("raylet", None)], [{"Alive": True}]), ([], [{"Alive": False}]), ([], [])]
)
def test_a_lost_ray_is_told_and_not_waited_for(
    dead: list[tuple[str, None]], nodes: list[dict[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = SimpleNamespace(is_head=lambda: True, dead_processes=lambda: dead)
    monkeypatch.setattr(distributed_session.ray._private.worker, "_global_node", node)
    monkeypatch.setattr(distributed_session.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(distributed_session.ray, "wait", lambda tasks, **rest: ([], tasks))
    monkeypatch.setattr(distributed_session, "_lost", False)
    for waits in (require_ray, alive_nodes, lambda: first_ready(["task"])):
        with pytest.raises(StageError, match=r"Ray was lost: .* what was finished is kept"):
            waits()


def test_another_way_to_prove_oneself_to_ray_needs_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would take the first for this process and the second for what it starts, and neither would say so."""
    monkeypatch.setattr(distributed_session, "_modes", {os.getpid(): ("token", "token")})
    monkeypatch.setattr(distributed_session.ray, "init", lambda **options: pytest.fail("Ray was started"))
    refusal = r"RAY_AUTH_MODE: disabled, but .* used with token .* a new Python process"
    with pytest.raises(CpiftError, match=refusal), ray_session(ResourcesConfig()):
        pass


def test_what_ray_set_by_itself_is_not_taken_to_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook that ran here first. Whoever gave the mode himself knows what the cluster has."""
    started: list[str] = []
    monkeypatch.setattr(distributed_session.ray, "init", lambda address, **options: started.append(address))
    monkeypatch.setattr(distributed_session.ray, "shutdown", lambda: None)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(distributed_session, "_modes", {os.getpid(): (None, "token")})
    with pytest.raises(CpiftError, match="RAY_AUTH_MODE: token"), ray_session(ResourcesConfig(address="auto")):
        pass
    for resources, asked in ((ResourcesConfig(), None), (ResourcesConfig(address="auto"), "token")):
        monkeypatch.setattr(distributed_session, "_modes", {os.getpid(): (asked, "token")})
        with ray_session(resources):
            pass
    assert started == ["local", "auto"]
