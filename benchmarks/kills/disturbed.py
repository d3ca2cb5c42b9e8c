"""The disturbed run of training.py, and what can be done to it."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.kills.object_store import ObjectStore
from benchmarks.kills.processes import command_line, descendants, used_and_total
from cpift.disk.files import file_sha256

WORKER, CONTROLLER = "RayTrainWorker", "TrainController"
PLACES = ("ray/fit/checkpoint_*", "kept-*")  # of a Ray Train run a fine-tune, and of a group's workers
DEADLINE = 400.0  # seconds without a new checkpoint
THRESHOLD = "RAY_memory_usage_threshold"
HEADROOM = 2**30  # bytes that the machine has left below the monitor's threshold when it starts


@dataclass
class Probe:
    """One `cpift probe` into a folder of its own, started as often as it takes."""

    config: Path
    output: Path
    changes: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    store: ObjectStore | None = None  # where its checkpoints are, if not below `output`
    starts: int = 0
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.starts += 1
        if THRESHOLD in self.environment:
            set_threshold(self)  # what else runs here may have grown
        command = [sys.executable, "-m", "cpift.cli", "probe", str(self.config), "--output", str(self.output)]
        for change in self.changes:
            command += ["--set", change]
        log = (self.output.with_suffix(".log")).open("a", encoding="utf-8")
        self.process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            text=True,
            env=os.environ | self.environment,
            start_new_session=True,
            encoding="utf-8",
        )

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def finished(self) -> bool:
        return any(self.output.glob("probe/*/manifest.json"))

    def checkpoints(self) -> dict[str, int | None]:
        """Their names, and the step of those that are whole."""
        if self.store is not None:
            return self.store.checkpoints()
        by_name = {path.name: path for place in PLACES for path in sorted(self.output.glob(f".work/*/{place}"))}
        return {name: step_of(path / "trainer_state.json") for name, path in by_name.items()}

    def processes(self, name: str, root: int | None = None) -> list[int]:
        """Descendants whose command line holds `name`, oldest first."""
        assert self.process is not None
        return [pid for pid in descendants(root or self.process.pid) if name in command_line(pid)]

    def logged_steps(self, worker: int) -> set[int]:
        """Steps whose loss is in the log of a worker, whichever attempt of it."""
        (log,) = self.output.glob(f"logs/*/worker-{worker}.log")
        return {int(step) for step in re.findall(r"stage 0, step (\d+) of", log.read_text(encoding="utf-8"))}

    def losses(self) -> dict[int, float]:
        """The loss of each logged step of the finished fine-tune."""
        (result,) = self.output.glob("probe/*/training.json")
        return {entry["step"]: entry["loss"] for entry in json.loads(result.read_text(encoding="utf-8"))["log"]}

    def digest(self) -> str:
        (model,) = self.output.glob("probe/*/model.safetensors")
        return file_sha256(model)


def step_of(state: Path) -> int | None:
    try:
        return int(json.loads(state.read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError):
        return None


def wait_for_checkpoint(probe: Probe, known: set[str], rng: random.Random) -> bool:
    """Until a moment after the next checkpoint has appeared; False if the command ended before."""
    limit = time.monotonic() + DEADLINE
    while time.monotonic() < limit:
        if set(probe.checkpoints()) - known:
            time.sleep(rng.uniform(0, 4))
            return True
        if not probe.alive():
            return False
        time.sleep(0.05)
    raise TimeoutError(f"no checkpoint within {DEADLINE:g} s; see {probe.output.with_suffix('.log')}")


Kill = Callable[[Probe, random.Random], str | None]


def sigkill(name: str) -> Kill:
    def kill(probe: Probe, rng: random.Random) -> str | None:
        processes = probe.processes(name)
        if not processes:
            return None
        pid = rng.choice(processes)
        what = command_line(pid)
        os.kill(pid, signal.SIGKILL)
        return what[:60]

    return kill


def kill_driver(probe: Probe, rng: random.Random) -> str | None:
    if not probe.alive():
        return None
    assert probe.process is not None
    os.kill(probe.process.pid, signal.SIGKILL)
    probe.process.wait()
    return "cpift probe"


FILLER = "import sys, time; held = bytearray(b'x') * int(sys.argv[1]); print('full', flush=True); time.sleep(60)"


def fill_memory(probe: Probe, rng: random.Random) -> str | None:
    """Fill the node above the monitor's threshold until one of Ray's processes is gone."""
    assert probe.process is not None
    before = {pid: command_line(pid) for pid in descendants(probe.process.pid) if "ray::" in command_line(pid)}
    if not any(WORKER in name for name in before.values()):
        return None
    used, total = used_and_total()
    size = int(float(probe.environment[THRESHOLD]) * total) - used + HEADROOM // 4
    filler = subprocess.Popen([sys.executable, "-c", FILLER, str(max(size, 1))], stdout=subprocess.DEVNULL)
    try:
        for _ in range(240):
            time.sleep(0.25)
            gone = [name for pid, name in before.items() if not command_line(pid)]
            if gone:
                return f"memory monitor: {', '.join(sorted(gone))[:80]}"
    finally:
        filler.kill()
        filler.wait()
    return None


def limit_memory(probe: Probe, rng: random.Random) -> str | None:
    """Let the worker's next allocations fail; some libraries then end it, in others it stands still for ever."""
    workers = probe.processes(WORKER)
    if not workers:
        return None
    size = int(Path(f"/proc/{workers[0]}/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.prlimit(workers[0], resource.RLIMIT_AS, (size - 2**28, size - 2**28))
    return f"address space of {command_line(workers[0])[:40]}"


def stop(probe: Probe, rng: random.Random) -> str | None:
    workers = probe.processes(WORKER)
    if not workers:
        return None
    os.kill(workers[0], signal.SIGSTOP)
    return f"stopped, not killed: {command_line(workers[0])[:40]}"


def set_threshold(probe: Probe) -> None:
    """Let the memory monitor act a little above what the machine uses now; Ray and the fine-tune take about 2 GiB."""
    used, total = used_and_total()
    threshold = (used + 2 * 2**30 + HEADROOM) / total
    probe.environment |= {THRESHOLD: f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "250"}
